"""Figures in the one style (`v4jax/style.py`): neither a display nor pyplot's state is touched.

Importing this imports matplotlib, a third of a second: what trains imports it where it draws.
"""

from __future__ import annotations

import functools
import io
import pathlib
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import matplotlib
import matplotlib.style
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from v4jax import style
from v4jax.training.files import write_whole

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
SHADES = LinearSegmentedColormap.from_list("v4jax", style.SHADES)


def in_style():
    """A context in which matplotlib has this project's settings, and no others."""
    return matplotlib.style.context(["default", style.MATPLOTLIB])


def styled(draw: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`draw`, run in the style."""

    @functools.wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with in_style():
            return draw(*args, **kwargs)

    return drawn


class Drawing(Figure):
    """A Figure that keeps the style when it is saved, and that a notebook shows as it is.

    width, height: inches; 6.6 is the width of a paper's text.
    """

    def __init__(self, width: float, height: float):
        layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, wspace=0.03, hspace=0.04)
        super().__init__(figsize=(width, height), layout=layout)

    def savefig(self, fname: Any, **kwargs: Any) -> None:
        with in_style():  # ticks are made as late as here
            super().savefig(fname, **kwargs)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """For IPython: twice as many pixels as it takes on the screen."""
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=200, metadata={"Software": None})
        width, height = (round(100 * inches) for inches in self.get_size_inches())
        return content.getvalue(), {"width": width, "height": height}


def save_figure(path: pathlib.Path, figure: Figure) -> None:
    """Writes a PNG, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    write_whole(path, content.getvalue())

"""The experts' load over a run: largest over mean, dead experts and entropy, layer by layer.

    python -m v4jax.analysis.load_plot runs/demo/qat          writes runs/demo/qat/load.png

From the metrics `<layer>/load_max`, `<layer>/dead_experts` and `<layer>/load_entropy` of
metrics.jsonl (`v4jax.layers.router.load_metrics`).
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from v4jax.style import BLUE, FAINT, GREY, ORANGE

Rows = Sequence[Mapping[str, Any]]
METRICS = {
    "load_max": ("largest load / mean load", "1: even", 1.0),
    "dead_experts": ("experts without a token", "0: none", 0.0),
    "load_entropy": ("entropy of the load", "1: even, 0: one expert has all", 1.0),
}


def table(rows: Rows, name: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(layers, steps [S], values [layers, S], NaN where not logged) of one metric.

    Layers in the order of their numbers, those without a number (mtp) last.
    """
    ends = f"/{name}"
    logged = [row for row in rows if any(key.endswith(ends) for key in row)]
    keys = {key for row in logged for key in row if key.endswith(ends)}
    layers = sorted((key.removesuffix(ends) for key in keys), key=_order)
    values = [[float(row.get(layer + ends, np.nan)) for row in logged] for layer in layers]
    steps = np.array([row["step"] for row in logged], float)
    return layers, steps, np.array(values, float).reshape(len(layers), len(steps))


def _order(layer: str) -> tuple[float, str]:
    digits = "".join(c for c in layer if c.isdigit())
    return (float(digits) if digits else np.inf), layer


def save(path: pathlib.Path, rows: Rows, name: str = "") -> None:
    """Draws a run's metrics into a PNG. name: of the run."""
    from v4jax.analysis.figures import save_figure

    save_figure(path, draw(rows, name))


def draw(rows: Rows, name: str = ""):
    """The matplotlib Figure: a row for each metric, the layers' range beside a map of them."""
    from v4jax.analysis.figures import styled

    return styled(_page)(rows, name)


def _page(rows: Rows, name: str):
    from v4jax.analysis.figures import Drawing

    figure = Drawing(6.6, 6.6)
    grid = figure.add_gridspec(len(METRICS), 2, width_ratios=(1, 1.25))
    for i, (metric, (title, note, even)) in enumerate(METRICS.items()):
        layers, steps, values = table(rows, metric)
        left, right = (figure.add_subplot(grid[i, k]) for k in range(2))
        left.set_title(f"({'ace'[i]}) {title}", pad=14)
        left.annotate(note, (0, 1), (0, 3), xycoords="axes fraction", fontsize=7, color=GREY,
                      textcoords="offset points")  # fmt: skip
        right.set_title(f"({'bdf'[i]}) the same, by layer", pad=14)
        if not len(layers):
            for axes in (left, right):
                axes.annotate("not measured", (0.5, 0.5), xycoords="axes fraction", ha="center",
                              color=GREY)  # fmt: skip
            continue
        _range(left, steps, values, even, worst_is_low=metric == "load_entropy")
        _map(figure, right, layers, steps, values, even)
        if i == len(METRICS) - 1:
            left.set_xlabel("step")
            right.set_xlabel("step")
    figure.suptitle(f"{name}: experts' load" if name else "experts' load", fontsize=9.5,
                    fontweight="bold")  # fmt: skip
    return figure


def _range(axes, steps, values, even: float, worst_is_low: bool) -> None:
    """The worst layer's line, and the middle one's within the shade of all."""
    worst = np.nanmin(values, axis=0) if worst_is_low else np.nanmax(values, axis=0)
    axes.fill_between(steps, np.nanmin(values, 0), np.nanmax(values, 0), color=FAINT, linewidth=0)
    axes.plot(steps, worst, color=ORANGE, linewidth=1.3, label="worst layer")
    axes.plot(steps, np.nanmedian(values, axis=0), "--", color=BLUE, linewidth=1.3,
              label="median layer")  # fmt: skip
    axes.axhline(even, color="black", linewidth=0.8, linestyle=":")
    axes.legend(fontsize=7)


def _map(figure, axes, layers, steps, values, even: float) -> None:
    """Layers from the bottom up; the palest shade is an even load."""
    from v4jax.analysis.figures import SHADES

    edges = np.concatenate([[steps[0]], (steps[1:] + steps[:-1]) / 2, [steps[-1]]])
    if len(steps) == 1:
        edges = np.array([steps[0] - 0.5, steps[0] + 0.5])
    low, high = np.nanmin(values), np.nanmax(values)
    shades = SHADES if high - even >= even - low else SHADES.reversed()
    image = axes.pcolormesh(
        edges, np.arange(len(layers) + 1) - 0.5, values, cmap=shades,
        vmin=min(low, even), vmax=max(high, even, low + 1e-3), rasterized=True,
    )  # fmt: skip
    figure.colorbar(image, ax=axes, pad=0.02, aspect=18)
    every = max(1, len(layers) // 12)
    axes.set_yticks(range(0, len(layers), every), layers[::every], fontsize=7)


def main(argv: Sequence[str]) -> None:
    """`<run folder>`: writes load.png into it."""
    from v4jax.training.files import as_path
    from v4jax.training.metrics import read_metrics

    for argument in argv:
        folder = as_path(argument)
        save(folder / "load.png", read_metrics(folder), folder.name)
        print(f"{folder}/load.png")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])

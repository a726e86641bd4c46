"""The report's tables and figures one by one, for a notebook: each shows itself.

They are those of the page (`page.py`, `figures.py`), on white whatever the notebook's theme is.
"""

from __future__ import annotations

import dataclasses

from v4jax.launching import charts, figures, page
from v4jax.launching.results import Results, choose_metric

_PLAIN = """
.sweep { --paper: #ffffff; --ink: #1c1e21; --soft: #5b6068; --rule: #d6d9de; --shade: #f4f5f7;
  background: var(--paper); color: var(--ink); padding: 0.5rem;
  font: 15px/1.5 system-ui, sans-serif; }
.sweep h2 { display: none; }
.sweep h3 { margin: 0 0 0.2rem; font-size: 1rem; }
.sweep th button { all: unset; }
.sweep figure { margin: 0; max-width: 34rem; }
.sweep .charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; }
.sweep table { border-collapse: collapse; }
.sweep th, .sweep td { padding: 0.3rem 0.7rem; text-align: left;
  border-bottom: 1px solid var(--rule); }
.sweep .n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.sweep tr.top td { font-weight: 600; }
.sweep .soft, .sweep figcaption { color: var(--soft); font-size: 0.875rem; }
.sweep .best { border-left: 4px solid var(--c0); padding-left: 0.9rem; margin: 0.6rem 0; }
.sweep .big { font-size: 1.25rem; font-weight: 600; }
.sweep .legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.1rem 1rem; padding: 0;
  margin: 0.2rem 0; font-size: 0.875rem; }
"""


@dataclasses.dataclass(frozen=True)
class Shown:
    """A piece of HTML that Jupyter and VS Code show."""

    html: str

    def _repr_html_(self) -> str:
        colors = "".join(f"--c{i}: {color}; " for i, color in enumerate(charts.LIGHT))
        style = f"{charts.STYLE}{_PLAIN}.sweep {{ {colors}}}"
        return f'<style>{style}</style><div class="sweep">{self.html}</div>'


def summary(results: Results, metric: str | None = None, highest: bool = False) -> Shown:
    """How many runs there are and the best of them by `metric`, see `choose_metric`."""
    return Shown(page.summary_section(results, choose_metric(results, metric), highest))


def table(results: Results, metric: str | None = None, highest: bool = False) -> Shown:
    """A row for every setting: mean and standard deviation over its seeds; the best in bold."""
    drawn = page.group_table(results, choose_metric(results, metric), highest)
    return Shown(drawn.replace(" A column's head sorts.", ""))  # without the page's script


def over_axes(results: Results, metric: str | None = None) -> Shown:
    """A metric over each axis of the sweep.

    Raises:
      ValueError: one line: no finished run has a number, or none has `metric`.
    """
    metric = choose_metric(results, metric)
    if metric is None:
        raise ValueError(f"{results.plan.workdir}: no finished run has a number yet")
    axes = [axis for axis, values in results.axes.items() if len(values) > 1]
    return _grid([figures.axis_figure(results, axis, metric) for axis in axes])


def losses(results: Results, axis: str) -> Shown:
    """Training losses of every run and part, coloured by their value of `axis`.

    Raises:
      ValueError: one line: the sweep has no such axis.
    """
    if axis not in results.axes:
        raise ValueError(f"axis {axis!r}: the sweep has {', '.join(results.axes) or 'none'}")
    found, _ = figures.losses(results)
    values = results.axes[axis]
    return _grid([figures.loss_figure(part, runs, axis, values) for part, runs in found.items()])


def _grid(drawn: list[str]) -> Shown:
    return Shown(f'<div class="charts">{"".join(drawn)}</div>')

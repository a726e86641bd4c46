"""A study's picture: every paired difference with its interval and its seeds; curves and lines."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from matplotlib.ticker import LogLocator, NullLocator

from v4jax import style
from v4jax.analysis.figures import Drawing, save_figure, styled

WIDE = 10
"""Times that the largest x may be the smallest before the axis is logarithmic."""


@styled
def draw(report: Mapping[str, Any]) -> Drawing:
    """A panel for each section, a row for each difference; on top panels of curves and lines."""
    sections = list(report["sections"].items())
    tops = [(top, report[name]) for name, top in TOPS.items() if report[name]]
    heights = [2.4] * len(tops) + [0.75 + 0.2 * len(rows) for _, rows in sections]
    figure = Drawing(6.6, 0.4 + sum(heights))
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    figure.suptitle(report["title"], fontsize=10)
    upper, lower = axes[: len(tops)], axes[len(tops) :]
    for ax, (top, what) in zip(upper, tops, strict=True):
        top(ax, what)
        ax.set_xlabel(what["x"])
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for i, (ax, (heading, rows)) in enumerate(zip(lower, sections, strict=True)):
        _forest(ax, heading, rows, style.SERIES[i % len(style.SERIES)])
    return figure


def save(path: pathlib.Path, report: Mapping[str, Any]) -> None:
    """Writes the picture as PNG."""
    save_figure(path, draw(report))


def _forest(axes, heading: str, rows: list[Mapping[str, Any]], color: str) -> None:
    """Rows from the top down: the seeds as small rings, mean and interval over them."""
    for y, row in enumerate(rows):
        low, mean, high = (1000 * row[key] for key in ("low", "mean", "high"))
        axes.plot([low, high], [y, y], color=color, linewidth=1.4)
        axes.plot([mean], [y], "o", color=color, markersize=4.5)
        seeds = [1000 * value for value in row["seeds"].values()]
        if len(seeds) > 1:
            axes.plot(
                seeds, [y] * len(seeds), "o", color=style.GREY, markersize=3, fillstyle="none"
            )
    axes.set_yticks(range(len(rows)), [row["arm"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_title(heading)
    axes.set_xlabel("millinats a token, lower is better")


def _curves(axes, curves: Mapping[str, Any]) -> None:
    every = [point[0] for points in curves["series"].values() for point in points]
    if every and min(every) > 0 and max(every) > WIDE * min(every):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    for i, (name, points) in enumerate(curves["series"].items()):
        if not points:
            continue
        x, mean, low, high = zip(*sorted(points), strict=True)
        color, dashes = _look(i)
        marker = style.MARKERS[i % len(style.MARKERS)]
        scaled = [[1000 * value for value in values] for values in (mean, low, high)]
        down = [m - v for m, v in zip(scaled[0], scaled[1], strict=True)]
        up = [v - m for m, v in zip(scaled[0], scaled[2], strict=True)]
        drawn = axes.errorbar(x, scaled[0], [down, up], color=color, marker=marker, capsize=2)
        drawn.lines[0].set_dashes(dashes)
        drawn.set_label(name)
    axes.axhline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_ylabel("millinats a token")


def _lines(axes, lines: Mapping[str, Any]) -> None:
    for i, (name, points) in enumerate(lines["series"].items()):
        color, dashes = _look(i)
        axes.plot(*zip(*points, strict=True), color=color, dashes=dashes, linewidth=1.2, label=name)
    axes.set_ylabel(lines["y"])


def _look(i: int) -> tuple[str, tuple[float, ...]]:
    """Colour and dashes of the i-th series."""
    return style.SERIES[i % len(style.SERIES)], style.DASHES[i % len(style.DASHES)] or (1, 0)


TOPS = {"curves": _curves, "lines": _lines}

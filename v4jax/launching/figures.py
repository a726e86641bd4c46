"""The report's figures: a metric over each axis of a sweep, and training losses coloured by it."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from v4jax.launching.charts import MOST, SERIES, Line, Point, chart, sample, thin
from v4jax.launching.printable import clean
from v4jax.launching.results import Group, Results, as_number, curves

POINTS = 2400  # drawn in a figure, so that a page of a large sweep stays a few megabytes

Curves = list[tuple[Mapping[str, str], str, list[Point]]]
"""Of each run: its settings, its name, its (step, loss) pairs."""


def losses(results: Results) -> tuple[dict[str, Curves], list[str]]:
    """Name of a part of the runs -> their training losses; and a line for each file that is
    damaged."""
    found: dict[str, Curves] = {}
    notes = []
    for result in results.results:
        try:
            for part, points in curves(result.run.folder).items():
                found.setdefault(part, []).append((result.run.settings, result.run.name, points))
        except (OSError, ValueError) as error:
            notes.append(str(error))
    return found, notes


def loss_figure(part: str, runs: Curves, axis: str | None, values: Sequence[str] = ()) -> str:
    """A line for every run, by its value of `axis`, of which there are at most `SERIES`."""
    most = min(MOST, max(50, POINTS // len(runs)))
    lines = [
        Line(thin(points, most), name, None if axis is None else _index(values, settings.get(axis)))
        for settings, name, points in runs
    ]
    title = f"{part or 'training'}: loss of its batches" + (f", by {axis}" if axis else "")
    legend = list(enumerate(values)) if axis else []
    longest = max(len(points) for _, _, points in runs)
    marks = longest == 1  # no line to see
    size = math.ceil(longest / most)
    note = "" if size == 1 else f"Each point is the mean of up to {size} logged ones."
    drawn = chart(lines, title, "step", "loss", log_x=False, marks=marks)
    return _figure(title, drawn, legend, note, marks)


def axis_figure(results: Results, axis: str, metric: str) -> str:
    """Means over seeds with their spread; a line for each combination of the other axes.

    An axis that goes with this one, value for value, as in a zip, is no other axis.
    """
    values = results.axes[axis]
    groups = [group for group in results.groups() if axis in group.settings]
    tied = {flag for flag in results.axes if flag != axis and _tied(groups, axis, flag)}
    others = [flag for flag in results.axes if flag != axis and flag not in tied]
    numbers = [as_number(value) for value in values]
    numeric = all(number is not None for number in numbers)
    x = {
        v: float(i if n is None or not numeric else n)
        for i, (v, n) in enumerate(zip(values, numbers, strict=True))
    }
    found: dict[str, list[Group]] = {}
    for group in groups:
        label = ", ".join(f"{flag}={group.settings.get(flag, '')}" for flag in others)
        found.setdefault(label, []).append(group)
    few = len(found) <= SERIES
    lines, left_out = [], 0
    for i, (label, members) in enumerate(found.items()):
        known = [(x[g.settings[axis]], g, s) for g in members if (s := g.summary(metric))]
        known = sorted((k for k in known if math.isfinite(k[2].mean)), key=lambda k: k[0])
        left_out += len(members) - len(known)
        lines.append(
            Line(
                [(at, summary.mean) for at, _, summary in known],
                label or metric,
                i if few else None,
                [summary.spread for _, _, summary in known],
                [(at, y) for at, g, s in known if s.seeds > 1 for y in g.values(metric)],
            )
        )
    title = f"{metric} over {axis}"
    drawn = chart(
        lines, title, axis, metric, None if numeric else values, marks=True,
        connect=not tied or len(values) <= SERIES,
    )  # fmt: skip
    legend = list(enumerate(found)) if few and len(found) > 1 else []
    notes = ["Bars: one standard deviation over seeds; small dots: single seeds."]
    notes = notes if any(s is not None for line in lines for s in line.spreads) else []
    if not few:
        notes.append(f"{len(found)} combinations of the other flags: point at one for its name.")
    if left_out:
        notes.append(f"{left_out} of {len(groups)} settings have no finite value.")
    return _figure(title, drawn, legend, " ".join(notes), True)


def _tied(groups: Sequence[Group], a: str, b: str) -> bool:
    """Whether one value of `a` goes with one of `b`, both ways."""
    pairs = {(group.settings.get(a), group.settings.get(b)) for group in groups}
    return len(pairs) == len({p[0] for p in pairs}) == len({p[1] for p in pairs}) > 1


def _index(values: Sequence[str], value: str | None) -> int | None:
    return values.index(value) if value in values else None


def _figure(
    title: str, drawn: str, legend: Sequence[tuple[int, str]], note: str, marks: bool
) -> str:
    items = "".join(
        f"<li>{sample(series, marks)}{html.escape(clean(label))}</li>" for series, label in legend
    )
    return (
        f"<figure><h3>{html.escape(clean(title))}</h3>{drawn}"
        + (f'<ul class="legend">{items}</ul>' if items else "")
        + (f"<figcaption>{html.escape(note)}</figcaption>" if note else "")
        + "</figure>\n"
    )

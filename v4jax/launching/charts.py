"""Line charts as SVG text, in the report's one style; no library, no script, no network.

Colours and dashes are those of `v4jax/style.py`, lighter on black; each series has a marker of its
own too, so that nothing rests on colour alone. `STYLE` is the CSS that they need; everything else
is in the SVG.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterable, Iterator, Sequence

from v4jax import style

Point = tuple[float, float]

LIGHT, DARK = style.SERIES, style.SERIES_ON_BLACK
DASHES = tuple(" ".join(map(str, dashes)) or "none" for dashes in style.DASHES)
SERIES = 8
"""A chart tells apart at most so many lines; more are drawn alike."""

WIDTH, HEIGHT = 460, 290
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 46
MOST = 300  # points drawn of a line
LARGEST = 1e250  # what is beyond is not drawn, what is below 1 / LARGEST is 0


def _variables(colors: Iterable[str]) -> str:
    return " ".join(f"--c{i}: {color};" for i, color in enumerate(colors))


STYLE = "\n".join(
    [
        f":root {{ {_variables(LIGHT)} }}",
        f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}",
        ".chart { width: 100%; height: auto; font: 12.5px system-ui, sans-serif; }",
        ".chart text { fill: currentColor; }",
        ".chart .grid { stroke: currentColor; opacity: 0.14; }",
        ".chart .axis { stroke: currentColor; opacity: 0.6; fill: none; }",
        ".chart .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }",
        ".chart .line:hover { stroke-width: 4; }",
        ".chart .dot { opacity: 0.55; }",
        *(f".s{i} {{ stroke: var(--c{i}); color: var(--c{i}); }}" for i in range(len(LIGHT))),
        ".mark, .dot { fill: currentColor; stroke: none; }",
    ]
)


@dataclasses.dataclass(frozen=True)
class Line:
    """One series. series: its colour, dashes and marker; None: the first colour, for lines that
    are drawn alike. spreads: half the length of each point's bar. dots: single values."""

    points: Sequence[Point]
    label: str
    series: int | None = None
    spreads: Sequence[float | None] = ()
    dots: Sequence[Point] = ()


@dataclasses.dataclass(frozen=True)
class Scale:
    """From values to pixels. log: where the values are positive and span a factor of ten."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high = self._ends()
        share = ((math.log10(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def _ends(self) -> tuple[float, float]:
        return (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)

    def ticks(self) -> list[float]:
        """Round values within the scale, three to a dozen of them wherever floats allow it."""
        low, high = self._ends()
        if self.log and high - low >= 2:
            every = math.ceil((high - low) / 6)
            exponents = range(math.ceil(low), math.floor(high) + 1)
            return [10.0**e for e in exponents if e % every == 0]
        if self.log:
            decades = range(math.floor(low), math.ceil(high) + 1)
            values = (float(f"{digit}e{e}") for e in decades for digit in (1, 2, 5))
            return [value for value in values if self.low <= value <= self.high]
        rough = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * digit for digit in (1, 2, 2.5, 5, 10) if power * digit >= 0.999 * rough)
        values = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
        return [value for value in dict.fromkeys(values) if low <= value <= high]


def scale(values: Iterable[float], start: float, end: float, log: bool | None = None) -> Scale:
    """A scale with a little room around the finite ones of `values`. log: None decides by them."""
    known = [v if abs(v) > 1 / LARGEST else 0.0 for v in values if _drawable(v)] or [0.0, 1.0]
    low, high = min(known), max(known)
    if log is None:
        log = low > 0 and high >= 10 * low
    if log and low > 0:
        room = 10 ** (0.05 * (math.log10(high) - math.log10(low)))
        return Scale(low / room, high * room, start, end, True)
    # Values that differ only in their last bits are one value.
    room = 0.05 * (high - low)
    if room <= 1e-7 * max(abs(low), abs(high)):
        room = 0.1 * abs(high) or 1.0
    return Scale(low - room, high + room, start, end)


def tick_label(value: float) -> str:
    """Short and exact enough to tell ticks apart: 0.001, 20000, 1e-5, with a true minus sign."""
    text = f"{value:.9g}"
    mantissa, e, exponent = text.partition("e")
    text = f"{mantissa}e{int(exponent)}" if e else mantissa
    return text.replace("-", "\N{MINUS SIGN}")


def thin(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """At most `most` points: the means of equally many neighbours each."""
    size = math.ceil(len(points) / most) or 1
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def chart(
    lines: Sequence[Line],
    title: str,
    x_label: str,
    y_label: str,
    names: Sequence[str] | None = None,
    marks: bool = False,
    connect: bool = True,
    log_x: bool | None = None,
) -> str:
    """The SVG.

    Args:
      title: what a screen reader says; the page shows its own.
      names: of x = 0, 1, ... where x is not a number.
      marks: a marker at each point. connect: lines between them.
      log_x: whether x's axis is; None: where it spans a factor of ten, as y's is.
    """
    xs = [x for line in lines for x, _ in (*line.points, *line.dots)]
    x_scale = scale(xs, LEFT, WIDTH - RIGHT, log_x)
    if names:
        x_scale = Scale(-0.5, len(names) - 0.5, LEFT, WIDTH - RIGHT)
    y_scale = scale(_heights(lines), HEIGHT - BOTTOM, TOP)
    body = [*_frame(x_scale, y_scale, x_label, y_label, names)]
    for line in lines:
        body += _drawn(line, x_scale, y_scale, marks, connect)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(body)}</svg>'
    )


def sample(series: int, marks: bool = False) -> str:
    """A short piece of a series' line, for a legend."""
    marker = _marker(series, 17, 6) if marks else ""
    return (
        f'<svg width="34" height="12" viewBox="0 0 34 12" aria-hidden="true">'
        f'<g class="{_css(series)}"><path class="line" d="M1 6H33" fill="none" stroke-width="2" '
        f'stroke-dasharray="{_dashes(series)}"/>{marker}</g></svg>'
    )


def _drawable(value: float) -> bool:
    return math.isfinite(value) and abs(value) < LARGEST


def _heights(lines: Iterable[Line]) -> list[float]:
    values = []
    for line in lines:
        values += [y for _, y in (*line.points, *line.dots)]
        for (_, y), spread in zip(line.points, line.spreads, strict=False):
            if spread is not None:
                values += [y + spread] + ([y - spread] if y <= 0 or y > spread else [])
    return values


def _frame(
    x: Scale, y: Scale, x_label: str, y_label: str, names: Sequence[str] | None
) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for value in y.ticks():
        at = f"{y.at(value):.1f}"
        yield f'<path class="grid" d="M{LEFT} {at}H{right}"/>'
        yield f'<text x="{LEFT - 6}" y="{at}" dy="4" text-anchor="end">{tick_label(value)}</text>'
    room = (right - LEFT) / max(1, len(names or ())) / 6.6  # letters
    ticks = enumerate(names) if names else ((v, tick_label(v)) for v in x.ticks())
    for value, label in ticks:
        at = f"{x.at(value):.1f}"
        short = label if not names or len(label) <= room else label[: max(1, int(room) - 1)] + "…"
        yield f'<path class="axis" d="M{at} {bottom}v4"/>'
        yield (
            f'<text x="{at}" y="{bottom + 17}" text-anchor="middle">{html.escape(short)}'
            f"<title>{html.escape(label)}</title></text>"
        )
    yield f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>'
    yield (
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{html.escape(_short(x_label + (', log' if x.log else '')))}</text>"
    )
    middle = (TOP + bottom) / 2
    yield (
        f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(_short(y_label + (', log' if y.log else ''), 38))}</text>"
    )


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _css(series: int | None) -> str:
    return f"s{(series or 0) % len(LIGHT)}"


def _dashes(series: int | None) -> str:
    return DASHES[((series or 0) + (series or 0) // len(LIGHT)) % len(DASHES)]


def _drawn(line: Line, x: Scale, y: Scale, marks: bool, connect: bool) -> Iterator[str]:
    """A group: the line in pieces between values that cannot be drawn, its marks, bars and dots."""

    def visible(point: Point) -> bool:
        return all(map(_drawable, point)) and (not y.log or point[1] > 0)

    def bounded(value: float) -> float:
        inside = value > 0 or not y.log
        return min(max(y.at(value) if inside else y.start, TOP), y.start)

    yield f'<g class="{_css(line.series)}"><title>{html.escape(line.label)}</title>'
    path, pen = [], "M"
    for point in line.points if connect else ():
        if not visible(point):
            pen = "M"
            continue
        path.append(f"{pen}{x.at(point[0]):.1f} {y.at(point[1]):.1f}")
        pen = "L"
    if path:
        path_ = "".join(path)
        yield f'<path class="line" stroke-dasharray="{_dashes(line.series)}" d="{path_}"/>'
    for point in line.dots:
        if visible(point):
            yield f'<circle class="dot" r="2" cx="{x.at(point[0]):.1f}" cy="{y.at(point[1]):.1f}"/>'
    for i, point in enumerate(line.points):
        spread = line.spreads[i] if i < len(line.spreads) else None
        if not visible(point) or not marks:
            continue
        if spread is not None and _drawable(spread):
            top, end = bounded(point[1] + spread), bounded(point[1] - spread)
            at = x.at(point[0])
            yield f'<path d="M{at:.1f} {top:.1f}V{end:.1f}m-4 0h8M{at - 4:.1f} {top:.1f}h8"/>'
        yield _marker(line.series or 0, x.at(point[0]), y.at(point[1]))
    yield "</g>"


def _marker(series: int, x: float, y: float) -> str:
    shapes = ("m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "m-3.5-3.5h7v7h-7z", "m0-5l5 8.5h-10z",
              "m0-5l5 5-5 5-5-5z")  # fmt: skip
    return f'<path class="mark" d="M{x:.1f} {y:.1f}{shapes[series % len(shapes)]}"/>'

"""Charts: ticks, scales, gaps, and colours that can be told from what is behind them."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from v4jax.launching import charts
from v4jax.launching.charts import Line, chart, scale, thin, tick_label

finite = st.floats(allow_nan=False, allow_infinity=False)
points = st.lists(st.tuples(st.floats(), st.floats()), max_size=20)


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def texts(svg: str) -> list[str]:
    return [node.text for node in parsed(svg).iter("text")]


def paths(svg: str, kind: str) -> list[str]:
    return [node.get("d") for node in parsed(svg).iter("path") if node.get("class") == kind]


# ---- scales ----


@given(st.lists(finite, min_size=1, max_size=5), st.sampled_from([None, False]))
def test_ticks_are_within_the_scale_in_order_and_neither_few_nor_many(values, log):
    found = scale(values, 10, 110, log)
    ticks = found.ticks()
    assert ticks == sorted(set(ticks)) and 2 <= len(ticks) <= 13
    places = [found.at(tick) for tick in ticks]
    assert all(9.999 <= place <= 110.001 for place in places)
    for value in values:
        if abs(value) < charts.LARGEST and not 0 < abs(value) <= 1 / charts.LARGEST:
            assert 10 <= found.at(value) <= 110


@given(st.floats(1e-200, 1e150), st.floats(1, 1e60))
def test_an_axis_is_logarithmic_from_a_factor_of_ten_on(low, factor):
    found = scale([low, low * factor], 0, 1)
    assert found.log == (low * factor >= 10 * low)
    if found.log:  # equal factors are equal distances
        middle = math.sqrt(low) * math.sqrt(low * factor)
        assert found.at(middle) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("values", [[-1, 100], [0, 100], [5, 5], []])
def test_these_are_linear(values):
    assert not scale(values, 0, 1).log


@pytest.mark.parametrize(
    ("value", "label"),
    [(0.001, "0.001"), (1e-5, "1e−5"), (20000, "20000"), (-0.5, "−0.5"), (0, "0"), (1e9, "1e9"),
     (3 * 0.1, "0.3"), (1e20, "1e20")],
)  # fmt: skip
def test_tick_labels(value, label):
    assert tick_label(value) == label


# ---- lines ----


@example([(1e-249, 1e-249), (1e249, 1e249)], [(5e-324, 1.0)], 0, True, True)
@given(points, points, st.none() | st.integers(0, 30), st.booleans(), st.booleans())
def test_any_values_give_a_picture_within_its_frame(line, dots, series, marks, connect):
    spreads = [y for _, y in line]
    svg = chart(
        [Line(line, "a<b", series, spreads, dots)], "t&t", "x", "y", marks=marks, connect=connect
    )
    assert not re.search("nan|inf", svg.partition(">")[2].replace("Infinity", ""))
    for node in parsed(svg).iter("circle"):
        assert 0 <= float(node.get("cx")) <= charts.WIDTH
        assert 0 <= float(node.get("cy")) <= charts.HEIGHT


def test_a_line_has_a_gap_where_a_value_is_not_finite():
    line = [(1, 1.0), (2, 2.0), (3, math.nan), (4, math.inf), (5, 1.0), (6, 2.0)]
    (path,) = paths(chart([Line(line, "run")], "t", "x", "y"), "line")
    assert path.count("M") == 2 and path.count("L") == 2


def test_bars_dots_and_marks():
    line = Line([(1, 5.0), (2, 6.0)], "a", 0, [1.0, None], [(1, 4.0), (1, 6.0)])
    svg = chart([line], "t", "x", "y", marks=True)
    assert len(paths(svg, "mark")) == 2 and len(list(parsed(svg).iter("circle"))) == 2
    assert len([d for d in paths(svg, None) if "V" in d]) == 1


def test_names_stand_under_their_points_and_long_ones_are_cut_but_kept_whole():
    names = ["muon", "adamw", "a name that is far longer than its place under the axis allows"]
    svg = chart([Line([(0, 1), (1, 2), (2, 3)], "l")], "t", "optimizer", "loss", names)
    shown = texts(svg)
    assert "muon" in shown and "adamw" in shown and names[2] not in shown
    assert names[2] in [node.text for node in parsed(svg).iter("title")]


@given(st.lists(st.floats(-1e6, 1e6), max_size=400), st.integers(1, 50))
def test_thinning_keeps_the_mean_and_the_order(values, most):
    line = list(enumerate(values))
    found = thin(line, most)
    assert len(found) <= most and [x for x, _ in found] == sorted(x for x, _ in found)
    if values and len(values) % len(found) == 0 and len(values) <= most * len(found):
        size = -(-len(values) // most)
        if len(values) % size == 0:
            mean = sum(values) / len(values)
            assert sum(y for _, y in found) / len(found) == pytest.approx(mean, abs=1e-6)
    if len(values) <= most:
        assert found == line


# ---- the style ----


def luminance(color: str) -> float:
    """WCAG 2's relative luminance."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    ("colors", "surface"), [(charts.LIGHT, "#ffffff"), (charts.DARK, "#16181c")]
)
def test_every_series_stands_out_from_the_page(colors, surface):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert all(contrast(color, surface) >= 3 for color in colors)


def test_no_two_series_share_colour_and_dashes():
    looks = {(charts._css(i), charts._dashes(i)) for i in range(24)}
    assert len(looks) == 24
    assert len({charts._dashes(i) for i in range(4)}) == 4  # neighbours differ without colour too

"""Errors of the formats agree with those printed for them; the toy shows what its text says."""

import numpy as np
import pytest

from v4jax.analysis import rounding
from v4jax.analysis.toy_switch import Toy, train
from v4jax.numerics import FP8_1X128, MXFP4, MXFP4_EVEN, MXFP4_FLOOR, NVFP4


@pytest.mark.parametrize(
    ("fmt", "kind", "decibels"),
    [  # measured once in numpy float64 over millions of values, without v4jax
        (MXFP4, "Gaussian", 18.76), (MXFP4, "Laplace", 17.58), (MXFP4, "Student t, 5", 17.56),
        (MXFP4, "uniform", 20.10), (MXFP4_FLOOR, "Gaussian", 18.79),
        (MXFP4_EVEN, "Gaussian", 19.03), (NVFP4, "Gaussian", 20.44), (FP8_1X128, "Gaussian", 31.5),
    ],
)  # fmt: skip
def test_signal_to_noise(fmt, kind, decibels):
    found = rounding.signal_to_noise(rounding.samples(kind), fmt)
    assert found == pytest.approx(decibels, abs=0.06)


def test_a_rotation_helps_outliers_and_not_gaussians():
    gain = {}
    for kind in ("Gaussian", "outliers"):
        x = rounding.samples(kind)
        gain[kind] = rounding.signal_to_noise(x, MXFP4, True) - rounding.signal_to_noise(x)
    assert abs(gain["Gaussian"]) < 0.1 and gain["outliers"] > 3


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="unknown kind 'cauchy', allowed: uniform"):
        rounding.samples("cauchy")


def test_qat_beats_ptq_where_errors_can_cancel_and_loses_where_not():
    for loudness, wins in ((2.0, True), (0.0, False)):
        for seed in (0, 1):
            toy = Toy(loudness=loudness, seed=seed)
            control, qat = train(toy, None), train(toy, MXFP4)
            np.testing.assert_allclose(
                qat.losses[: toy.switch], control.losses[: toy.switch], rtol=1e-3, atol=1e-9
            )
            assert (qat.rounded_loss < control.rounded_loss) == wins
            assert control.loss < min(control.rounded_loss, qat.rounded_loss)


def test_the_figures_draw():
    assert len(rounding.draw_grid().axes) == 2
    assert len(rounding.draw_grid(NVFP4).axes) == 2
    assert len(rounding.draw_block(rounding.samples("outliers", 1, 32)[0]).axes) == 2
    drawn = rounding.draw_errors({"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0, "y": 4.0}})
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["x", "y"]
    drawn = rounding.draw_switch({"exact": [1.0, 0.5, 0.2], "QAT": [0.4]}, 2, {"PTQ": 0.3})
    lines = drawn.axes[0].lines
    assert list(lines[1].get_xdata()) == [3]  # the shorter ends where the longer does

"""Folding MXFP4 rows into FP8: exact for all elements and spreads where it says so, and it does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas.fold import fold
from v4jax.numerics import MXFP4, NVFP4, Quantized, dequantize, quantize

ELEMENTS = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn)  # both signs of 0 to 6


def quantized(codes: np.ndarray, values: np.ndarray | None = None) -> Quantized:
    """Blocks that hold every element twice, with these E8M0 codes [..., blocks]."""
    shape = (*codes.shape[:-1], 32 * codes.shape[-1])
    if values is None:
        values = np.broadcast_to(np.tile(ELEMENTS, 2), (*codes.shape, 32)).reshape(shape)
    scales = codes.astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)
    return Quantized(jnp.asarray(values), jnp.asarray(scales), None, MXFP4)


def folded(q: Quantized):
    out = jax.jit(fold)(q)
    return out, np.asarray(out.values, np.float64) * np.asarray(out.scale, np.float64)[..., None]


@pytest.mark.parametrize("top", [30, 127, 200, 252])
def test_every_element_at_every_spread(top):
    spread = np.arange(0, 25)
    q = quantized(np.stack([np.full_like(spread, top), top - spread], axis=-1))
    out, values = folded(q)
    exact = np.asarray(dequantize(q), np.float64)
    np.testing.assert_array_equal(np.asarray(out.exact), spread <= 14)
    np.testing.assert_array_equal(np.asarray(out.exact), (values == exact).all(-1))
    np.testing.assert_array_equal(values[spread <= 14], exact[spread <= 14])
    assert np.abs(values - exact).max() <= 2.0**-10 * np.asarray(out.scale, np.float64).max()
    signs = np.signbit(np.asarray(out.values, np.float32)), np.signbit(np.asarray(dequantize(q)))
    np.testing.assert_array_equal(*signs)  # of zeros too


def test_small_blocks_of_large_elements_lie_further_down():
    six = np.full((1, 64), 6, ml_dtypes.float4_e2m1fn)
    for spread in range(14, 22):
        out, values = folded(quantized(np.array([[140, 140 - spread]]), six))
        assert bool(out.exact[0]) == (spread <= 16)  # 6 * 2^-10 = 3 * 2^-9, of E4M3's grid
        assert bool(out.exact[0]) == (values[0, 32:] == 6 * 2.0 ** (13 - spread)).all()


def test_blocks_of_zeros_have_no_say():
    values = np.zeros((2, 64), ml_dtypes.float4_e2m1fn)
    values[0, 40] = 3
    out, rows = folded(quantized(np.array([[1, 127], [1, 1]]), values))
    assert np.asarray(out.exact).all()
    np.testing.assert_array_equal(rows, values.astype(np.float64))


def test_nan_is_not_exact():
    x = np.ones((2, 64), np.float32)
    x[1, 3] = np.nan
    out = fold(quantize(jnp.asarray(x)))
    np.testing.assert_array_equal(np.asarray(out.exact), [True, False])
    assert not np.isnan(np.asarray(out.values, np.float32)).any()


@pytest.mark.parametrize("outliers", [1, 20])
def test_random_rows_are_exact(outliers):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 128)).astype(np.float32)
    x[:, :4] *= outliers
    q = quantize(jnp.asarray(x))
    out, values = folded(q)
    assert np.asarray(out.exact).all()
    np.testing.assert_array_equal(values, np.asarray(dequantize(q), np.float64))
    mantissa, _ = np.frexp(np.asarray(out.scale))
    assert (mantissa == 0.5).all()


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match="fold: nvfp4 is not made of E2M1 with E8M0 scales"):
        fold(quantize(jnp.ones((2, 32)), NVFP4))

"""Rounding to one of two neighbours, against a search of the grid in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.numerics import (
    FORMATS,
    MXFP4,
    MXFP4_FLOOR,
    NVFP4,
    dequantize,
    fake_quantize,
    take_apart,
)
from v4jax.numerics import quantize as encode
from v4jax.numerics import quantize_stochastically as draw
from v4jax.numerics import quantize_toward as toward

GRID = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
FP4 = [fmt for fmt in FORMATS.values() if fmt.bits == 4]
draw = jax.jit(draw, static_argnums=2)
toward = jax.jit(toward, static_argnums=2)


def weights(seed, shape=(4, 64)):
    rng = np.random.default_rng(seed)
    w = rng.standard_t(3, shape).astype(np.float32)
    w[0, :6], w[1, 32:] = [0, -0.0, 1, 0.25, 0.75, -2.5], w[1, 32:] * 1e-3
    return w


def neighbours(w, fmt):
    """(lower, upper) values of the format around each element, and its scale, float64 [m, n]."""
    q = encode(jnp.asarray(w), fmt)
    scale = np.repeat(np.asarray(q.scales, np.float64), fmt.tile[-1], axis=-1)
    if q.tensor_scale is not None:
        scale = scale * np.float64(q.tensor_scale)
    low, high = np.empty(w.shape), np.empty(w.shape)
    for index, x in np.ndenumerate(w.astype(np.float64) / scale):
        low[index] = max([g for g in GRID if g <= x], default=-6)
        high[index] = min([g for g in GRID if g >= x], default=6)
    return low * scale, high * scale, scale


@pytest.mark.parametrize("fmt", FP4, ids=lambda fmt: fmt.name)
def test_toward_itself_is_rounding_to_nearest(fmt):
    w = weights(0)
    assert np.array(toward(w, w, fmt)).tobytes() == np.array(fake_quantize(w, fmt)).tobytes()


@pytest.mark.parametrize("fmt", [MXFP4, MXFP4_FLOOR, NVFP4], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("distance", [0.1, 3.0])
def test_toward_takes_the_neighbour_that_is_nearer_to_the_target(fmt, distance):
    w, rng = weights(1), np.random.default_rng(2)
    target = (w + distance * rng.standard_normal(w.shape)).astype(np.float32)
    low, high, scale = neighbours(w, fmt)
    expected = np.where(np.abs(target - low) < np.abs(high - target), low, high)
    np.testing.assert_allclose(toward(w, target, fmt), expected, rtol=1e-6)
    nearest = np.where(np.abs(w - low) < np.abs(high - w), low, high)
    assert 5 < (expected != nearest).sum() < 0.7 * w.size
    assert ((target < low) | (target > high)).any()


@pytest.mark.parametrize("fmt", [MXFP4, MXFP4_FLOOR, NVFP4], ids=lambda fmt: fmt.name)
def test_drawn_values_are_neighbours_and_their_mean_is_the_weight(fmt):
    w, draws = weights(3), 4000
    uniform = jax.random.uniform(jax.random.key(0), (draws, *w.shape))
    found = np.asarray(jax.vmap(lambda u: draw(w, u, fmt))(uniform), np.float64)
    low, high, scale = neighbours(w, fmt)
    up = np.abs(found - high) < np.abs(found - low)
    np.testing.assert_allclose(found, np.where(up, high, low), rtol=1e-6)
    p = np.where(high > low, (w - low) / np.where(high > low, high - low, 1), 0)
    np.testing.assert_allclose(up.mean(axis=0), p, atol=5.5 * 0.5 / np.sqrt(draws))
    bound = 5.5 * np.sqrt(p * (1 - p) / draws) * (high - low) + 1e-6 * scale
    inside = np.abs(w) <= 6 * scale
    assert (np.abs(found.mean(axis=0) - w) <= bound)[inside].all()
    assert (up != up[0]).any(axis=0)[(p > 0.01) & (p < 0.99)].all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_poisoned_block_stays_poisoned(bad):
    w = weights(0)
    w[2, 3] = bad
    for found in (toward(w, np.ones_like(w), MXFP4), draw(w, np.full_like(w, 0.5), MXFP4)):
        assert np.isnan(found[2, :32]).all() and np.isfinite(np.delete(found, 2, 0)).all()


@pytest.mark.parametrize("fmt", FP4, ids=lambda fmt: fmt.name)
def test_what_is_taken_apart_is_what_is_stored(fmt):
    w = weights(4)
    element, scale, product = jax.jit(take_apart, static_argnums=1)(w, fmt)
    q = encode(jnp.asarray(w), fmt)
    np.testing.assert_array_equal(element, np.asarray(q.values, np.float32))
    whole = np.repeat(np.asarray(q.scales, np.float32), fmt.tile[-1], axis=-1)
    if q.tensor_scale is not None:
        whole = whole * np.asarray(q.tensor_scale)
    np.testing.assert_array_equal(scale, whole)
    assert np.asarray(product).tobytes() == np.asarray(dequantize(q)).tobytes()

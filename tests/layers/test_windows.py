"""Row moves whose gradients are gathers, against jax's own through scatters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.visibility import is_visible
from v4jax.layers.context import sample_positions
from v4jax.layers.experts import collect, dispatch
from v4jax.layers.windows import Windows, move_rows


def test_sample_positions():
    segments = jnp.asarray([[1, 1, 2, 2, 2, 3, 0, 0], [0, 1, 1, 1, 0, 2, 2, 2]])
    expected = [[0, 1, 0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 0, 0, 1, 2]]
    np.testing.assert_array_equal(sample_positions(segments), expected)


@pytest.mark.parametrize("rate", [1, 2, 3, 5, 8])
def test_packed_windows_against_a_loop(rate):
    rng = np.random.default_rng(rate)
    segments = np.repeat(rng.permutation(12)[:6], [5, 1, 3, 8, 2, 5])[None]  # any ids; 0 is padding
    length = segments.shape[1]
    windows = Windows.make(
        rate, sample_positions(jnp.asarray(segments)), jnp.asarray(segments, jnp.int32)
    )
    borders = [0, *(np.flatnonzero(np.diff(segments[0])) + 1), length]
    expected = []  # tokens, first in its sample?, position
    for start, end in zip(borders[:-1], borders[1:], strict=True):
        for w in range((end - start) // rate):
            expected.append((start + w * rate, w == 0, w * rate))
    x = np.arange(1, length + 1, dtype=np.float32)[None, :, None]
    split = np.asarray(windows.split(jnp.asarray(x)))[0, :, :, 0]
    visible = np.asarray(is_visible(*windows.seen, length // rate))[0]
    assert split.shape == (length // rate, rate)
    for entry in range(length // rate):
        if entry >= len(expected):
            assert not split[entry].any() and not visible[:, entry].any()
            continue
        start, first, position = expected[entry]
        np.testing.assert_array_equal(split[entry], x[0, start : start + rate, 0])
        assert windows.first[0, entry] == first and windows.position[0, entry] == position
        same = segments[0] == segments[0, start]
        seen = same & (np.arange(length) >= start + rate - 1)
        np.testing.assert_array_equal(visible[:, entry], seen)


def test_move_rows_gradient():
    source = jnp.asarray([[3, -1, 0, 4, -1], [1, 2, -1, -1, 0]])
    target = np.full((2, 6), -1)
    for b, i in np.argwhere(np.asarray(source) >= 0):
        target[b, source[b, i]] = i
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 3)), jnp.float32)

    def plain(x):
        return jnp.where((source < 0)[..., None], 0, x[jnp.arange(2)[:, None], source])

    def moved(x):
        return move_rows(x, source, jnp.asarray(target))

    np.testing.assert_array_equal(moved(x), plain(x))
    for function in (moved, plain):
        assert function(x).shape == (2, 5, 3)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 3)), jnp.float32)
    gradient, expected = (
        jax.grad(lambda x, f=f: jnp.sum(weights * f(x)))(x) for f in (moved, plain)
    )
    np.testing.assert_array_equal(gradient, expected)


def test_dispatch_and_collect_gradients():
    rng = np.random.default_rng(0)
    ids = jnp.asarray([rng.permutation(4)[:3] for _ in range(7)])  # [P, K]
    order = jnp.argsort(ids.reshape(-1), stable=True)
    place = jnp.argsort(order).reshape(7, 3)
    x = jnp.asarray(rng.standard_normal((7, 5)), jnp.float32)
    y = jnp.asarray(rng.standard_normal((21, 5)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((21, 5)), jnp.float32)

    rows = dispatch(x, order, place)
    np.testing.assert_array_equal(rows, x[order // 3])
    np.testing.assert_array_equal(collect(rows, place, order), jnp.repeat(x[:, None], 3, axis=1))
    gradient = jax.grad(lambda x: jnp.sum(weights * dispatch(x, order, place)))(x)
    expected = jax.grad(lambda x: jnp.sum(weights * x[order // 3]))(x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)
    gradient = jax.grad(lambda y: jnp.sum(weights.reshape(7, 3, 5) * collect(y, place, order)))(y)
    expected = jax.grad(lambda y: jnp.sum(weights.reshape(7, 3, 5) * y[place]))(y)
    np.testing.assert_array_equal(gradient, expected)

"""Every implementation of the experts' grouped matmul against a float64 loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import expert_matmul
from kernels_pallas.expert_matmul import IMPLEMENTATIONS, TILE

# Group sizes and rows in x: empty experts, one that takes all, tails beside the tile's size, rows
# that belong to no expert.
GROUPS = {
    "ragged": ([3, 0, TILE + 6, 5], None),
    "one takes all": ([0, 2 * TILE + 1, 0], None),
    "whole tiles": ([TILE, TILE], None),
    "a row short, a row more": ([TILE - 1, TILE + 1, 1], None),
    "fewer than rows": ([5, 0, TILE, 2], 2 * TILE),
    "none": ([0, 0], 3),
}
DEPTH, WIDTH = 12, 7


def expected(x, w, sizes, g):
    """y, dx and dw of sum(g * y) in float64."""
    y, dx, dw = np.zeros((len(x), w.shape[1])), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for expert, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows] = x[rows] @ w[expert].T
        dx[rows] = g[rows] @ w[expert]
        dw[expert] = g[rows].T @ x[rows]
        start += size
    return y, dx, dw


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_value_and_gradients(implementation, name, dtype):
    sizes, total = GROUPS[name]
    total = sum(sizes) if total is None else total
    rng = np.random.default_rng(total)
    shapes = ((total, DEPTH), (len(sizes), WIDTH, DEPTH), (total, WIDTH))
    x, w, g = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)

    @jax.jit
    def run(x, w, g):
        y, pull = jax.vjp(
            lambda x, w: expert_matmul(x, w, jnp.asarray(sizes), implementation=implementation),
            x,
            w,
        )
        return y, *pull(g)

    exact = expected(*(np.asarray(a, np.float64) for a in (x, w)), sizes, np.asarray(g, np.float64))
    tolerance = 1e-5 if dtype == "float32" else 2**-8
    for actual, value in zip(run(x, w, g), exact, strict=True):
        assert actual.dtype == dtype
        scale = np.abs(value).max(initial=1e-30)
        np.testing.assert_allclose(
            np.asarray(actual, np.float64), value, rtol=0, atol=tolerance * scale
        )


def test_sizes_may_be_traced():
    x, w = jnp.ones((4, 3)), jnp.ones((2, 5, 3)) * jnp.asarray([1.0, 2.0])[:, None, None]
    run = jax.jit(expert_matmul)
    for sizes in ([1, 3], [4, 0], [0, 2]):
        rows = [3.0] * sizes[0] + [6.0] * sizes[1]
        rows += [0.0] * (4 - len(rows))
        np.testing.assert_allclose(run(x, w, jnp.asarray(sizes))[:, 0], rows)


@pytest.mark.parametrize(
    ("shapes", "implementation", "message"),
    [
        (((4, 3), (2, 5, 4), (2,)), None, r"\(4, 3\), \(2, 5, 4\), \(2,\)"),
        (((4, 3), (2, 5, 3), (3,)), None, "do not fit"),
        (((4, 3), (2, 5, 3), (2,)), "fast", "implementation='fast', allowed: None, loop, ragged"),
    ],
)
def test_bad_input_ends_in_one_line(shapes, implementation, message):
    x, w = jnp.zeros(shapes[0]), jnp.zeros(shapes[1])
    with pytest.raises(ValueError, match=message) as error:
        expert_matmul(x, w, jnp.zeros(shapes[2], jnp.int32), implementation=implementation)
    assert "\n" not in str(error.value)

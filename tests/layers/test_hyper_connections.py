"""Sinkhorn's scaled form and its own backward pass against the loop as written in the report."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.layers.hyper_connections import sinkhorn


def naive(k, iterations, eps):
    """[M, M, ...]: columns, then (rows, columns) iterations - 1 times; sums plus eps."""
    k = k / (k.sum(axis=0, keepdims=True) + eps)
    for _ in range(iterations - 1):
        k = k / (k.sum(axis=1, keepdims=True) + eps)
        k = k / (k.sum(axis=0, keepdims=True) + eps)
    return k


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_sinkhorn(iterations, eps, streams):
    rng = np.random.default_rng(iterations)
    k = np.exp(rng.standard_normal((streams, streams, 3, 5)))
    weights = rng.standard_normal(k.shape)
    single = jnp.asarray(k, jnp.float32)

    value = jax.jit(sinkhorn, static_argnums=(1, 2))(single, iterations, eps)
    np.testing.assert_allclose(value, naive(k, iterations, eps), rtol=2e-6)

    def weighted(function):
        return jax.jit(jax.grad(lambda k: jnp.sum(weights * function(k, iterations, eps))))(single)

    # Of the loop, by jax: central differences of the float64 loop are no better than float32.
    expected = weighted(naive)
    # With one stream it is what rounding leaves of terms as large as weights / k.
    atol = 1e-5 * np.abs(expected).max() + 1e-6 * np.abs(weights / k).max()
    np.testing.assert_allclose(weighted(sinkhorn), expected, rtol=0, atol=atol)


def test_gradient_by_central_differences():
    rng = np.random.default_rng(0)
    k, weights = np.exp(rng.standard_normal((3, 3))), rng.standard_normal((3, 3))
    step, numeric = 1e-6, np.zeros((3, 3))
    for at in np.ndindex(3, 3):
        moved = [k.copy(), k.copy()]
        moved[0][at] += step
        moved[1][at] -= step
        up, down = (np.sum(weights * naive(m, 2, 1e-2)) for m in moved)
        numeric[at] = (up - down) / (2 * step)
    single = jnp.asarray(k, jnp.float32)
    gradient = jax.grad(lambda k: jnp.sum(weights * sinkhorn(k, 2, 1e-2)))(single)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-6)

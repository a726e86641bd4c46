"""Sinkhorn's scaled form and its own backward pass against the loop as written in the report."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.layers.hyper_connections import Constants, mix, read, sinkhorn


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


def layer_as_written(streams, fn, base, scale, c: Constants):
    """One layer whose output is the square of its input, by equations 1 to 8 and plain autodiff."""
    m = len(streams)
    flat = jnp.concatenate(streams, axis=-1)
    flat = flat / jnp.sqrt(jnp.mean(flat**2, axis=-1, keepdims=True) + c.norm_eps)
    z = jnp.einsum("BTX,OX->OBT", flat, fn)
    base = base[:, None, None]
    a = jax.nn.sigmoid(z[:m] * scale[0] + base[:m]) + c.hc_eps
    post = 2 * jax.nn.sigmoid(z[m : 2 * m] * scale[1] + base[m : 2 * m])
    comb = (z[2 * m :] * scale[2] + base[2 * m :]).reshape(m, m, *z.shape[1:])
    comb = naive(jax.nn.softmax(comb, axis=1) + c.hc_eps, c.iterations, c.hc_eps)
    stacked = jnp.stack(streams)
    y = jnp.einsum("MBT,MBTD->BTD", a, stacked) ** 2
    return jnp.einsum("KBT,BTD->KBTD", post, y) + jnp.einsum("JKBT,JBTD->KBTD", comb, stacked)


def test_every_product_is_one_of_float32_on_every_platform():
    """The backward pass too, which is traced outside what surrounds the forward pass."""
    streams = (jnp.ones((2, 3, 8)),) * 2
    maps = jnp.ones((8, 16)), jnp.ones(8), jnp.ones(3)

    def total(streams, *maps):
        with jax.default_matmul_precision("highest"):
            x, post, comb = read(streams, *maps, Constants(2, 1e-2, 1e-3))
            return sum(jnp.sum(s) for s in mix(streams, x**2, post, comb))

    text = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(streams, *maps))
    products = text.split("dot_general[")[1:]
    assert len(products) == 3
    for product in products:
        assert product.split("precision=")[1].startswith("(Precision.HIGHEST, Precision.HIGHEST)")


@pytest.mark.parametrize("m", [1, 2, 4])
def test_gradient_of_a_layer(m):
    """The hand-written backward passes of `read` and `mix` against autodiff of the equations."""
    rng = np.random.default_rng(m)
    constants = Constants(iterations=3, hc_eps=1e-2, norm_eps=1e-3)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    streams = tuple(normal(2, 3, 8) for _ in range(m))
    fn, base, scale = normal((2 + m) * m, m * 8), normal((2 + m) * m), normal(3)
    weights = normal(m, 2, 3, 8)

    def layer(streams, fn, base, scale):
        x, post, comb = read(streams, fn, base, scale, constants)
        return jnp.stack(mix(streams, x**2, post, comb))

    def graded(f):
        total = jax.value_and_grad(lambda *args: jnp.sum(weights * f(*args)), argnums=(0, 1, 2, 3))
        return jax.jit(total)(streams, fn, base, scale)

    expected = graded(lambda *args: layer_as_written(*args, constants))
    for value, right in zip(*map(jax.tree.leaves, (graded(layer), expected)), strict=True):
        np.testing.assert_allclose(value, right, rtol=1e-4, atol=2e-5 * np.abs(right).max())

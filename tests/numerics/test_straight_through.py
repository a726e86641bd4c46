"""The derivative of fake_quantize is the identity, exactly and under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.numerics.bits import assert_same
from v4jax.numerics import FORMATS, FP8_128X128, MXFP4, fake_quantize

every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def inputs(dtype):
    """x with zeros, saturated (for some rules) and poisoned elements; an awkward cotangent."""
    rng = np.random.default_rng(0)
    x = rng.standard_t(2, (4, 128)).astype(np.float32)
    x[0, :32], x[1, 3], x[2, 7] = 0, np.nan, np.inf
    cotangent = rng.standard_t(1, (4, 128)).astype(np.float32)
    # What a cast to E2M1 or E4M3 would change: 0.5, -0, 6, 6, NaN, 0.
    cotangent[3, :6] = [0.3, -0.1, 7.7, 100, 1e6, 1e-30]
    return jnp.asarray(x, dtype), jnp.asarray(cotangent, dtype)


@every_format
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_is_the_cotangent(fmt, dtype):
    x, cotangent = inputs(dtype)
    pull = jax.jit(lambda x, c: jax.vjp(lambda x: fake_quantize(x, fmt), x)[1](c)[0])
    assert_same(pull(x, cotangent), cotangent)
    push = jax.jit(lambda x, t: jax.jvp(lambda x: fake_quantize(x, fmt), (x,), (t,))[1])
    assert_same(push(x, cotangent), cotangent)


@pytest.mark.parametrize("fmt", [MXFP4, FP8_128X128], ids=lambda f: f.name)
def test_gradient_reaches_through_what_surrounds_it(fmt):
    x, weights = inputs(jnp.float32)
    x = jnp.nan_to_num(x, posinf=1.0)

    def loss(x):
        return jnp.sum(jnp.square(fake_quantize(x, fmt)) * weights)

    expected = 2 * fake_quantize(x, fmt) * weights
    for gradient in (
        jax.grad(loss),
        jax.jit(jax.grad(loss)),
        jax.jit(jax.grad(jax.checkpoint(loss))),
        jax.jit(lambda x: jax.vmap(jax.grad(loss))(x[None])[0]),
    ):
        np.testing.assert_allclose(gradient(x), expected, rtol=1e-6)


def test_gradient_in_a_scan_with_remat():
    layers = jnp.asarray(np.random.default_rng(1).standard_normal((3, 32, 32)), jnp.float32)
    x = jnp.ones((2, 32))

    def loss(layers, quantize):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ quantize(w).T), None))
        return jnp.sum(jax.lax.scan(body, x, layers)[0])

    rounded = fake_quantize(layers)
    expected = jax.jit(jax.grad(lambda w: loss(w, lambda w: w)))(rounded)
    actual = jax.jit(jax.grad(lambda w: loss(w, fake_quantize)))(layers)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)
    assert np.abs(expected).max() > 0


def test_second_derivatives_pass():
    x = jnp.asarray(np.random.default_rng(2).standard_normal(32), jnp.float32)
    rounded = fake_quantize(x)
    hessian = jax.jit(jax.hessian(lambda x: jnp.sum(fake_quantize(x) ** 3)))(x)
    np.testing.assert_allclose(hessian, np.diag(6 * rounded), rtol=1e-6)


def test_the_format_may_be_named_and_defaults_to_mxfp4():
    x, _ = inputs(jnp.float32)
    assert_same(fake_quantize(x, fmt=MXFP4), fake_quantize(x))

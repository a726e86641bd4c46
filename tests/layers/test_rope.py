"""Frequency tables and the rotation against independent formulas."""

from __future__ import annotations

import cmath
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference
from v4jax.layers import rope


def yarn(beta_fast=32.0, length=65536):
    return SimpleNamespace(
        factor=16.0, beta_fast=beta_fast, beta_slow=1.0, original_max_position_embeddings=length
    )


# name: rotated dims, theta, scaling
YARN = {
    "released": (64, 1.6e5, yarn()),
    "short": (8, 1.6e5, yarn(length=64)),
    # Its ramp ends at min(ceil(5.8), r - 1) = 6, beyond the last pair, r/2 - 1 = 3.
    "ramp past the pairs": (8, 10.0, yarn(length=180)),
    "ramp of no width": (8, 1.6e5, yarn(beta_fast=1.0, length=6)),
}


def config(r, theta, scaling):
    return SimpleNamespace(
        qk_rope_head_dim=r, rope_theta=1e4, compress_rope_theta=theta, rope_scaling=scaling
    )


@pytest.mark.parametrize("name", YARN)
def test_yarn_table(name):
    cfg = config(*YARN[name])
    expected = reference.rope_frequencies(cfg, reference.CSA)
    np.testing.assert_allclose(rope.compress_frequencies(cfg), expected, rtol=1e-6)
    plain = 1e4 ** (-2 * np.arange(cfg.qk_rope_head_dim // 2) / cfg.qk_rope_head_dim)
    np.testing.assert_allclose(rope.main_frequencies(cfg), plain, rtol=1e-6)


def test_the_ramp_is_exercised():
    """Else a wrong upper end of the ramp (r/2 - 1 for r - 1) would pass."""
    r, theta, scaling = YARN["ramp past the pairs"]
    frequencies = rope.compress_frequencies(config(r, theta, scaling))
    slowed = theta ** (-2 * np.arange(r // 2) / r) / frequencies
    assert 1.5 < slowed[-1] < 3  # at the wrong end it would be 16


def test_rotation_is_multiplication_by_a_complex_number():
    frequencies = np.asarray([1.0, 0.1], np.float32)
    x = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)
    positions = np.asarray([0, 1, 50])
    rotary = rope.table(jnp.asarray(positions), frequencies)
    turned = np.asarray(rope.rotate(jnp.asarray(x), rotary))
    np.testing.assert_array_equal(turned[:, :3], x[:, :3])
    for t, position in enumerate(positions):
        for i, frequency in enumerate(frequencies):
            pair = complex(*x[t, 3 + 2 * i : 5 + 2 * i]) * cmath.exp(1j * position * frequency)
            np.testing.assert_allclose(
                turned[t, 3 + 2 * i : 5 + 2 * i], [pair.real, pair.imag], atol=1e-5
            )
    back = rope.rotate(jnp.asarray(turned), rotary, inverse=True)
    np.testing.assert_allclose(back, x, atol=1e-6)


def test_the_gradient_is_the_transpose():
    """<rotate(x), g> = <x, gradient> for random x and g, in float64 on the host."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.standard_normal((2, 3, 6)), jnp.float32) for _ in range(2))
    rotary = rope.table(jnp.asarray(rng.integers(0, 50, (2, 3))), np.float32([0.3, 0.05]))
    for inverse in (False, True):
        y, vjp = jax.vjp(lambda x, i=inverse: rope.rotate(x, rotary, inverse=i), x)
        (back,) = vjp(g)
        assert np.abs(np.asarray(y) - np.asarray(x)).max() > 0.1
        forward = np.sum(np.float64(y) * np.float64(g))
        np.testing.assert_allclose(forward, np.sum(np.float64(x) * np.float64(back)), rtol=1e-5)

"""hadamard against the definition of Sylvester's matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.numerics.bits import assert_same
from v4jax.numerics import MXFP4, fake_quantize, hadamard


def sylvester(n: int) -> np.ndarray:
    """Orthonormal: H[i, j] = (-1)^(number of ones that i and j share) / sqrt(n)."""
    return np.array([[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)]) / np.sqrt(
        n
    )


@pytest.mark.parametrize("n", [1, 2, 16, 32, 64, 128])
def test_is_the_orthonormal_sylvester_matrix(n):
    matrix = jax.jit(hadamard)(jnp.eye(n))
    np.testing.assert_allclose(matrix, sylvester(n), rtol=1e-7)
    x = np.random.default_rng(0).standard_normal((3, 5, n)).astype(np.float32)
    y = jax.jit(hadamard)(x)
    np.testing.assert_allclose(y, x.astype(np.float64) @ sylvester(n), atol=1e-5)
    np.testing.assert_allclose(hadamard(y), x, atol=1e-5)


def test_gradient_is_the_rotation_itself():
    x, cotangent = np.random.default_rng(1).standard_normal((2, 4, 64)).astype(np.float32)
    (pulled,) = jax.vjp(hadamard, x)[1](cotangent)
    np.testing.assert_allclose(pulled, cotangent @ sylvester(64), atol=1e-5)


def test_computes_in_float32_and_returns_the_dtype():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((4, 128)), jnp.bfloat16)
    y = hadamard(x)
    assert y.dtype == jnp.bfloat16
    assert_same(y, hadamard(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_rotation_saves_the_neighbours_of_an_outlier():
    x = np.random.default_rng(3).standard_normal((256, 128)).astype(np.float32)
    x[:, 7] = 40
    neighbours = np.delete(np.arange(32), 7)  # they share its block

    def error(y):
        return np.mean(np.square(y - x)[:, neighbours])

    alone = error(fake_quantize(x, MXFP4))
    rotated = error(hadamard(fake_quantize(hadamard(x), MXFP4)))
    assert rotated < 0.25 * alone


@pytest.mark.parametrize("n", [0, 12, 96])
def test_other_sizes_are_refused(n):
    with pytest.raises(ValueError, match=rf"shape \(2, {n}\) is not a power of two"):
        hadamard(jnp.zeros((2, n)))

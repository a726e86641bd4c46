"""The Walsh-Hadamard rotation, which spreads an outlier over all channels before quantization."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def hadamard(x: Array) -> Array:
    """x @ H / sqrt(n) along the last axis, [..., n] with n a power of two; ValueError otherwise.

    H is Sylvester's matrix in natural order, without random signs, as released: symmetric and, once
    scaled, its own inverse. Computed in float32 and cast back to x's dtype. A matmul: for n <= 128
    it is faster than the log2(n) stages of a butterfly, on a CPU too.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"hadamard: the last axis of shape {x.shape} is not a power of two")
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    rotated = jnp.dot(x.astype(jnp.float32), matrix, precision=lax.Precision.HIGHEST)
    return (rotated * np.float32(n**-0.5)).astype(x.dtype)

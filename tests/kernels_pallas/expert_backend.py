"""What a back end of expert_matmul computes, and the check that two back ends' tests share."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.planar import to_planar
from v4jax.numerics import MXFP4, dequantize, pack, quantize


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


def operands(shape: tuple[int, int, int, int], dtype: str, packed: bool):
    """x, dy, w as the kernels take it, and what its numbers are, float64 [E, N, K].

    shape: tokens T, experts E, outputs N, inputs K.
    """
    total, experts, n, k = shape
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((total, k)), dtype)
    dy = jnp.asarray(rng.standard_normal((total, n)), dtype)
    w = jnp.asarray(rng.standard_normal((experts, n, k)), jnp.float32)
    if packed:
        q = quantize(w, MXFP4)
        return x, dy, to_planar(pack(q)), np.asarray(dequantize(q), np.float64)
    w = w.astype(dtype)
    return x, dy, w, np.asarray(w, np.float64)


@functools.partial(jax.jit, static_argnames=("backend", "interpret"))
def run(backend, x, dy, w, sizes, interpret):
    """y, dx, dw of the module `backend`."""
    rows = functools.partial(backend.rows, interpret=interpret)
    return (
        rows(x, w, sizes),
        rows(dy, w, sizes, transpose=True),
        backend.weights(dy, x, sizes, interpret=interpret),
    )


def check(actual, x, dy, values, sizes):
    """`run`'s result against float64; rows of no expert, and dw of one without rows, are 0."""
    dtype = x.dtype
    exact = expected(np.asarray(x, np.float64), values, sizes, np.asarray(dy, np.float64))
    assert [a.dtype for a in actual] == [dtype, dtype, "float32"]
    for result, value, low in zip(actual, exact, (True, True, False), strict=True):
        tolerance = 2**-8 if low and dtype == "bfloat16" else 1e-5
        scale = np.abs(value).max(initial=1e-30)
        np.testing.assert_allclose(np.asarray(result), value, rtol=0, atol=tolerance * scale)
    total = sum(sizes)
    assert not np.any(actual[0][total:]) and not np.any(actual[1][total:])
    for expert, size in enumerate(sizes):
        assert size > 0 or not np.any(actual[2][expert])

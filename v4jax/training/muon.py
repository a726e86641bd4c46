"""Muon's direction (report 2.4, Algorithm 1), for each logically independent matrix of a tree.

With gradient G of a matrix W [n, m]:

    M <- mu M + G                        momentum, without a (1 - mu) factor
    O <- NS(mu M + G)                    Nesterov; Newton-Schulz rows on X / ||X||_F
    W <- W (1 - eta lambda) - eta sqrt(max(n, m)) gamma O

The report's NS is hybrid, 8 + 2 rows, and its O orthogonal: the last factor makes the RMS of the
update exactly gamma = 0.18, AdamW's size. The 5 rows that Muon came with leave singular values
between about 0.7 and 1.2, so there the RMS is only near gamma. All matrices of one
shape, wherever they stand in the tree, are stacked and go through one batched iteration.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from v4jax.quantization import flat_paths

Coefficients = tuple[tuple[float, float, float], ...]
_LIFT = (3.4445, -4.7750, 2.0315)
COEFFICIENTS: dict[str, Coefficients] = {
    "hybrid": (_LIFT,) * 8 + ((2.0, -1.5, 0.5),) * 2,
    "five": (_LIFT,) * 5,
}
"""(a, b, c) of each step x <- a x + (b x x^T + c (x x^T)^2) x."""


def newton_schulz(
    x: jax.Array, dtype: Any = jnp.float32, coefficients: Coefficients = COEFFICIENTS["hybrid"]
) -> jax.Array:
    """Orthogonalises [B, n, m] (n <= m is the cheap orientation): U V^T of each matrix, nearly.

    With the hybrid rows singular values end within 5e-4 of 1 (float32; 1e-2 with bfloat16
    operands) where they were above about 1e-4 of the matrix's norm; smaller ones are lifted in
    part. A zero matrix stays zero, NaN stays NaN. Operands are cast to `dtype`; sums and the rest
    are float32.
    """
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT

    def matmul(subscripts, a, b):
        return jnp.einsum(
            subscripts,
            a.astype(dtype),
            b.astype(dtype),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def step(x, abc):
        a, b, c = abc
        gram = matmul("Bnm,Bkm->Bnk", x, x)
        return a * x + matmul("Bnk,Bkm->Bnm", b * gram + c * matmul("Bnk,Bkl->Bnl", gram, gram), x)

    x = x.astype(jnp.float32)
    # First to a largest element of 1: squares of very small gradients would underflow. The norm
    # is then at least 1 unless the matrix is zero.
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1.0)
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    x = x / jnp.maximum(norm, 1.0)
    # A scan, not ten copies: a tenth of the program for each matrix shape, and no slower.
    rows = jnp.asarray(coefficients, jnp.float32)
    return lax.scan(lambda x, abc: (step(x, abc), None), x, rows)[0]


class MuonState(NamedTuple):
    momentum: Any  # M, float32, the tree of the parameters


def scale_by_muon(
    splits: Mapping[str, tuple[int, ...]],
    *,
    momentum: float = 0.95,
    update_rms: float = 0.18,
    ns_dtype: Any = jnp.float32,
    coefficients: Coefficients = COEFFICIENTS["hybrid"],
) -> optax.GradientTransformation:
    """Algorithm 1's direction, sqrt(max(n, m)) gamma O, without learning rate and decay.

    Args:
      splits: for each leaf's path, the rows of its independent matrices (`Leaf.split`).
      momentum: mu.
      update_rms: gamma, the RMS of each matrix's update.
      ns_dtype: operands of Newton-Schulz's matmuls.
      coefficients: Newton-Schulz's rows.
    """

    def init(params):
        return MuonState(jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params))

    def update(grads, state, params=None):
        del params
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        accumulated = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, grads)
        nesterov = jax.tree.map(lambda m, g: momentum * m + g, accumulated, grads)
        directions = _orthogonalize(nesterov, splits, update_rms, ns_dtype, coefficients)
        return directions, MuonState(accumulated)

    return optax.GradientTransformation(init, update)


def _orthogonalize(
    tree,
    splits: Mapping[str, tuple[int, ...]],
    update_rms: float,
    dtype: Any,
    coefficients: Coefficients,
):
    """Every matrix of the tree to RMS `update_rms`: one Newton-Schulz call a matrix shape."""
    parts = {
        path: jnp.split(leaf, [sum(splits[path][:i]) for i in range(1, len(splits[path]))], -2)
        for path, leaf in flat_paths(tree).items()
    }
    stacks: dict[tuple[int, int], list[tuple[str, int]]] = {}  # (n, m) -> parts of that shape
    for path, pieces in parts.items():
        for i, piece in enumerate(pieces):
            n, m = sorted(piece.shape[-2:])
            stacks.setdefault((n, m), []).append((path, i))
    for (n, m), places in stacks.items():
        wide = [_wide(parts[path][i]) for path, i in places]
        stack = jnp.concatenate([x.reshape(-1, n, m) for x in wide])
        stack = newton_schulz(stack, dtype, coefficients) * (math.sqrt(m) * update_rms)
        start = 0
        for (path, i), x in zip(places, wide, strict=True):
            stop = start + math.prod(x.shape[:-2])
            out = stack[start:stop].reshape(x.shape)
            parts[path][i] = out if parts[path][i].shape == x.shape else out.mT
            start = stop
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.concatenate(
            parts[jax.tree_util.keystr(path, simple=True, separator="/")], -2
        ),
        tree,
    )


def _wide(x: jax.Array) -> jax.Array:
    return x if x.shape[-2] <= x.shape[-1] else x.mT

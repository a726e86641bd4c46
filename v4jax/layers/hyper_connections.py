"""Manifold-constrained hyper-connections (report 2.2, eqs. 1-8; arXiv 2512.24880).

    z    = rmsnorm(flatten(X)) @ fn.T                 no norm weight; float32
    a    = sigmoid(z_pre * scale_0 + base_pre) + eps               [M]    x = sum_i a_i X_i
    post = 2 sigmoid(z_post * scale_1 + base_post)                 [M]    no eps
    comb = sinkhorn(softmax_last(z_comb * scale_2 + base_comb) + eps)     [M, M]
    X_k <- post_k y + sum_j comb_jk X_j               the sum runs over comb's FIRST index

Symbols: n_hc -> M, A -> a, C -> post, B -> comb transposed. Departures: none.

Form, for speed (`sinkhorn`'s docstring and two facts): the M streams are a tuple of [B, T, D]
arrays, because slicing one [B, T, M*D] array turns into pads and adds in the backward pass, and
all coefficients keep tokens on the minor axes, [M, B, T], because XLA's CPU code is several times
slower on minor axes of 4.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax.config import ModelConfig
from v4jax.layers.parameter import parameter, stream_base

Streams = tuple[jax.Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def sinkhorn(k: jax.Array, iterations: int, eps: float) -> jax.Array:
    """Doubly stochastic scaling of positive matrices k [M, M, ...] (rows, columns, tokens).

    Columns first, then (rows, columns) `iterations - 1` times, each division by (sum + eps), as
    released. The matrix is kept as k scaled by a row and a column vector, so that an iteration
    touches 2M numbers a token and the backward pass replays saved vectors.
    """
    return _scale(k, *_sinkhorn_history(k, iterations, eps)[:2])


def _scale(k, row, column):
    return row[:, None] * k * column[None, :]


def _sinkhorn_history(k, iterations: int, eps: float):
    row = jnp.ones(k.shape[1:], k.dtype)
    column = jnp.reciprocal(jnp.sum(k, axis=0) + eps)

    def step(state, _):
        row, column = state
        new_row = row / (row * jnp.sum(k * column[None, :], axis=1) + eps)
        new_column = column / (column * jnp.sum(k * new_row[:, None], axis=0) + eps)
        return (new_row, new_column), (row, column)

    (row, column), history = jax.lax.scan(step, (row, column), length=iterations - 1)
    return row, column, history


def _sinkhorn_forward(k, iterations, eps):
    row, column, history = _sinkhorn_history(k, iterations, eps)
    return _scale(k, row, column), (k, row, column, history)


def _sinkhorn_backward(iterations, eps, residuals, g):
    k, row, column, history = residuals
    g_k = g * row[:, None] * column[None, :]
    g_row = jnp.sum(g * k * column[None, :], axis=1)
    g_column = jnp.sum(g * k * row[:, None], axis=0)

    # A step v' = v / (v s + eps) has dv'/dv = eps (v'/v)^2 and dv'/ds = -v'^2.
    def step(state, old):
        (row, column, g_row, g_column, g_k), (old_row, old_column) = state, old
        g_sum = -g_column * jnp.square(column)
        g_k += row[:, None] * g_sum[None, :]
        g_row += jnp.sum(k * g_sum[None, :], axis=1)
        g_column *= eps * jnp.square(column / old_column)
        g_sum = -g_row * jnp.square(row)
        g_k += g_sum[:, None] * old_column[None, :]
        g_column += jnp.sum(k * g_sum[:, None], axis=0)
        g_row *= eps * jnp.square(row / old_row)
        return (old_row, old_column, g_row, g_column, g_k), None

    state, _ = jax.lax.scan(step, (row, column, g_row, g_column, g_k), history, reverse=True)
    _, column, _, g_column, g_k = state
    return (g_k - (g_column * jnp.square(column))[None, :],)


sinkhorn.defvjp(_sinkhorn_forward, _sinkhorn_backward)


def _coefficients(streams: Streams, fn: jax.Array, eps: float) -> jax.Array:
    """rmsnorm(flatten(X)) @ fn.T with tokens last: float32 [O, B, T] from fn [O, M*D]."""
    flat = jnp.concatenate([s.astype(jnp.float32) for s in streams], axis=-1)
    z = jnp.einsum("BTX,OX->BTO", flat, fn)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(flat), axis=-1, keepdims=True) + eps)
    return jnp.moveaxis(z * scale, -1, 0)


def _collapse(streams: Streams, a: jax.Array) -> jax.Array:
    """sum_i a_i X_i in float32, cast back: [B, T, D] from a [M, B, T]."""
    x = jnp.zeros(streams[0].shape, jnp.float32)
    for weight, stream in zip(a, streams, strict=True):
        x += weight[..., None] * stream.astype(jnp.float32)
    return x.astype(streams[0].dtype)


class HyperConnection(nnx.Module):
    """Reads one layer input from M streams and mixes its output back (report eqs. 1-8)."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        m = cfg.hc_mult
        shape = ((2 + m) * m, m * cfg.hidden_size)
        self.fn = parameter(cfg, rngs, "hc_fn", shape, (None, None))
        self.base = stream_base(cfg, mixing=True)
        self.scale = parameter(cfg, rngs, "hc_scale", (3,), (None,))
        self.iterations = cfg.hc_sinkhorn_iters
        self.hc_eps, self.norm_eps = cfg.hc_eps, cfg.rms_norm_eps

    def __call__(self, streams: Streams) -> tuple[jax.Array, jax.Array, jax.Array]:
        """M arrays [B, T, D] -> x [B, T, D]; post [M, B, T], comb [M, M, B, T] float32."""
        m = len(streams)
        z = _coefficients(streams, self.fn[...], self.norm_eps)
        base, scale = self.base[...][:, None, None], self.scale[...]
        a = jax.nn.sigmoid(z[:m] * scale[0] + base[:m]) + self.hc_eps
        post = 2 * jax.nn.sigmoid(z[m : 2 * m] * scale[1] + base[m : 2 * m])
        comb = (z[2 * m :] * scale[2] + base[2 * m :]).reshape(m, m, *z.shape[1:])
        comb = sinkhorn(jax.nn.softmax(comb, axis=1) + self.hc_eps, self.iterations, self.hc_eps)
        return _collapse(streams, a), post, comb


def mix(streams: Streams, y: jax.Array, post: jax.Array, comb: jax.Array) -> Streams:
    """X_k <- post_k y + sum_j comb_jk X_j in float32: y [B, T, D], post [M, B, T].

    The barrier keeps XLA from fusing the residual chain across layers, which it would then
    recompute in the backward pass.
    """
    y32 = y.astype(jnp.float32)
    s32 = [s.astype(jnp.float32) for s in streams]
    mixed = [
        post[k][..., None] * y32 + sum(comb[j, k][..., None] * s for j, s in enumerate(s32))
        for k in range(len(streams))
    ]
    return jax.lax.optimization_barrier(tuple(x.astype(y.dtype) for x in mixed))


class StreamHead(nnx.Module):
    """Collapses the streams before the final norm: a = sigmoid(z * scale + base) + eps."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        m = cfg.hc_mult
        self.hc_fn = parameter(cfg, rngs, "hc_fn", (m, m * cfg.hidden_size), (None, None))
        self.hc_base = stream_base(cfg, mixing=False)
        self.hc_scale = parameter(cfg, rngs, "hc_scale", (1,), (None,))
        self.hc_eps, self.norm_eps = cfg.hc_eps, cfg.rms_norm_eps

    def __call__(self, streams: Streams) -> jax.Array:
        """M arrays [B, T, D] -> [B, T, D]."""
        z = _coefficients(streams, self.hc_fn[...], self.norm_eps)
        a = jax.nn.sigmoid(z * self.hc_scale[...] + self.hc_base[...][:, None, None]) + self.hc_eps
        return _collapse(streams, a)

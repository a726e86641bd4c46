"""Manifold-constrained hyper-connections (report 2.2, eqs. 1-8; arXiv 2512.24880).

    z    = rmsnorm(flatten(X)) @ fn.T                 no norm weight; float32
    a    = sigmoid(z_pre * scale_0 + base_pre) + eps               [M]    x = sum_i a_i X_i
    post = 2 sigmoid(z_post * scale_1 + base_post)                 [M]    no eps
    comb = sinkhorn(softmax_last(z_comb * scale_2 + base_comb) + eps)     [M, M]
    X_k <- post_k y + sum_j comb_jk X_j               the sum runs over comb's FIRST index

Symbols: n_hc -> M, A -> a, C -> post, B -> comb transposed. Departures: none.

Form, for speed (`sinkhorn`'s docstring and three facts): the M streams are a tuple of [B, T, D]
arrays, because slicing one [B, T, M*D] array turns into pads and adds in the backward pass; all
coefficients keep tokens on the minor axes, [M, B, T], because XLA's CPU code is several times
slower on minor axes of 4; and the backward passes are written by hand, because XLA would compute
each of the sums over D from the cotangents' whole history. Both passes are jitted here, so that a
model of many layers traces them once.
"""

import dataclasses
import functools
import math

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


def _along(k, vector):
    """sum_j k[:, j] vector[j]. Written out: XLA's CPU code fuses the terms, not a reduction."""
    return sum(k[:, j] * vector[j] for j in range(k.shape[1]))


def _down(k, vector):
    """sum_i k[i] vector[i]."""
    return sum(k[i] * vector[i] for i in range(k.shape[0]))


def _scale(k, row, column):
    return row[:, None] * k * column[None, :]


def _sinkhorn_history(k, iterations: int, eps: float):
    row = jnp.ones(k.shape[1:], k.dtype)
    column = jnp.reciprocal(_down(k, row) + eps)

    def step(state, _):
        row, column = state
        new_row = row / (row * _along(k, column) + eps)
        new_column = column / (column * _down(k, new_row) + eps)
        return (new_row, new_column), (row, column)

    (row, column), history = jax.lax.scan(step, (row, column), length=iterations - 1)
    return row, column, history


@functools.partial(jax.jit, static_argnums=(1, 2))
def _sinkhorn_forward(k, iterations, eps):
    row, column, history = _sinkhorn_history(k, iterations, eps)
    return _scale(k, row, column), (k, row, column, history)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sinkhorn_backward(iterations, eps, residuals, g):
    k, row, column, history = residuals
    g_k = g * row[:, None] * column[None, :]
    g_row, g_column = _along(g * k, column), _down(g * k, row)

    # A step v' = v / (v s + eps) has dv'/dv = eps (v'/v)^2 and dv'/ds = -v'^2.
    def step(state, old):
        (row, column, g_row, g_column, g_k), (old_row, old_column) = state, old
        g_sum = -g_column * jnp.square(column)
        g_k += row[:, None] * g_sum[None, :]
        g_row += _along(k, g_sum)
        g_column *= eps * jnp.square(column / old_column)
        g_sum = -g_row * jnp.square(row)
        g_k += g_sum[:, None] * old_column[None, :]
        g_column += _down(k, g_sum)
        g_row *= eps * jnp.square(row / old_row)
        return (old_row, old_column, g_row, g_column, g_k), None

    state, _ = jax.lax.scan(step, (row, column, g_row, g_column, g_k), history, reverse=True)
    _, column, _, g_column, g_k = state
    return (g_k - (g_column * jnp.square(column))[None, :],)


sinkhorn.defvjp(_sinkhorn_forward, _sinkhorn_backward)


def _projection(streams: Streams, fn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """flatten(X) @ fn.T, tokens last, float32 [O, B, T] of fn [O, M*D]; and sum X^2 [B, T]."""
    flat = jnp.concatenate([s.astype(jnp.float32) for s in streams], axis=-1)
    z = jnp.moveaxis(jnp.einsum("BTX,OX->BTO", flat, fn), -1, 0)
    return z, jnp.sum(jnp.square(flat), axis=-1)


def _collapse(streams: Streams, a: jax.Array) -> jax.Array:
    """sum_i a_i X_i in float32, cast back: [B, T, D] from a [M, B, T]."""
    x = jnp.zeros(streams[0].shape, jnp.float32)
    for weight, stream in zip(a, streams, strict=True):
        x += weight[..., None] * stream.astype(jnp.float32)
    return x.astype(streams[0].dtype)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """sum_d x_d y_d in float32: [B, T]. Rows along one axis, as `rms_normalize` says."""
    x_rows, y_rows = (z.astype(jnp.float32).reshape(-1, z.shape[-1]) for z in (x, y))
    return jnp.sum(x_rows * y_rows, axis=-1).reshape(x.shape[:-1])


@dataclasses.dataclass(frozen=True)
class Constants:
    """What of the config a hyper-connection computes with."""

    iterations: int
    hc_eps: float
    norm_eps: float

    @classmethod
    def of(cls, cfg: ModelConfig) -> "Constants":
        return cls(cfg.hc_sinkhorn_iters, cfg.hc_eps, cfg.rms_norm_eps)


def _maps(z, squares, base, scale, width: int, c: Constants):
    """a, post [M, B, T] and comb [M, M, B, T] of `_projection`'s z and squares; width: M*D."""
    m = math.isqrt(z.shape[0] + 1) - 1
    z = z * jax.lax.rsqrt(squares / width + c.norm_eps)
    base = base[:, None, None]
    a = jax.nn.sigmoid(z[:m] * scale[0] + base[:m]) + c.hc_eps
    post = 2 * jax.nn.sigmoid(z[m : 2 * m] * scale[1] + base[m : 2 * m])
    comb = (z[2 * m :] * scale[2] + base[2 * m :]).reshape(m, m, *z.shape[1:])
    comb = sinkhorn(_softmax(comb) + c.hc_eps, c.iterations, c.hc_eps)
    return a, post, comb


def _softmax(x):
    """Over axis 1, its sum written out as `_along`'s."""
    x = jnp.exp(x - jax.lax.stop_gradient(jnp.max(x, axis=1, keepdims=True)))
    return x / _along(x, jnp.ones_like(x[0]))[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def read(streams: Streams, fn, base, scale, constants: Constants):
    """A layer's input and its maps: M arrays [B, T, D] -> x [B, T, D]; post [M, B, T], comb
    [M, M, B, T] float32. fn [(2+M)M, M*D], base [(2+M)M], scale [3], all float32."""
    return _read_forward(streams, fn, base, scale, constants)[0]


@functools.partial(jax.jit, static_argnums=(4,))
def _read_forward(streams, fn, base, scale, constants):
    z, squares = _projection(streams, fn)
    maps = functools.partial(_maps, width=fn.shape[1], c=constants)
    (a, post, comb), vjp = jax.vjp(maps, z, squares, base, scale)
    return (_collapse(streams, a), post, comb), (streams, fn, a, vjp)


@functools.partial(jax.jit, static_argnums=(0,))
def _read_backward(constants, residuals, g):
    streams, fn, a, vjp = residuals
    # Barriers: what several sums below read is computed once, not anew in each.
    g_x = jax.lax.optimization_barrier(g[0].astype(jnp.float32))
    g_a = jnp.stack([_dot(g_x, s) for s in streams])
    g_z, g_squares, g_base, g_scale = vjp((g_a, *g[1:]))
    g_z, g_squares = jax.lax.optimization_barrier((g_z, g_squares))
    flat = jnp.concatenate([s.astype(jnp.float32) for s in streams], axis=-1)
    # The forward's precision does not reach a backward pass written by hand.
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    g_fn = einsum("OBT,BTX->OX", g_z, flat)
    g_flat = einsum("OBT,OX->BTX", g_z, fn)
    width = g_x.shape[-1]
    g_streams = tuple(
        (
            a[i][..., None] * g_x
            + g_flat[..., i * width : (i + 1) * width]
            + (2 * g_squares)[..., None] * s.astype(jnp.float32)
        ).astype(s.dtype)
        for i, s in enumerate(streams)
    )
    return g_streams, g_fn, g_base, g_scale


read.defvjp(_read_forward, _read_backward)


class HyperConnection(nnx.Module):
    """Reads one layer input from M streams and mixes its output back (report eqs. 1-8)."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        m = cfg.hc_mult
        shape = ((2 + m) * m, m * cfg.hidden_size)
        self.fn = parameter(cfg, rngs, "hc_fn", shape, (None, None))
        self.base = stream_base(cfg, mixing=True)
        self.scale = parameter(cfg, rngs, "hc_scale", (3,), (None,))
        self.constants = Constants.of(cfg)

    def __call__(self, streams: Streams) -> tuple[jax.Array, jax.Array, jax.Array]:
        """M arrays [B, T, D] -> x [B, T, D]; post [M, B, T], comb [M, M, B, T] float32."""
        return read(streams, self.fn[...], self.base[...], self.scale[...], self.constants)

    def maps(self, streams: Streams) -> tuple[jax.Array, jax.Array, jax.Array]:
        """For analysis: a, post [M, B, T] and comb [M, M, B, T], float32, of M arrays [B, T, D]."""
        z, squares = _projection(streams, self.fn[...])
        width = self.fn.shape[1]
        return _maps(z, squares, self.base[...], self.scale[...], width, self.constants)


@jax.custom_vjp
@jax.jit
def mix(streams: Streams, y: jax.Array, post: jax.Array, comb: jax.Array) -> Streams:
    """X_k <- post_k y + sum_j comb_jk X_j in float32: y [B, T, D], post [M, B, T].

    The barriers keep XLA from fusing the residual chain across layers, which it would then
    recompute in the backward pass.
    """
    y32 = y.astype(jnp.float32)
    s32 = [s.astype(jnp.float32) for s in streams]
    mixed = [
        post[k][..., None] * y32 + sum(comb[j, k][..., None] * s for j, s in enumerate(s32))
        for k in range(len(streams))
    ]
    return jax.lax.optimization_barrier(tuple(x.astype(y.dtype) for x in mixed))


@jax.jit
def _mix_backward(residuals, g):
    streams, y, post, comb = residuals
    g = jax.lax.optimization_barrier(g)
    g32 = [x.astype(jnp.float32) for x in g]
    g_y = sum(post[k][..., None] * x for k, x in enumerate(g32)).astype(y.dtype)
    g_streams = tuple(
        sum(comb[j, k][..., None] * x for k, x in enumerate(g32)).astype(s.dtype)
        for j, s in enumerate(streams)
    )
    g_post = jnp.stack([_dot(x, y) for x in g32])
    g_comb = jnp.stack([jnp.stack([_dot(x, s) for x in g32]) for s in streams])
    return jax.lax.optimization_barrier((g_streams, g_y, g_post, g_comb))


mix.defvjp(lambda *args: (mix(*args), args), _mix_backward)


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
        fn = self.hc_fn[...]
        z, squares = _projection(streams, fn)
        z *= jax.lax.rsqrt(squares / fn.shape[1] + self.norm_eps)
        a = jax.nn.sigmoid(z * self.hc_scale[...] + self.hc_base[...][:, None, None]) + self.hc_eps
        return _collapse(streams, a)

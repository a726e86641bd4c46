"""How parameters are declared and initialised: once, with their logical axes.

Every parameter is made by `parameter(...)` (hyper-connection bases by `stream_base`) where its
layer is built, in float32. Its logical axis names travel with it; `v4jax.parallel` maps them to
mesh axes. The roles are this table:

    role       init="v4jax"                             init="transformers"
    matrix     normal(0, initializer_range)             same
    norm       1                                        same
    zero       0 (sinks, position biases)               same
    hc_fn      normal(0, initializer_range)             same
    hc_scale   0.01 (report 2.2: "small"; mHC table 5)  1
    hc_pre     logit(1/M): reads the streams' mean      0
    hc_post    0: writes y once to every stream         0
    hc_comb    5 on the diagonal, 0 off it              0

With v4jax's hyper-connection bases, step 0 is nearly a plain residual network: a = 1/M, post = 1,
and the mixing matrix has 0.98 on its diagonal (M = 4). `hc_fn` must not be zero, or the streams,
which start as copies, would never separate.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax.config import ModelConfig

COMB_DIAGONAL = 5.0


def _stream_mean_logit(streams: int) -> float:
    """logit(1/M), bounded for a single stream, whose weight should be 1."""
    share = min(1 / streams, 1 - 1 / 400)
    return math.log(share / (1 - share))


def _normal(cfg: ModelConfig) -> Callable:
    return nnx.initializers.normal(cfg.initializer_range)


def _constant(value: float) -> Callable:
    return nnx.initializers.constant(value)


def _by_init(ours: float, theirs: float) -> Callable:
    return lambda cfg: _constant(ours if cfg.init == "v4jax" else theirs)


ROLES: dict[str, Callable[[ModelConfig], Callable]] = {
    "matrix": _normal,
    "norm": _by_init(1.0, 1.0),
    "zero": _by_init(0.0, 0.0),
    "hc_fn": _normal,
    "hc_scale": _by_init(0.01, 1.0),
}


def parameter(
    cfg: ModelConfig,
    rngs: nnx.Rngs,
    role: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
) -> nnx.Param:
    """A float32 parameter of `shape` whose axes have the logical names `axes` (None: unnamed)."""
    value = ROLES[role](cfg)(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, logical_axes=axes)


def stream_base(cfg: ModelConfig, mixing: bool) -> nnx.Param:
    """Base of hyper-connection coefficients: [(2+M)M] (pre, post, comb), or [M] without mixing."""
    m = cfg.hc_mult
    ours = cfg.init == "v4jax"
    pre = jnp.full((m,), _stream_mean_logit(m) if ours else 0.0, jnp.float32)
    if not mixing:
        return nnx.Param(pre, logical_axes=(None,))
    comb = COMB_DIAGONAL * jnp.eye(m, dtype=jnp.float32).reshape(-1) * ours
    return nnx.Param(jnp.concatenate([pre, jnp.zeros((m,)), comb]), logical_axes=(None,))


class Linear(nnx.Module):
    """y = x @ weight.T without bias; weight [out, in], computed in x's dtype."""

    def __init__(self, cfg, rngs, features_in: int, features_out: int, axes):
        self.weight = parameter(cfg, rngs, "matrix", (features_out, features_in), axes)

    def __call__(self, x):
        """x [..., in] -> [..., out] in x's dtype."""
        # The barrier has the incoming gradient computed once for the two products that read it.
        return jax.lax.optimization_barrier(x @ self.weight[...].astype(x.dtype).T)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis, in float32 (weight too), cast back at the end."""

    def __init__(self, cfg, rngs, features: int):
        self.weight = parameter(cfg, rngs, "norm", (features,), (None,))
        self.eps = cfg.rms_norm_eps

    def __call__(self, x):
        """x [..., features] -> same shape and dtype."""
        rows = x.reshape(-1, x.shape[-1])  # as in rms_normalize: for the weight's gradient
        return (rms_normalize(rows, self.eps) * self.weight[...]).astype(x.dtype).reshape(x.shape)


def rms_normalize(x, eps: float):
    """x / sqrt(mean(x^2) + eps) over the last axis, float32.

    The rows lie along one axis: where a leading axis is 1, as in a batch of one row, the CPU back
    end of jax 0.10.2 takes 16 times as long to sum products, and the gradient has such sums.
    """
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    scale = jnp.reciprocal(jnp.sqrt(jnp.mean(jnp.square(rows), axis=-1, keepdims=True) + eps))
    return (rows * scale).reshape(x.shape)

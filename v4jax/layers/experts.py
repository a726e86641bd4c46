"""Mixture of experts (report 2.1): dispatch by expert, grouped SwiGLU, collect; shared expert.

    y = sum_k w_k Down_e( silu(min(G_e x, L)) * clip(U_e x, -L, L) ) + shared(x)

G and U are the first and second half of gate_up_proj [E, 2F, D]'s rows; L is swiglu_limit
(report 4.2.3: the gate is capped from above only; None: no clamp). SwiGLU and the sum over experts
are float32. Departures: none (the first release built the shared expert without the clamp:
`shared_expert_swiglu_limit`).

No token is dropped, and there is no capacity that could be full: sorting by expert is a permutation
of the P*K (token, k) pairs, an expert's group is as long as its pairs are many, and the groups
together are all pairs, whichever way the routers choose. On a mesh the same holds on each device:
it has the tokens of its own rows and, gathered over fsdp, every expert whole, so that no token has
to travel and no buffer is shared. Sharding experts over devices is not built (`parallel.RULES`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels_pallas import expert_matmul
from v4jax import parallel
from v4jax.config import ModelConfig
from v4jax.layers.context import Context
from v4jax.layers.parameter import Linear, parameter
from v4jax.layers.router import Router


class PackedWeight(nnx.Variable):
    """Weights of all experts in MXFP4: a `numerics.Packed`, or a `Planar`, not a parameter."""


class Experts(nnx.Module):
    """The routed experts' weights, and the SwiGLU over tokens sorted by expert.

    The weights are parameters, or after `v4jax.pack_experts` of type PackedWeight. On a mesh each
    device sorts its own tokens and has the weights whole: tokens are not exchanged.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        e, d, f = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size
        self.gate_up_proj = parameter(
            cfg, rngs, "matrix", (e, 2 * f, d), ("experts", "expert_hidden", "embed")
        )
        self.down_proj = parameter(
            cfg, rngs, "matrix", (e, d, f), ("experts", "embed", "expert_hidden")
        )
        self.limit, self.count = cfg.swiglu_limit, e

    @jax.named_scope("experts")
    def __call__(
        self, x: jax.Array, ids: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """x [B, T, D], ids int32 [B, T, K], weights float32 [B, T, K] -> float32 [B, T, D].

        And, where there is a limit, which share of a token's 2 F K gate and up values is beyond it:
        float32 [B, T], no gradient.
        """
        matrices = self.gate_up_proj.get_value(), self.down_proj.get_value()
        return parallel.over_rows(self._visited, matrices, x, ids, weights)

    def _visited(self, matrices, x: jax.Array, ids: jax.Array, weights: jax.Array):
        """The tokens of a device by all experts, whose matrices are (gate_up, down)."""
        gate_up_proj, down_proj = matrices
        shape, k, clamped = x.shape, ids.shape[-1], None
        x, weights, flat = x.reshape(-1, shape[-1]), weights.reshape(-1, k), ids.reshape(-1)
        tokens = x.shape[0]
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)  # expert-sorted -> (token, k)
        place = jnp.zeros_like(order).at[order].set(jnp.arange(tokens * k, dtype=jnp.int32))
        sizes = jnp.sum(jax.nn.one_hot(flat, self.count, dtype=jnp.int32), axis=0)
        rows = dispatch(x, order, place.reshape(tokens, k))
        gate_up = expert_matmul(rows, gate_up_proj, sizes)
        gate, up = jnp.split(gate_up, 2, axis=-1)
        if self.limit is not None:
            each = beyond(gate, up, self.limit)[place.reshape(tokens, k)]
            clamped = jnp.mean(each, axis=1).reshape(shape[:2])
        hidden = swiglu(gate, up, self.limit).astype(x.dtype)
        y = expert_matmul(hidden, down_proj, sizes)
        y = collect(y, place.reshape(tokens, k), order)  # [P K D]
        y = jnp.einsum("PKD,PK->PD", y.astype(jnp.float32), weights)
        return y.reshape(shape), clamped


def swiglu(gate: jax.Array, up: jax.Array, limit: float | None) -> jax.Array:
    """silu(min(gate, limit)) * clip(up, -limit, limit) in float32; None: no clamp."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return jax.nn.silu(gate) * up


def beyond(gate: jax.Array, up: jax.Array, limit: float) -> jax.Array:
    """Share of gate and up values that `swiglu` clamps: [..., F] each -> float32 [...]."""
    clamped = (gate > limit).astype(jnp.float32) + (jnp.abs(up) > limit)
    return jnp.mean(clamped, axis=-1) / 2


@jax.custom_vjp
def dispatch(x: jax.Array, order: jax.Array, place: jax.Array) -> jax.Array:
    """Token rows sorted by expert: x [P, D] -> [P*K, D]; `place` [P, K] inverts `order` [P*K].

    Its gradient is `collect` summed over K: two gathers, no scatter.
    """
    return x[order // place.shape[1]]


def _dispatch_backward(residuals, g):
    place = residuals
    return jnp.sum(g[place], axis=1), None, None


dispatch.defvjp(lambda x, order, place: (dispatch(x, order, place), place), _dispatch_backward)


@jax.custom_vjp
def collect(y: jax.Array, place: jax.Array, order: jax.Array) -> jax.Array:
    """Rows back at their tokens: y [P*K, D] -> [P, K, D]."""
    return y[place]


collect.defvjp(
    lambda y, place, order: (y[place], order),
    lambda order, g: (g.reshape(-1, g.shape[-1])[order], None, None),
)


class SharedExpert(nnx.Module):
    """The expert that every token visits, weight 1."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        d, f = cfg.hidden_size, cfg.moe_intermediate_size
        self.gate_proj = Linear(cfg, rngs, d, f, ("hidden", "embed"))
        self.up_proj = Linear(cfg, rngs, d, f, ("hidden", "embed"))
        self.down_proj = Linear(cfg, rngs, f, d, ("embed", "hidden"))
        self.limit = cfg.swiglu_limit if cfg.shared_expert_swiglu_limit else None

    @jax.named_scope("shared_expert")
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D] in x's dtype."""
        hidden = swiglu(self.gate_proj(x), self.up_proj(x), self.limit)
        return self.down_proj(hidden.astype(x.dtype))


class MoE(nnx.Module):
    """Router, routed experts and the shared expert; `kind` is "moe" or "hash_moe"."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, kind: str, table: np.ndarray | None):
        self.gate = Router(cfg, rngs, kind, table)
        self.experts = Experts(cfg, rngs)
        self.shared_experts = SharedExpert(cfg, rngs)

    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, dict]:
        """x [B, T, D], normed -> [B, T, D] in x's dtype, and aux: the router's, and `clamped`.

        That is, with a limit, the share of the routed experts' gate and up values that are clamped,
        over valid tokens: float32 scalar.
        """
        ids, weights, aux = self.gate(x, ctx)
        y, clamped = self.experts(x, ids, weights)
        if clamped is not None:
            tokens = jnp.maximum(jnp.sum(ctx.valid), 1)
            aux["clamped"] = jnp.sum(clamped * ctx.valid) / tokens
        y = y + self.shared_experts(x).astype(jnp.float32)
        return y.astype(x.dtype), aux

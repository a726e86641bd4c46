"""Which experts a token visits, and how much each counts (report 2.1, 4.2; V3 2.1.2).

    s   = sqrt(softplus(x gate.T))                          [E], float32
    moe:       ids = the K largest of s + e_score_correction_bias
    hash_moe:  ids = tid2eid[token id], a fixed table
    weights = s[ids] / (sum s[ids] + 1e-20) * routed_scaling_factor      never the bias

Anticipatory routing (report 4.2.3) hands ids in, chosen by earlier parameters: `Context.routes`.
They take the place of the top-K choice alone: weights, and their gradient, are from the gate now.

The bias is moved outside the gradient after each step (`updated_bias`). The table is a pure
function of a seed and token counts (`hash_table`); the report does not publish its own.
Departures: with packed rows the balance loss takes a row for the sequence.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from v4jax import parallel
from v4jax.config import ModelConfig
from v4jax.layers.context import Context
from v4jax.layers.parameter import parameter


class RouterBias(nnx.Variable):
    """e_score_correction_bias: outside gradient, optimizer and decay; inside the checkpoint."""


class HashTable(nnx.Variable):
    """tid2eid, int32 [V, K]: outside gradient, optimizer and decay; inside the checkpoint."""


class Router(nnx.Module):
    """Expert ids and weights of each token; `kind` is "moe" or "hash_moe"."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, kind: str, table: np.ndarray | None):
        shape = (cfg.n_routed_experts, cfg.hidden_size)
        self.weight = parameter(cfg, rngs, "matrix", shape, (None, "embed"))
        if kind == "hash_moe":
            self.tid2eid = HashTable(jnp.asarray(table, jnp.int32))
        else:
            self.e_score_correction_bias = RouterBias(jnp.zeros((shape[0],), jnp.float32))
        self.kind, self.config = kind, cfg

    @jax.named_scope("router")
    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array, dict]:
        """x [B, T, D] -> ids int32 [B, T, K], weights float32 [B, T, K], aux.

        aux: `expert_load` float32 [E], valid tokens sent to each expert; `balance_loss` scalar,
        not on hash layers (their choice does not depend on the gate); `disagreement` scalar, of a
        "moe" router with routes: the share of valid tokens' K choices, as used, that are not among
        the K that the gate would choose now. Loads and balance loss count what is used.
        """
        cfg = self.config
        logits = jnp.einsum(
            "BTD,ED->BTE",
            x.astype(jnp.float32),
            self.weight[...],
            precision=jax.lax.Precision.HIGHEST,
        )
        score = sqrtsoftplus if cfg.scoring_func == "sqrtsoftplus" else jax.nn.sigmoid
        scores = score(logits)
        if self.kind == "hash_moe":
            ids = self.tid2eid[...][ctx.token_ids]
        else:
            biased = jax.lax.stop_gradient(scores) + self.e_score_correction_bias[...]
            k = cfg.num_experts_per_tok
            ids = live = parallel.over_rows(lambda _, x: jax.lax.top_k(x, k)[1], None, biased)
            if ctx.routes is not None:
                ids = ctx.routes.astype(jnp.int32)
        hot = jax.nn.one_hot(ids, cfg.n_routed_experts, dtype=jnp.float32)  # [B T K E]
        weights = jnp.einsum("BTKE,BTE->BTK", hot, scores)  # a gather whose gradient is no scatter
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        chosen = jnp.sum(hot, axis=2) * ctx.valid[..., None]
        aux = {"expert_load": jnp.sum(chosen, axis=(0, 1))}
        if self.kind == "moe":
            aux["balance_loss"] = balance_loss(scores, chosen, ctx.valid, cfg.num_experts_per_tok)
            if ctx.routes is not None:
                aux["disagreement"] = disagreement(ids, live, ctx.valid)
        if ctx.collect:
            aux["expert_ids"] = ids
        return ids, weights * cfg.routed_scaling_factor, aux


def disagreement(used: jax.Array, live: jax.Array, valid: jax.Array) -> jax.Array:
    """Share of the choices `used` that `live` does not hold, over valid tokens: float32 scalar.

    used, live: int32 [B, T, K], each token's K distinct experts in any order. valid: bool [B, T].
    """
    found = jnp.any(used[..., :, None] == live[..., None, :], axis=-1)
    choices = jnp.maximum(jnp.sum(valid), 1) * used.shape[-1]
    return jnp.sum(~found & valid[..., None]) / choices


def sqrtsoftplus(z: jax.Array) -> jax.Array:
    """sqrt(softplus(z)) with a finite gradient everywhere (the plain form has NaN below -88).

    exp(half the logarithm); far below zero log softplus(z) is z to float32's precision.
    """
    log = jnp.where(z <= -15, z, jnp.log(jax.nn.softplus(jnp.maximum(z, -15.0))))
    return jnp.exp(0.5 * log)


@jax.named_scope("balance_loss")
def balance_loss(scores: jax.Array, chosen: jax.Array, valid: jax.Array, k: int) -> jax.Array:
    """Sequence-wise balance loss of V3, eqs. 17-20, without its weight: mean over rows, scalar.

    f_i = E / (K T) #{t: i chosen},  P_i = mean_t s_ti / sum_j s_tj,  loss = sum_i f_i P_i.
    scores float32 [B, T, E]; chosen 0/1 [B, T, E], no gradient; valid bool [B, T].
    """
    tokens = jnp.maximum(jnp.sum(valid, axis=1), 1)[:, None]
    f = jnp.sum(chosen, axis=1) * (scores.shape[-1] / k) / tokens  # [B E]
    p = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20) * valid[..., None]
    p = jnp.sum(p, axis=1) / tokens
    return jnp.mean(jnp.sum(jax.lax.stop_gradient(f) * p, axis=-1))


def updated_bias(bias: jax.Array, load: jax.Array, speed) -> jax.Array:
    """b + speed * sign(mean load - load): V3 2.1.2, once a step. bias, load [..., E]."""
    return bias + speed * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)


def load_metrics(load: jax.Array) -> dict[str, jax.Array]:
    """How even the loads [..., E] of a router's experts are: float32 [...] each.

    load_max: the largest over the mean, from 1 (even) to E. dead_experts: how many got no token.
    load_entropy: -sum p log p / log E, p = load / its sum; from 1 (even) to 0 (one expert has all).
    Without any load, and of a single expert, the entropy is 0; without any load_max is 0 too.
    """
    load = load.astype(jnp.float32)
    experts = load.shape[-1]
    share = load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1e-30)
    entropy = -jnp.sum(jax.scipy.special.xlogy(share, share), axis=-1)
    return {
        "load_max": jnp.max(share, axis=-1) * experts,
        "dead_experts": jnp.sum(load == 0, axis=-1).astype(jnp.float32),
        "load_entropy": jnp.clip(entropy / math.log(max(experts, 2)), 0.0, 1.0),
    }


def hash_table(seed: int | tuple[int, ...], counts: np.ndarray, experts: int, k: int) -> np.ndarray:
    """tid2eid: int32 [V, K], K distinct experts a token, balanced over `counts`.

    Tokens are dealt in order of count, heaviest first, in rounds of E // K tokens; a round gives
    each of its tokens K experts of its own, the least loaded experts to the heaviest tokens, ties
    at random from `seed`. counts: [V], how often each token occurs (ones: over ids).
    """
    rng = np.random.default_rng(seed)
    counts = np.asarray(counts, np.float64)
    order = rng.permutation(len(counts))
    order = order[np.argsort(-counts[order], kind="stable")]
    load = np.zeros(experts)
    table = np.empty((len(counts), k), np.int32)
    for start in range(0, len(order), experts // k):
        tokens = order[start : start + experts // k]
        free = rng.permutation(experts)
        free = free[np.argsort(load[free], kind="stable")][: len(tokens) * k]
        table[tokens] = free.reshape(len(tokens), k)
        load[free] += np.repeat(counts[tokens], k)
    return table

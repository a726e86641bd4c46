"""Multi-token prediction, depth 1 (report 2.1, "as V3"; V3 2.2, eqs. 21-25).

    e_t    = rmsnorm(embed[id_{t+1}]) * enorm;   X_t[i] <- rmsnorm(X_t[i]) * hnorm   a stream
    X'_t[i] = e_proj e_t + h_proj X_t[i]         X: the main streams before the stream head
    X''    = Block(X')                           sliding attention, top-k MoE, token ids id_{t+1}
    logits_t = lm_head(rmsnorm(collapse(X'')) * norm)                      predicts id_{t+2}

Embedding and lm_head are the main model's. Departures: none.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax.config import SLIDING, ModelConfig
from v4jax.layers.block import Block
from v4jax.layers.context import Context
from v4jax.layers.hyper_connections import StreamHead, Streams
from v4jax.layers.parameter import Linear, RMSNorm


class MTP(nnx.Module):
    """The module that predicts the token after next."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        d = cfg.hidden_size
        self.enorm, self.hnorm = RMSNorm(cfg, rngs, d), RMSNorm(cfg, rngs, d)
        self.e_proj = Linear(cfg, rngs, d, d, ("embed", None))
        self.h_proj = Linear(cfg, rngs, d, d, ("embed", None))
        self.block = Block(cfg, rngs, SLIDING, "moe")
        self.hc_head = StreamHead(cfg, rngs)
        self.norm = RMSNorm(cfg, rngs, d)

    def __call__(
        self, streams: Streams, embedded: jax.Array, ctx: Context
    ) -> tuple[jax.Array, dict]:
        """Main streams, M arrays [B, T, D], and the tokens' embeddings [B, T, D] -> [B, T, D], aux.

        Row t is made from token t+1, so a sample's last row has none: it means nothing, no other
        row sees it, and it does not count in loads and auxiliary losses.
        """
        following = jnp.roll(ctx.token_ids, -1, axis=1)
        valid = ctx.valid.at[:, -1].set(False)
        if ctx.segment_ids is not None:
            valid &= jnp.roll(ctx.segment_ids, -1, axis=1) == ctx.segment_ids
        e = self.e_proj(self.enorm(jnp.roll(embedded, -1, axis=1)))
        x = tuple(e + self.h_proj(self.hnorm(s)) for s in streams)
        x, aux = self.block(x, dataclasses.replace(ctx, token_ids=following, valid=valid))
        return self.norm(self.hc_head(x)), aux

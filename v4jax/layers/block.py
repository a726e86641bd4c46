"""One layer: attention and mixture of experts, each behind its hyper-connection (report 2.2)."""

import jax
import numpy as np
from flax import nnx

from v4jax.config import ModelConfig
from v4jax.layers.attention import Attention
from v4jax.layers.context import Context
from v4jax.layers.experts import MoE
from v4jax.layers.hyper_connections import HyperConnection, Streams, mix
from v4jax.layers.parameter import RMSNorm


class Block(nnx.Module):
    """A layer of one attention kind and one mlp kind; hash layers take their table."""

    def __init__(
        self,
        cfg: ModelConfig,
        rngs: nnx.Rngs,
        attention: str,
        mlp: str,
        table: np.ndarray | None = None,
    ):
        self.attn_hc = HyperConnection(cfg, rngs)
        self.input_layernorm = RMSNorm(cfg, rngs, cfg.hidden_size)
        self.self_attn = Attention(cfg, rngs, attention)
        self.ffn_hc = HyperConnection(cfg, rngs)
        self.post_attention_layernorm = RMSNorm(cfg, rngs, cfg.hidden_size)
        self.mlp = MoE(cfg, rngs, mlp, table)

    def __call__(self, streams: Streams, ctx: Context) -> tuple[Streams, dict]:
        """M arrays [B, T, D] -> the same, and aux of both sublayers."""
        with jax.named_scope("hyper_connection"):
            x, post, comb = self.attn_hc(streams)
        with jax.named_scope("attention"):
            y, attention_aux = self.self_attn(self.input_layernorm(x), ctx)
        with jax.named_scope("hyper_connection"):
            between = mix(streams, y, post, comb)
            x, post, comb = self.ffn_hc(between)
        with jax.named_scope("moe"):
            y, moe_aux = self.mlp(self.post_attention_layernorm(x), ctx)
        with jax.named_scope("hyper_connection"):
            after = mix(between, y, post, comb)
        aux = attention_aux | moe_aux
        if ctx.collect:
            maps = self.attn_hc.maps(streams), self.ffn_hc.maps(between)
            aux |= {"streams": after, "maps": maps}
        return after, aux

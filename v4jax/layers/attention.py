"""Attention: one shared core, three kinds of far past (report 2.3).

    q   = rope(rmsnorm_per_head(rmsnorm(x q_a_proj.T) q_b_proj.T))       no weight in the head norm
    kv  = rope(rmsnorm(x kv_proj.T))              one head: the same tensor is key and value
    o_t = sum_j P_tj kv_j + sum_c P_tc entry_c    joint softmax over the last W tokens, the
                                                  entries, and one unscaled sink logit a head
    o_t <- rope(o_t, inverse); G groups of heads -> o_a_proj (a matrix a group) -> o_b_proj

Entries: none for sliding_attention; all visible ones for heavily_compressed_attention; of the
visible ones those that the indexer selects for compressed_sparse_attention. An entry is visible
from the token that closes its window onward, also while its tokens are in the sliding window.
Departures from the report: none.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas import select_topk
from kernels_pallas.visibility import is_visible
from v4jax import parallel
from v4jax.config import CSA, SLIDING, ModelConfig
from v4jax.layers import indexer, rope
from v4jax.layers.compressor import Compressor
from v4jax.layers.context import Context
from v4jax.layers.indexer import Indexer, index_loss
from v4jax.layers.kept_mass import kept_mass
from v4jax.layers.parameter import Linear, RMSNorm, parameter, rms_normalize
from v4jax.layers.sparse_attention import attend, gathers


class Attention(nnx.Module):
    """One attention layer of any of the three kinds."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, kind: str):
        d, n, h, g = cfg.hidden_size, cfg.num_attention_heads, cfg.head_dim, cfg.o_groups
        self.q_a_proj = Linear(cfg, rngs, d, cfg.q_lora_rank, ("rank", "embed"))
        self.q_a_norm = RMSNorm(cfg, rngs, cfg.q_lora_rank)
        self.q_b_proj = Linear(cfg, rngs, cfg.q_lora_rank, n * h, ("heads", "rank"))
        self.kv_proj = Linear(cfg, rngs, d, h, ("kv", "embed"))
        self.kv_norm = RMSNorm(cfg, rngs, h)
        self.sinks = parameter(cfg, rngs, "zero", (n,), (None,))
        self.o_a_proj = Linear(cfg, rngs, n * h // g, g * cfg.o_lora_rank, ("groups", None))
        self.o_b_proj = Linear(cfg, rngs, g * cfg.o_lora_rank, d, ("embed", "groups"))
        if kind != SLIDING:
            rate = getattr(cfg.compress_rates, kind)
            self.compressor = Compressor(cfg, rngs, rate, h, overlap=kind == CSA, axis="kv")
        if kind == CSA:  # below the compressor, as in the checkpoints' names
            self.compressor.indexer = Indexer(cfg, rngs)  # type: ignore[attr-defined]
        self.kind, self.config = kind, cfg

    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, dict]:
        """x [B, T, D], normed -> [B, T, D] and aux: `index_loss`, `index_kept_mass` of CSA."""
        cfg = self.config
        batch, length, _ = x.shape
        cos, sin = ctx.rotary[self.kind]
        heads = (cos[:, :, None], sin[:, :, None])
        with jax.named_scope("projections"):
            q_latent = self.q_a_norm(self.q_a_proj(x))
            q = self.q_b_proj(q_latent).reshape(batch, length, -1, cfg.head_dim)
            q = rope.rotate(rms_normalize(q, cfg.rms_norm_eps).astype(x.dtype), heads)
            kv = rope.rotate(self.kv_norm(self.kv_proj(x)), (cos, sin))

        aux: dict[str, Any] = {}
        windows = ctx.windows.get(self.kind)
        attention = q, kv, self.sinks[...], cfg.sliding_window, ctx.segment_ids
        if windows is None:
            o, _ = attend(*attention)
        else:
            entries = self.compressor.entries(x, windows, ctx.entry_rotary[self.kind])
            if self.kind == CSA:
                o, aux = self._selected(x, q_latent, (*attention, entries), ctx)
            else:
                o, _ = attend(*attention, entries, windows.seen)
        with jax.named_scope("output"):
            return self._output(rope.rotate(o, heads, inverse=True)), aux

    def _selected(self, x: jax.Array, q_latent: jax.Array, attention: tuple, ctx: Context):
        """o [B, T, N, H] of attention to the entries that the indexer selects, and aux.

        attention: `attend`'s arguments up to the entries.
        """
        cfg, seen = self.config, ctx.windows[CSA].seen
        operands = self.compressor.indexer.operands(x, q_latent, ctx)  # type: ignore[attr-defined]
        entries = operands[1].shape[1]
        dense = ctx.dense_index

        def over(attended, scores, among):
            o, mass = attend(*attention, attended=attended)
            return o, index_loss(scores, mass, among, ctx.valid)

        def every():
            return over(seen, indexer.scores(operands, ctx), is_visible(*seen, entries))

        def gathered():
            return over(chosen, indexer.scores_at(chosen, operands, ctx), chosen >= 0)

        if gathers(cfg.sparse_attention, entries, cfg.index_topk):
            chosen = indexer.select(operands, ctx, cfg.index_topk)
            if isinstance(dense, bool):
                o, loss = every() if dense else gathered()
            else:  # what `every` keeps for its gradient would be held in the other phase too
                o, loss = jax.lax.cond(dense, jax.checkpoint(every), gathered)
        else:
            scores = indexer.scores(operands, ctx)
            best = functools.partial(select_topk, top_k=cfg.index_topk, output="mask")
            with jax.named_scope("selection"):
                chosen = parallel.over_rows(lambda _, scores: best(scores), None, scores)
            mask = chosen | (is_visible(*seen, entries) & dense)
            o, loss = over(mask, scores, mask)
        kept = kept_mass(*attention, seen=seen, chosen=chosen, valid=ctx.valid)
        aux: dict[str, Any] = {"index_loss": loss, "index_kept_mass": kept}
        if ctx.collect:
            aux["index"] = {"operands": operands}
        return o, aux

    def _output(self, o: jax.Array) -> jax.Array:
        """Grouped low-rank projection: [B, T, N, H] -> [B, T, D]."""
        batch, length = o.shape[:2]
        groups = o.reshape(batch, length, self.config.o_groups, -1)  # [B T G N/G*H]
        o_a = self.o_a_proj.weight[...].astype(o.dtype)
        o_a = o_a.reshape(self.config.o_groups, -1, o_a.shape[-1])  # [G R N/G*H]
        latent = jnp.einsum("BTGX,GRX->BTGR", groups, o_a)
        return self.o_b_proj(latent.reshape(batch, length, -1))

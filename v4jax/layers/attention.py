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

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax.config import CSA, SLIDING, ModelConfig
from v4jax.layers import rope
from v4jax.layers.compressor import Compressor
from v4jax.layers.context import Context
from v4jax.layers.indexer import Indexer, index_loss, index_scores, select
from v4jax.layers.parameter import Linear, RMSNorm, parameter, rms_normalize


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
        """x [B, T, D], normed -> [B, T, D] and aux (`index_loss` of a CSA layer, ...)."""
        cfg = self.config
        batch, length, _ = x.shape
        cos, sin = ctx.rotary[self.kind]
        heads = (cos[:, :, None], sin[:, :, None])
        q_latent = self.q_a_norm(self.q_a_proj(x))
        q = self.q_b_proj(q_latent).reshape(batch, length, -1, cfg.head_dim)
        q = rope.rotate(rms_normalize(q, cfg.rms_norm_eps).astype(x.dtype), heads)
        kv = rope.rotate(self.kv_norm(self.kv_proj(x)), (cos, sin))

        aux: dict[str, Any] = {}
        entries, attended, scores = None, None, None
        windows = ctx.windows.get(self.kind)
        if windows is not None:
            entries = self.compressor.entries(x, windows, ctx.entry_rotary[self.kind])
            attended = windows.visible(length, ctx.segment_ids)
            if self.kind == CSA:
                indexer: Indexer = self.compressor.indexer  # type: ignore[attr-defined]
                operands = indexer.operands(x, q_latent, ctx)
                scores = index_scores(operands, ctx.index_formats)
                chosen = select(scores, attended, cfg.index_topk)
                if ctx.collect:
                    aux["index"] = {"operands": operands, "visible": attended, "chosen": chosen}
                attended = attended & (chosen | ctx.dense_index)
        o, mass = attend(
            q, kv, self.sinks[...], cfg.sliding_window, ctx.segment_ids, entries, attended
        )
        if scores is not None and attended is not None:
            aux["index_loss"] = index_loss(scores, mass, attended, ctx.valid)
        return self._output(rope.rotate(o, heads, inverse=True)), aux

    def _output(self, o: jax.Array) -> jax.Array:
        """Grouped low-rank projection: [B, T, N, H] -> [B, T, D]."""
        batch, length = o.shape[:2]
        groups = o.reshape(batch, length, self.config.o_groups, -1)  # [B T G N/G*H]
        o_a = self.o_a_proj.weight[...].astype(o.dtype)
        o_a = o_a.reshape(self.config.o_groups, -1, o_a.shape[-1])  # [G R N/G*H]
        latent = jnp.einsum("BTGX,GRX->BTGR", groups, o_a)
        return self.o_b_proj(latent.reshape(batch, length, -1))


def attend(q, kv, sinks, window: int, segment_ids=None, entries=None, attended=None):
    """Joint softmax attention over the sliding window, compressed entries and a sink.

    q [B, T, N, H]; kv [B, T, H], key and value of the one shared head; sinks [N]; entries
    [B, C, H] or None with attended bool [B, T, C]; segment_ids int32 [B, T] or None.
    Returns o [B, T, N, H] in q's dtype and the probability mass that all heads together give each
    entry, float32 [B, T, C] (None without entries). Logits and softmax are float32.

    Queries go in blocks of `window` against their own block's keys and the one before, instead
    of a [T, T] mask.
    """
    batch, length, n, h = q.shape
    block = min(window, length)
    blocks = -(-length // block)
    pad = blocks * block - length
    keep = _window_mask(length, block, window, segment_ids)  # [B or 1, blocks, block, S]

    def blocked(x):
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch, blocks, block, *x.shape[2:])

    q_rows = blocked(q).reshape(batch, blocks, block * n, h)
    keys = blocked(kv)
    if blocks > 1:
        before = jnp.pad(keys[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0)])
        keys = jnp.concatenate([before, keys], axis=2)  # [B blocks 2*block H]

    def logits_of(spec, keys, mask):
        logits = jnp.einsum(spec, q_rows, keys, preferred_element_type=jnp.float32) * h**-0.5
        logits = logits.reshape(batch, blocks, block, n, -1)
        return jnp.where(mask[..., None, :], logits, -jnp.inf)

    near = logits_of("BbXH,BbSH->BbXS", keys, keep)
    sinks = sinks.astype(jnp.float32)[:, None]
    top = jnp.maximum(jnp.max(near, axis=-1, keepdims=True), sinks)
    if entries is not None:
        far = logits_of("BbXH,BCH->BbXC", entries, blocked(attended))
        top = jnp.maximum(top, jnp.max(far, axis=-1, keepdims=True))
    top = jax.lax.stop_gradient(top)  # finite: the sink is
    near = jnp.exp(near - top)
    total = jnp.sum(near, axis=-1, keepdims=True) + jnp.exp(sinks - top)
    if entries is not None:
        far = jnp.exp(far - top)
        total = total + jnp.sum(far, axis=-1, keepdims=True)

    def weighted(spec, weights, values):
        rows = (weights / total).astype(q.dtype).reshape(batch, blocks, block * n, -1)
        return jnp.einsum(spec, rows, values, preferred_element_type=jnp.float32)

    def unblocked(x):
        return x.reshape(batch, blocks * block, *x.shape[3:])[:, :length]

    o, mass = weighted("BbXS,BbSH->BbXH", near, keys), None
    if entries is not None:
        o = o + weighted("BbXC,BCH->BbXH", far, entries)
        mass = unblocked(jnp.sum(jax.lax.stop_gradient(far / total), axis=3))
    o = o.reshape(batch, blocks, block, n, h).astype(q.dtype)
    return unblocked(o), mass


def _window_mask(length: int, block: int, window: int, segment_ids) -> jax.Array:
    """bool [B or 1, blocks, block, S]: which keys of its block and the one before a query sees."""
    blocks = -(-length // block)
    query = jnp.arange(blocks * block).reshape(blocks, block, 1)
    first = (jnp.arange(blocks) - (blocks > 1)) * block
    key = first[:, None, None] + jnp.arange(block * (1 + (blocks > 1)))  # [blocks 1 S]
    seen = (key <= query) & (query - key < window) & (key >= 0)
    if segment_ids is None:
        return seen[None]
    padded = jnp.pad(segment_ids, [(0, 0), (0, blocks * block - length)], constant_values=-1)
    of_key = jnp.take(padded, jnp.maximum(key[:, 0], 0), axis=1)  # [B blocks S]
    return seen & (padded.reshape(-1, blocks, block, 1) == of_key[:, :, None, :])

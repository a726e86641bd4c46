"""What every layer of one forward pass shares: positions, samples, rotary tables, options."""

import dataclasses

import jax
import jax.numpy as jnp

from v4jax.config import CSA, HCA, SLIDING, ModelConfig
from v4jax.layers import rope
from v4jax.layers.windows import Windows
from v4jax.numerics import Format


@dataclasses.dataclass(frozen=True)
class IndexFormats:
    """What the indexer's operands and scores are rounded to; None leaves them alone.

    query, key: a format, applied after the Hadamard rotation (report 5.2.1) of both, if one of the
      formats is `rotated`.
    scores: "bf16" or None (float32).
    """

    query: Format | None = None
    key: Format | None = None
    scores: str | None = None


UNROUNDED = IndexFormats()


@dataclasses.dataclass(frozen=True)
class Context:
    """Shared by all layers of one forward pass.

    token_ids: int32 [B, T]. positions: int32 [B, T], restarting with each sample.
    segment_ids: int32 [B, T] or None (one sample a row); 0 marks padding.
    valid: bool [B, T], the tokens that count in loads and auxiliary losses: no padding.
    rotary: attention kind -> (cos, sin) float32 [B, T, r/2] of the tokens.
    windows: attention kind -> its compression windows; a kind without a window is absent.
    entry_rotary: attention kind -> (cos, sin) float32 [B, C, r/2] at each window's first token.
    dense_index: bool or bool scalar; True lets CSA attend to every visible entry.
    collect: True adds what analysis needs (streams, index operands, expert choices) to aux.
    routes: int [B, T, K], a layer's own: the experts that its "moe" router takes in place of those
        that it would choose now. None: it chooses.
    """

    token_ids: jax.Array
    positions: jax.Array
    segment_ids: jax.Array | None
    valid: jax.Array
    rotary: dict[str, tuple[jax.Array, jax.Array]]
    windows: dict[str, Windows]
    entry_rotary: dict[str, tuple[jax.Array, jax.Array]]
    index_formats: IndexFormats
    dense_index: jax.Array | bool
    collect: bool
    routes: jax.Array | None = None


def sample_positions(segment_ids: jax.Array) -> jax.Array:
    """Position of each token in its own sample: int32 [B, T] from segment ids [B, T]."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    start = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(start, index, 0), axis=1)


@jax.named_scope("context")
def make_context(
    cfg: ModelConfig,
    token_ids: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    index_formats: IndexFormats = UNROUNDED,
    dense_index: jax.Array | bool = False,
    collect: bool = False,
) -> Context:
    """Builds the context of `token_ids` int32 [B, T]; each sample's positions start at 0."""
    if segment_ids is None:
        positions = jnp.broadcast_to(
            jnp.arange(token_ids.shape[1], dtype=jnp.int32), token_ids.shape
        )
    else:
        positions = sample_positions(segment_ids)
    main = rope.table(positions, rope.main_frequencies(cfg))
    frequencies = rope.compress_frequencies(cfg)
    compress = rope.table(positions, frequencies)
    windows = {}
    for kind in (CSA, HCA):
        rate = getattr(cfg.compress_rates, kind)
        if kind in cfg.layer_types and token_ids.shape[1] >= rate:
            windows[kind] = Windows.make(rate, positions, segment_ids)
    return Context(
        token_ids=token_ids,
        positions=positions,
        segment_ids=segment_ids,
        valid=jnp.ones_like(token_ids, bool) if segment_ids is None else segment_ids > 0,
        rotary={SLIDING: main, CSA: compress, HCA: compress},
        windows=windows,
        entry_rotary={k: rope.table(w.position, frequencies) for k, w in windows.items()},
        index_formats=index_formats,
        dense_index=dense_index,
        collect=collect,
    )

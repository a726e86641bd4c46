"""Attention over a sliding window, compressed entries and a sink, in pieces of queries.

    P_t = softmax over (window logits, logits of the entries attended to, sink logit)
    o_t = sum_j P_tj kv_j + sum_c P_tc entry_c

Two forms of the entries' part, equal but for rounding:

    masked    every query against every entry, what is not attended to masked: matmuls of
              length x entries
    gathered  a query's top_k entries are looked up: length x top_k. Their gradients are summed
              back by a scatter-add in float32.

Both run over pieces of the queries, one after the other, and the backward pass computes a piece
again from q, keys and entries. What is alive at a time is a piece's logits, which fit a CPU's
cache; an array of [heads, length, entries] never exists.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import platform
from kernels_pallas.visibility import is_visible

GATHER_ABOVE = 4  # entries / top_k above which "auto" gathers: where the two cross on a CPU
PIECE = {"cpu": 2**18}  # float32 numbers alive in a piece, more or less; 1 MB is a CPU's L2 cache
ACCELERATOR_PIECE = 2**26


def gathers(form: str, entries: int, top_k: int) -> bool:
    """Whether `form`, a `ModelConfig.sparse_attention`, looks `top_k` of so many `entries` up."""
    return form == "gathered" or (form == "auto" and entries > GATHER_ABOVE * top_k)


@jax.named_scope("attend")
def attend(q, kv, sinks, window: int, segment_ids=None, entries=None, attended=None):
    """Joint softmax attention over the sliding window, compressed entries and a sink.

    q [B, T, N, H]; kv [B, T, H], key and value of the one shared head; sinks [N]; segment_ids
    int32 [B, T] or None; entries [B, C, H] or None. attended: which entries, as a mask bool
    [B, T, C], a range (first, end) int32 [B, T] each, or indices int32 [B, T, K], -1 for none.
    Returns o [B, T, N, H] in q's dtype and the probability mass that all heads together give each
    entry, float32 [B, T, C], or [B, T, K] of indices (None without entries), which carries no
    gradient. Logits and softmax are float32.

    Queries go in blocks of `window` against their own block's keys and the one before, instead
    of a [T, T] mask.
    """
    batch, length, n, h = q.shape
    block = min(window, length)
    blocks = -(-length // block)

    def blocked(x):
        pad = [(0, 0), (0, blocks * block - length)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, pad).reshape(x.shape[0], blocks, block, *x.shape[2:])

    keys = blocked(kv)
    if blocks > 1:
        before = jnp.pad(keys[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0)])
        keys = jnp.concatenate([before, keys], axis=2)  # [B blocks 2*block H]
    keep = _window_mask(length, block, window, segment_ids)
    pieces = blocked(q), keys, jnp.broadcast_to(keep, (batch, *keep.shape[1:]))
    pieces += (jax.tree.map(blocked, attended),)
    far, looked_up = 0, 0
    if entries is not None:
        # Float32 outside the pieces, so that their gradients add up in it.
        entries = entries.astype(jnp.float32)
        far = entries.shape[1]
        if _is_index(attended):
            far = attended.shape[-1]
            looked_up = far * h
    o, mass = in_pieces(
        functools.partial(_attend_piece, sinks.astype(jnp.float32), entries),
        pieces,
        batch * block * (n * (keys.shape[2] + far) + looked_up),
    )

    def unblocked(x):
        return x.reshape(batch, blocks * block, *x.shape[3:])[:, :length]

    return jax.tree.map(unblocked, (o, mass))


def _is_index(attended) -> bool:
    return not isinstance(attended, tuple) and attended.dtype == jnp.int32


def _attend_piece(sinks, entries, piece):
    """`attend` of q [B, b, t, N, H] over keys [B, b, S, H] masked by [B, b, t, S], and entries.

    Rows of logits lie along one axis, for the reason that `rms_normalize` gives.
    """
    q, keys, keep, attended = piece
    batch, blocks, block, n, h = q.shape

    def masked(logits, mask):
        logits = logits.reshape(-1, n, logits.shape[-1]) * h**-0.5
        return jnp.where(mask.reshape(-1, 1, mask.shape[-1]), logits, -jnp.inf)

    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    rows = q.reshape(batch, blocks, block * n, h)
    with jax.named_scope("window"):
        near = masked(dot("BbXH,BbSH->BbXS", rows, keys), keep)
    sinks = sinks[:, None]
    top = jnp.maximum(jnp.max(near, axis=-1, keepdims=True), sinks)
    if entries is not None:
        with jax.named_scope("entries"):
            if _is_index(attended):
                each = q.reshape(-1, n, h)
                found = take_entries(entries, attended).reshape(len(each), -1, h)
                far = masked(dot("XNH,XKH->XNK", each, found.astype(q.dtype)), attended >= 0)
            else:
                if isinstance(attended, tuple):
                    first, end = attended
                    attended = is_visible(first, end, entries.shape[1])
                each = q.reshape(batch, -1, h)
                far = masked(dot("BXH,BCH->BXC", each, entries.astype(q.dtype)), attended)
        top = jnp.maximum(top, jnp.max(far, axis=-1, keepdims=True))
    top = jax.lax.stop_gradient(top)  # finite: the sink is
    near = jnp.exp(near - top)
    total = jnp.sum(near, axis=-1, keepdims=True) + jnp.exp(sinks - top)
    if entries is not None:
        far = jnp.exp(far - top)
        total = total + jnp.sum(far, axis=-1, keepdims=True)
    with jax.named_scope("window"):
        p = (near / total).astype(q.dtype).reshape(batch, blocks, block * n, -1)
        o, mass = dot("BbXS,BbSH->BbXH", p, keys).reshape(q.shape), None
    if entries is not None:
        with jax.named_scope("entries"):
            p = far / total
            mass = jnp.sum(jax.lax.stop_gradient(p), axis=1).reshape(*attended.shape)
            p = p.astype(q.dtype)
            if _is_index(attended):
                o_far = dot("XNK,XKH->XNH", p, found.astype(q.dtype))
            else:
                p = p.reshape(*each.shape[:2], -1)
                o_far = dot("BXC,BCH->BXH", p, entries.astype(q.dtype))
            o = o + o_far.reshape(q.shape)
    return o.astype(q.dtype), mass


def take_entries(entries: jax.Array, index: jax.Array) -> jax.Array:
    """entries [B, C, H] at index int32 [B, ..., K] -> [B, ..., K, H]; -1 reads the first."""
    flat = jnp.maximum(index, 0).reshape(index.shape[0], -1)
    rows = jax.vmap(lambda e, i: e.at[i].get(mode="promise_in_bounds"))(entries, flat)
    return rows.reshape(*index.shape, entries.shape[-1])


def in_pieces(function, arrays, numbers: int):
    """function(arrays), of which axis 1 is done piece by piece, one after the other.

    arrays: a tree of [B, L, ...], rows of axis 1 independent of one another; so is the result.
    numbers: how many float32 numbers a row of axis 1 keeps alive; a piece has as many rows as make
    PIECE of them, and is computed again in the backward pass. Where all rows make no more than four
    pieces there is no loop: it would save a little time, and cost as much again to compile.

    Pieces are cut along the length and hold the whole batch, which may be sharded.
    """
    batch, length = jax.tree.leaves(arrays)[0].shape[:2]
    piece = PIECE.get(platform(), ACCELERATOR_PIECE)
    if length * numbers <= 4 * piece:
        return function(arrays)
    count = -(-length // max(1, piece // numbers))
    rows = -(-length // count)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, count * rows - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, rows, *x.shape[2:]), 1, 0)

    def joined(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(batch, count * rows, *x.shape[3:])[:, :length]

    again = jax.checkpoint(function, prevent_cse=False)
    return jax.tree.map(joined, jax.lax.map(again, jax.tree.map(cut, arrays)))


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

"""Which compressed entries a query sees: a half-open range, since a sample's entries are adjacent.

Every `ratio` tokens of a sample make an entry, which its queries see from the token that closes it
onward. A sample's last, incomplete window makes none (report 3.4.3).
"""

import jax
import jax.numpy as jnp

Range = tuple[jax.Array, jax.Array]


def visible_range(
    batch: int,
    length: int,
    entries: int,
    ratio: int,
    segment_ids: jax.Array | None = None,
    offset: jax.Array | int = 0,
) -> Range:
    """(first, end), int32 [batch, length] each: query t sees entries first <= s < end.

    Where a query sees none, first == end. Without segment_ids a row is one sample, whose token
    `offset` (an integer, or [batch]) is query 0: end = (offset + t + 1) // ratio.
    segment_ids: int [batch, length]; a run of equal ids is a sample. Padding, a run of zeros, is
    one too: it sees itself, and no sample sees it.
    """
    if segment_ids is None:
        token = jnp.arange(length, dtype=jnp.int32) + jnp.asarray(offset, jnp.int32)[..., None]
        end = jnp.broadcast_to(jnp.minimum((token + 1) // ratio, entries), (batch, length))
        return jnp.zeros_like(end), end
    token = jnp.arange(length, dtype=jnp.int32)
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    position = token - jax.lax.cummax(jnp.where(starts, token, 0), axis=1)
    closes = (position + 1) % ratio == 0
    end = jnp.cumsum(closes, axis=1, dtype=jnp.int32)
    first = end - (position + 1) // ratio
    return jnp.minimum(first, entries), jnp.minimum(end, entries)


def is_visible(first: jax.Array, end: jax.Array, entries: int) -> jax.Array:
    """bool [B, T, S] of a range [B, T]."""
    entry = jnp.arange(entries, dtype=jnp.int32)
    return (first[..., None] <= entry) & (entry < end[..., None])


def joint_range(first: jax.Array, end: jax.Array) -> Range:
    """int32 [1, T] each: the range that holds what the queries [B, T] of any row see."""
    nothing = jnp.iinfo(first.dtype).max
    low = jnp.min(jnp.where(first < end, first, nothing), axis=0, keepdims=True)
    return low, jnp.max(end, axis=0, keepdims=True)

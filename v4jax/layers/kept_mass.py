"""How much of the attention on the far past a CSA layer's selection keeps: its live metric.

    mass[t, c] = sum over heads of softmax over (window, every visible entry, sink) at entry c
    kept       = sum of mass over the selected entries / sum of mass over the visible ones

Of a few queries a row, spread evenly, that see more entries than are selected (the others keep all
that they see). The attention is the dense one: what the layer would do without a selection, with
the weights that it has, in the dense stage too. Nothing here carries a gradient.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.visibility import Range, is_visible
from v4jax import parallel
from v4jax.layers.sparse_attention import in_pieces

QUERIES = 16


@jax.named_scope("kept_mass")
def kept_mass(q, kv, sinks, window: int, segment_ids, entries, seen: Range, chosen, valid):
    """Share of the dense attention's mass over visible entries on `chosen` ones: float32 scalar.

    q, kv, sinks, window, segment_ids and entries as `sparse_attention.attend` takes them. seen: the
    range (first, end) of visible entries, int32 [B, T] each. chosen: bool [B, T, C], or indices
    int32 [B, T, K], -1 for none. valid: bool [B, T], false on padding. At most QUERIES of a row's T
    queries are looked at. 1 where none of them has entries to select among.
    """
    length = q.shape[1]
    step = -(-length // QUERIES) | 1  # odd, so that a query may be at any place in a window
    at = np.arange(step - 1, length, step)
    key = at[:, None] - np.arange(min(window, length))  # [S W], S sampled queries
    q, kv, sinks, entries = jax.lax.stop_gradient((q, kv, sinks, entries))

    def sampled(x):
        return x[:, step - 1 :: step]

    def of_rows(sinks, q, kv, segment_ids, entries, *of_query):
        near = jnp.broadcast_to(jnp.asarray(key >= 0), (q.shape[0], *key.shape))
        clipped = np.maximum(key, 0)
        if segment_ids is not None:
            near &= segment_ids[:, clipped] == segment_ids[:, at, None]
        pieces = q, kv[:, clipped], near, *of_query
        numbers = q.shape[0] * q.shape[2] * (key.shape[1] + entries.shape[1])
        return in_pieces(functools.partial(_of_piece, sinks, entries), pieces, numbers)

    kept, whole, choice = parallel.over_rows(
        of_rows, sinks, sampled(q), kv, segment_ids, entries, *map(sampled, (*seen, chosen))
    )
    counted = choice & sampled(valid)
    kept, whole = (jnp.sum(jnp.where(counted, x, 0.0)) for x in (kept, whole))
    return jnp.where(whole > 0, kept / jnp.where(whole > 0, whole, 1.0), 1.0)


def _of_piece(sinks, entries, piece):
    """Mass on chosen and on visible entries, float32 [B, S], and whether a choice was to be made.

    q [B, S, N, H], their windows' keys [B, S, W, H], which of those count [B, S, W].
    """
    q, keys, near, first, end, chosen = piece
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    visible = is_visible(first, end, entries.shape[1])
    logits = dot("BSNH,BSWH->BSNW", q, keys), dot("BSNH,BCH->BSNC", q, entries)
    close, far = (
        jnp.where(mask[:, :, None], x * q.shape[-1] ** -0.5, -jnp.inf)
        for x, mask in zip(logits, (near, visible), strict=True)
    )
    total = jnp.logaddexp(jax.nn.logsumexp(close, axis=-1), sinks.astype(jnp.float32))
    total = jnp.logaddexp(total, jax.nn.logsumexp(far, axis=-1))
    mass = jnp.sum(jnp.exp(far - total[..., None]), axis=2)  # [B S C]
    if chosen.dtype == jnp.int32:
        taken = chosen >= 0
        of_chosen = jnp.take_along_axis(mass, jnp.maximum(chosen, 0), axis=-1)
    else:
        taken, of_chosen = chosen, mass
    kept = jnp.sum(jnp.where(taken, of_chosen, 0.0), axis=-1)
    return kept, jnp.sum(mass, axis=-1), jnp.sum(taken, axis=-1) < end - first

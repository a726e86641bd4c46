"""The Triton kernel of the lightning indexer, for Hopper, and both kernels over blocks of queries.

    out[t, s] = scale[s] * sum_i w[t, i] relu(q[t, i] . k[s])

A program holds the heads of a few queries and goes over tiles of entries. In the product entries
are the rows and (query, head) the columns, so that a thread holds whole runs of heads and the sum
over them is its own affair, but for two shuffles. Tiles that no query of a program sees are written
as -inf and not computed. FP8 operands (`fold`) go to the FP8 units.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from kernels_pallas import compat
from kernels_pallas.blocks import over_blocks
from kernels_pallas.select_topk_gpu import select

COLUMNS = 128  # (query, head) pairs of a program
ENTRIES = 64  # of a tile: the rows of one warp group's product
PARTS = 8  # that the heads are split into
SPAN = 16  # tiles of a program, at most
PROGRAMS = 132 * 8  # that keep an H100 busy: a program gets fewer tiles where there were less
L2 = 24 << 20  # bytes of scores between the two kernels: half of an H100's cache


def scores(
    q: Array,
    k: Array,
    head_weights: Array,
    first: Array,
    end: Array,
    *,
    row_scale_q: Array | None = None,
    row_scale_k: Array | None = None,
    score_dtype: DTypeLike,
    interpret: bool = False,
) -> Array:
    """q [B, T, I, J], k [B, S, J], head_weights [B, T, I] -> [B, T, S] of score_dtype.

    q and k: both of one type, float8_e4m3fn, bfloat16 or float32 (products as exact as float32's).
    first, end: int32 [B, T]; query t sees entries first <= s < end, others get -inf.
    row_scale_q float32 [B, T, I], row_scale_k float32 [B, S]: what the rows of q and k are to be
    multiplied by, positive.
    """
    batch, length, heads, depth = q.shape
    entries = k.shape[1]
    if 0 in (batch, length, entries):
        return jnp.full((batch, length, entries), -jnp.inf, score_dtype)
    w = head_weights.astype(jnp.float32)
    w = w if row_scale_q is None else w * row_scale_q
    scale = jnp.ones((batch, entries), jnp.float32) if row_scale_k is None else row_scale_k
    columns = pl.next_power_of_2(heads)
    queries = max(1, COLUMNS // columns)
    queries = min(queries, max(pl.next_power_of_2(length), 16 // columns))
    wide = max(32, pl.next_power_of_2(depth))
    late = (0, -length % queries)
    q = _pad(q, (0, 0), late, (0, columns - heads), (0, wide - depth))
    k = _pad(k, (0, 0), (0, 0), (0, wide - depth))
    w = _pad(w, (0, 0), late, (0, columns - heads))
    first, end = (_pad(x, (0, 0), late) for x in (first, end))
    out = _scores(q, k, w, scale, first, end, queries, jnp.dtype(score_dtype), interpret)
    return out[:, :length]


def _pad(x: Array, *widths: tuple[int, int]) -> Array:
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def _scores(q, k, w, scale, first, end, queries, dtype, interpret):
    batch, length, heads, depth = q.shape
    entries = k.shape[1]
    blocks = batch * (length // queries)
    tiles = pl.cdiv(entries, ENTRIES)
    span = max(1, min(SPAN, tiles, tiles * blocks // PROGRAMS))
    kernel = functools.partial(_scores_kernel, queries=queries, span=span, interpret=interpret)
    return pl.pallas_call(
        kernel,
        grid=(blocks, pl.cdiv(tiles, span)),
        out_shape=compat.result((batch, length, entries), dtype, q, k, w, scale, first, end),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="index_scores",
    )(
        q.reshape(batch, length * heads, depth),
        k,
        w.reshape(batch, length * heads),
        scale,
        first,
        end,
    )


def _scores_kernel(
    q_ref, k_ref, w_ref, scale_ref, first_ref, end_ref, out_ref, *, queries, span, interpret
):
    entries = k_ref.shape[1]
    length = first_ref.shape[1]
    columns = q_ref.shape[1] // length * queries  # (query, head) pairs
    block, chunk = pl.program_id(0), pl.program_id(1)
    row, t = block // (length // queries), block % (length // queries) * queries
    query = t + jnp.arange(queries)
    first, end = first_ref[row, pl.ds(t, queries)], end_ref[row, pl.ds(t, queries)]
    depth = jnp.arange(k_ref.shape[2])
    q = q_ref[row, pl.ds(t // queries * columns, columns), :]
    w = w_ref[row, pl.ds(t // queries * columns, columns)]

    def store(s, values):
        target = out_ref.at[row, query[None, :], s[:, None]]
        plgpu.store(target, values.astype(out_ref.dtype), mask=(s < entries)[:, None])

    def fill(i, carry):
        s = i * ENTRIES + jnp.arange(ENTRIES)
        store(s, jnp.full((ENTRIES, queries), -jnp.inf, jnp.float32))
        return carry

    def tile(i, carry):
        s = i * ENTRIES + jnp.arange(ENTRIES)
        k = plgpu.load(k_ref.at[row, s[:, None], depth[None, :]], mask=(s < entries)[:, None])
        scale = plgpu.load(scale_ref.at[row, s], mask=s < entries)
        score = _head_sum(_products(k, q, interpret), w, queries) * scale[:, None]
        seen = (first[None, :] <= s[:, None]) & (s[:, None] < end[None, :])
        store(s, jnp.where(seen, score, -jnp.inf))
        return carry

    begin = chunk * span
    stop = jnp.minimum(begin + span, pl.cdiv(entries, ENTRIES))
    low = jnp.clip(jnp.min(first) // ENTRIES, begin, stop)
    high = jnp.clip((jnp.max(end) + ENTRIES - 1) // ENTRIES, low, stop)
    lax.fori_loop(begin, low, fill, 0)
    lax.fori_loop(low, high, tile, 0)
    lax.fori_loop(high, stop, fill, 0)


def _products(k, q, interpret):
    """k q^T [entries, (query, head)], float32."""
    if k.dtype.itemsize == 1:
        return compat.triton_dot_fp8(k, q)
    return compat.triton_dot(k, q, 1, 1, interpret)


def _head_sum(products, w, queries):
    """sum_i w[t, i] relu(products[s, (t, i)]): [entries, queries].

    Heads go in `PARTS` parts, which are added up by FMAs; the rest are plain additions.
    """
    heads = products.shape[1] // queries
    parts = min(PARTS, heads)

    def cut(x):
        return lax.split(x.reshape(-1, queries, heads), (heads // parts,) * parts, axis=2)

    total = 0.0
    for a, w_part in zip(cut(products), cut(w), strict=True):
        a, w_part = jnp.maximum(a, 0), jnp.broadcast_to(w_part, a.shape)
        total = a * w_part if isinstance(total, float) else compat.triton_fma(a, w_part, total)
    return jnp.sum(total, axis=2)


def index_select(
    q: Array,
    k: Array,
    head_weights: Array,
    first: Array,
    end: Array,
    top_k: int,
    *,
    row_scale_q: Array | None = None,
    row_scale_k: Array | None = None,
    score_dtype: DTypeLike,
    output: str,
    interpret: bool = False,
):
    """select(scores(...), top_k), over blocks of queries whose scores stay in the L2 cache."""
    batch, length = first.shape
    row = max(1, batch * k.shape[1] * jnp.dtype(score_dtype).itemsize)
    steps = pl.cdiv(length, max(1, L2 // row // 16 * 16)) if length else 1
    block = pl.cdiv(pl.cdiv(length, steps), 16) * 16 if steps > 1 else length
    w = head_weights.astype(jnp.float32)
    w = w if row_scale_q is None else w * row_scale_q

    def one(q, w, first, end):
        made = scores(
            q, k, w, first, end, row_scale_k=row_scale_k,
            score_dtype=score_dtype, interpret=interpret,
        )  # fmt: skip
        return select(made, top_k, output=output, interpret=interpret)

    return over_blocks(one, (q, w, first, end), block)

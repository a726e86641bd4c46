"""Mosaic TPU kernel of `index_select`: scores and their selection; no score ever leaves VMEM.

For a block of queries the entries that any of them sees pass by in blocks. Their scores

    score[t, s] = k_scale[s] sum_i w[t, i] relu(q[t, i] . k[s])

become integers of the same order (the selection's: -0 equal to +0, NaN and what is not visible
below everything), which stay in VMEM. After the last block the k-th largest is found bit by bit, a
count over all of them each, and of the entries equal to it the lowest, by a search over positions.
Heads lie before queries, so that a product has many rows and the sum over heads is a plain one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from kernels_pallas import compat, tpu
from kernels_pallas.select_tpu import LANES, Blocks, Order, threshold, write_mask

ROWS = 1024  # of one product: some heads times a block of queries
OPERANDS = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")


def select(
    q: Array,
    k: Array,
    head_weights: Array,
    first: Array,
    end: Array,
    top_k: int,
    *,
    row_scale_q: Array | None = None,
    row_scale_k: Array | None = None,
    score_dtype: DTypeLike = jnp.float32,
    output: str = "mask",
    interpret: tpu.Interpret = False,
):
    """The top_k best entries of each query among first <= s < end.

    q [B, T, I, J] and k [B, S, J] of one of OPERANDS (both the same), head_weights [B, T, I], first
    and end int32 [B, T]. row_scale_q [B, T, I], row_scale_k [B, S]: factors of the rows, not below
    0, for operands whose scales are not folded in. output "mask": bool [B, T, S]; "threshold":
    (value of score_dtype, last int32) [B, T], as `select_topk` defines them.
    Raises ValueError, one line, for other dtypes or outputs, and where the keys of a block of rows
    do not fit into VMEM.
    """
    if q.dtype != k.dtype or q.dtype.name not in OPERANDS:
        raise ValueError(
            f"index_select: tpu: q is {q.dtype}, k is {k.dtype}, allowed: both the same of "
            + ", ".join(OPERANDS)
        )
    if output not in ("mask", "threshold"):
        raise ValueError(f"index_select: tpu: output={output!r}, allowed: mask, threshold")
    batch, length, heads, width = q.shape
    entries = k.shape[1]
    tiles = Tiles.make(heads, width, length, entries, q.dtype)
    w = head_weights.astype(jnp.float32)
    w = w if row_scale_q is None else w * row_scale_q.astype(jnp.float32)
    queries = functools.partial(_pad, axis=1, size=tiles.queries)
    ranges = jnp.stack([first, jnp.minimum(end, entries)], axis=-1)
    ranges = queries(ranges.astype(jnp.int32))
    low, high = _blocks(ranges, tiles)
    operands = [
        jnp.swapaxes(queries(q), 1, 2),
        _pad(k, 1, tiles.entries),
        queries(w),
        ranges,
    ]
    if row_scale_k is not None:
        operands.append(_pad(row_scale_k.astype(jnp.float32)[:, None], 2, tiles.entries))
    order = Order(16 if jnp.dtype(score_dtype) == jnp.bfloat16 else 32)
    every = top_k >= entries
    kernel = functools.partial(_kernel, tiles=tiles, order=order, top_k=0 if every else top_k)

    def call(low, high, *operands):
        return _call(kernel, low, high, operands, tiles, output, interpret)

    out = _with_joined_batches(call)(low, high, *operands)
    if output == "mask":
        return out[0][:, :length, :entries] != 0
    value, last = (a[:, :length, 0] for a in out)
    return value.astype(score_dtype), last


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Queries and entries a block, and heads a product."""

    queries: int
    entries: int
    heads: int

    @classmethod
    def make(cls, heads: int, width: int, length: int, entries: int, dtype) -> Tiles:
        """The largest that fit into VMEM, or ValueError."""
        size = min(1024, LANES * pl.cdiv(entries, LANES))
        all_entries = size * pl.cdiv(entries, size)
        for queries in (64, 32):  # an int8 tile has 32 rows
            if queries == 64 and length <= 32:
                continue
            together = max(1, ROWS // queries)
            while heads % together:
                together -= 1
            need = (
                2 * (heads * queries + size) * max(width, LANES) * dtype.itemsize
                + heads * queries * LANES * 4
                + queries * all_entries * (4 + 2)  # keys, and the mask twice
                + (together + 4) * queries * size * 4
            )
            if need <= tpu.VMEM:
                return cls(queries, size, together)
        raise ValueError(
            f"index_select: tpu: {entries} entries and {heads} heads x {width} need {need >> 20} "
            f"MiB of VMEM, allowed: {tpu.VMEM >> 20} (or implementation='xla')"
        )


def _pad(x: Array, axis: int, size: int) -> Array:
    """x with zeros up to a multiple of `size` on one axis."""
    missing = [(0, -x.shape[i] % size if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, missing)


def _blocks(ranges: Array, tiles: Tiles) -> tuple[Array, Array]:
    """The first block of entries that a block of queries sees, and the one after the last.

    int32 [B, T / queries] each; equal where it sees none.
    """
    batch, length, _ = ranges.shape
    first, end = jnp.moveaxis(ranges.reshape(batch, -1, tiles.queries, 2), -1, 0)
    sees = first < end
    high = pl.cdiv(jnp.max(jnp.where(sees, end, 0), axis=-1), tiles.entries)
    low = jnp.min(jnp.where(sees, first, jnp.iinfo(jnp.int32).max), axis=-1) // tiles.entries
    return jnp.minimum(low, high), high


def _with_joined_batches(
    call: Callable[..., tuple[Array, ...]],
) -> Callable[..., tuple[Array, ...]]:
    """`call`, of arrays with the batch first, whose vmap is one call with a larger batch.

    Its results are fused with nothing, for the reason that `tpu.looped` has.
    """
    run = custom_vmap(lambda *arrays: lax.optimization_barrier(call(*arrays)))

    @run.def_vmap
    def _(size, is_batched, *arrays):
        joined = [
            a if has_axis else jnp.broadcast_to(a, (size, *a.shape))
            for a, has_axis in zip(arrays, is_batched, strict=True)
        ]
        out = run(*(a.reshape(-1, *a.shape[2:]) for a in joined))
        return tuple(a.reshape(size, -1, *a.shape[1:]) for a in out), (True,) * len(out)

    return run


def _call(kernel, low, high, operands, tiles: Tiles, output: str, interpret):
    """The pallas_call: batch x blocks of queries x blocks of entries."""
    (batch, heads, length, width), entries = operands[0].shape, operands[1].shape[1]
    queries, size = tiles.queries, tiles.entries

    def block(b, t, s, low, high):
        return jnp.maximum(jnp.minimum(low[b, t] + s, high[b, t] - 1), 0)

    def per_query(last):
        return pl.BlockSpec((1, queries, last), lambda b, t, s, *_: (b, t, 0))

    in_specs = [
        pl.BlockSpec((1, heads, queries, width), lambda b, t, s, *_: (b, 0, t, 0)),
        pl.BlockSpec((1, size, width), lambda *i: (i[0], block(*i), 0)),
        per_query(heads),
        per_query(2),
    ]
    if len(operands) > 4:
        in_specs.append(pl.BlockSpec((1, 1, size), lambda *i: (i[0], 0, block(*i))))
    results = [(entries, jnp.int8)] if output == "mask" else [(1, jnp.float32), (1, jnp.int32)]
    types = tuple(
        compat.result((batch, length, last), dtype, low, high, *operands) for last, dtype in results
    )
    return pl.pallas_call(
        functools.partial(kernel, scaled=len(operands) > 4, masked=output == "mask"),
        out_shape=types,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, length // queries, entries // size),
            in_specs=in_specs,
            out_specs=tuple(per_query(last) for last, _ in results),
            scratch_shapes=[
                pltpu.VMEM((heads, queries, LANES), jnp.float32),
                pltpu.VMEM((entries // size, queries, size), jnp.int32),
                pltpu.VMEM((queries, size), jnp.int32),
            ],
        ),
        compiler_params=tpu.params(3),
        name="index_select",
        interpret=interpret,
    )(low, high, *operands)


def _kernel(low, high, q, k, w, ranges, *refs, tiles, order, top_k, scaled, masked):
    """One block of entries for one block of queries; after the last the selection."""
    scale, refs = (refs[0], refs[1:]) if scaled else (None, refs)
    *outs, weights, keys, spare = refs
    step, at = pl.program_id(2), (pl.program_id(0), pl.program_id(1))
    start, stop = low[at], high[at]

    @pl.when(step == 0)
    def _():  # a query's weight of a head, in every lane
        for head in range(w.shape[2]):
            one = w[0, :, head : head + 1]
            weights[head] = jnp.broadcast_to(one, (tiles.queries, LANES))

    @pl.when(start + step < stop)
    def _():
        block = start + step
        scores = _scores(q, k, weights, tiles)
        if scale is not None:
            scores = scores * scale[0]
        entry = block * tiles.entries + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        seen = ranges[0]
        visible = (seen[:, 0:1] <= entry) & (entry < seen[:, 1:2])
        keys[block] = order.keys(scores, visible)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        blocks = Blocks(keys, start, stop)
        value, last = threshold(blocks, spare, order, top_k)
        if masked:
            write_mask(outs[0], blocks, value, last)
        else:
            outs[0][0], outs[1][0] = order.scores(value), last


def _scores(q, k, weights, tiles: Tiles) -> Array:
    """float32 [queries, entries] of the blocks at hand: some heads at a time, in one product."""
    rows, entries = tiles.queries, k[0]

    def step(group, total):
        heads = pl.ds(group * tiles.heads, tiles.heads)
        some = q[0, heads].reshape(tiles.heads * rows, q.shape[3])
        products = tpu.dot(some, entries, 1, 1).astype(jnp.float32)
        products = jnp.maximum(products, 0).reshape(tiles.heads, rows, tiles.entries)
        factors = jnp.tile(weights[heads], (1, 1, tiles.entries // LANES))
        return total + jnp.sum(products * factors, axis=0)

    zero = jnp.zeros((rows, tiles.entries), jnp.float32)
    return lax.fori_loop(0, q.shape[1] // tiles.heads, step, zero)

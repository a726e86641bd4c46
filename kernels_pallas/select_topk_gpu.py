"""The Triton kernel of top-k selection, for Hopper.

A program holds a row of scores in registers, as integers in the scores' order, and finds the k-th
best by bisection between the least and the greatest of them, up to the point where as many as
wanted lie above. A second pass counts along the row and writes what was found next to each other.

Rows of more than `WIDTH` scores are selected from in rounds: each part of a row gives its own top_k
candidates, and those go through the same kernel. Part by part they keep the row's order, so that
among equals the lowest index stays first.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas import compat

WIDTH = 8192  # scores that a program holds


def select(scores: Array, top_k: int, *, output: str, interpret: bool = False):
    """As `select_topk`: int32 [..., top_k], bool [..., S], or (value, last) [...].

    output "ascending" is what the kernel makes; "indices", best first, XLA sorts from it.

    scores: float32 or bfloat16 [..., S]. Raises ValueError for a top_k that no program can hold.
    """
    *lead, entries = scores.shape
    size = math.prod(lead)
    k = min(top_k, entries)
    width = max(WIDTH, pl.next_power_of_2(2 * k))
    if width > 4 * WIDTH:
        raise ValueError(
            f"select_topk: gpu: top_k={top_k}, allowed: at most {2 * WIDTH} "
            "(or implementation='top_k', 'bisection')"
        )
    listed = output in ("indices", "ascending")
    if size == 0 or entries == 0:
        shape = (size, k) if listed else (size,)
        first, second = jnp.full(shape, _none(scores.dtype)), jnp.full(shape, -1, jnp.int32)
    else:
        call = functools.partial(_best, top_k=k, dtype=scores.dtype, interpret=interpret)
        values, index = scores.reshape(size, entries), None
        while values.shape[1] > width:
            values, index = call(values, index, width=width, compact=True)
        final = max(16, pl.next_power_of_2(values.shape[1]))
        first, second = call(values, index, width=final, compact=listed)
    if listed:
        if output == "indices":
            _, second = lax.sort((~first, second), num_keys=1, is_stable=True)
        index = jnp.pad(second, ((0, 0), (0, top_k - k)), constant_values=-1)
        return index.reshape(*lead, top_k)
    if output == "threshold":
        return _score(first, scores.dtype).reshape(lead), second.reshape(lead)
    keys, place = _keys(scores), jnp.arange(entries, dtype=jnp.int32)
    threshold, last = first.reshape(*lead, 1), second.reshape(*lead, 1)
    return (keys > threshold) | ((keys == threshold) & (place <= last))


def _best(values, index, *, top_k, width, compact, dtype, interpret):
    """The top_k best of each part of `width` of the rows of `values` [R, n].

    values: scores of `dtype`, or keys of such, int32. index: int32 [R, n], what position n is
    called, ascending; None for n itself.
    compact: -> (keys, index), int32 [R, parts * top_k], parts in order, each in the order of n, and
    filled up with (_none, -1). Otherwise -> (key of the last selected, its index), [R] each, or
    (_none, -1) where there are top_k or fewer; for one part.
    """
    rows, size = values.shape
    parts = pl.cdiv(size, width)
    shape = (rows, parts * top_k) if compact else (rows,)
    operands = (values,) if index is None else (values, index)
    out = compat.result(shape, jnp.int32, *operands)
    return pl.pallas_call(
        functools.partial(
            _compact_kernel if compact else _threshold_kernel, top_k=top_k, width=width, dtype=dtype
        ),
        grid=(rows, parts),
        out_shape=(out, out),
        compiler_params=plgpu.CompilerParams(num_warps=max(1, min(32, width // 1024))),
        interpret=interpret,
        name="select_topk",
    )(*operands)


def _compact_kernel(values_ref, *refs, top_k, width, dtype):
    *index_ref, keys_out, index_out = refs
    row, part = pl.program_id(0), pl.program_id(1)
    keys, index = _read(values_ref, index_ref, row, part * width, width, dtype)
    found = _search(keys, top_k, dtype)
    # Two running counts in one: of the keys above the threshold, and of those at it.
    above, equal = keys >= found.above, keys == found.threshold
    counts = jnp.cumsum(jnp.where(above, 1, 0) + jnp.where(equal, 1 << 16, 0))
    ties = lax.shift_right_logical(counts, 16)
    slot = part * top_k + (counts & 0xFFFF) + jnp.minimum(ties, found.ties) - 1
    chosen = above | (equal & (ties <= found.ties))
    slot = jnp.where(chosen, slot, keys_out.shape[1])  # the interpreter rewrites masked elements
    plgpu.store(keys_out.at[row, slot], keys, mask=chosen)
    plgpu.store(index_out.at[row, slot], index, mask=chosen)
    slot = jnp.arange(pl.next_power_of_2(top_k))
    empty = (slot >= jnp.minimum(found.valid, top_k)) & (slot < top_k)
    fill = jnp.zeros(slot.shape, jnp.int32)
    plgpu.store(keys_out.at[row, part * top_k + slot], fill + _none(dtype), mask=empty)
    plgpu.store(index_out.at[row, part * top_k + slot], fill - 1, mask=empty)


def _threshold_kernel(values_ref, *refs, top_k, width, dtype):
    *index_ref, key_out, last_out = refs
    row = pl.program_id(0)
    keys, index = _read(values_ref, index_ref, row, 0, width, dtype)
    found = _search(keys, top_k, dtype)
    smallest = jnp.min(jnp.where(keys >= found.above, keys, _MAX))
    threshold = jnp.where(found.ties > 0, found.threshold, smallest)
    last = jnp.where(found.ties > 0, found.ties, top_k)
    equal = keys == threshold
    chosen = equal & (jnp.cumsum(jnp.where(equal, 1, 0)) <= last)
    many = found.valid > top_k
    key_out[row] = jnp.where(many, threshold, _none(dtype))
    last_out[row] = jnp.where(many, jnp.max(jnp.where(chosen, index, -1)), -1)


def _read(values_ref, index_ref, row, start, width, dtype):
    """(keys, index) of a part of a row: int32 [width]."""
    size = values_ref.shape[1]
    place = start + jnp.arange(width)
    inside = None if size % width == 0 else place < size

    def load(ref, other):
        return plgpu.load(ref.at[row, place], mask=inside, other=other if size % width else None)

    index = load(index_ref[0], -1) if index_ref else place
    if jnp.issubdtype(values_ref.dtype, jnp.floating):
        return _keys(load(values_ref, -jnp.inf)), index
    return load(values_ref, _none(dtype)), index


class _Found(NamedTuple):
    """The top_k best keys: those >= above, and of those equal to threshold the first `ties`.

    valid: how many keys are above that of -inf.
    """

    above: Array
    threshold: Array
    ties: Array
    valid: Array


def _search(keys, top_k, dtype) -> _Found:
    none = _none(dtype)

    def count(least):
        """How many keys are >= least."""
        if dtype == jnp.bfloat16:  # the differences fit: their sign does, without a comparison
            return jnp.sum(lax.shift_right_logical(least - 1 - keys, 31))
        return jnp.sum(jnp.where(keys >= least, 1, 0))

    # top_k or more keys are >= low, and fewer are >= high, of which there are above_high.
    def halve(state):
        low, high, _, above_high = state
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        here = count(middle)
        enough = here >= top_k
        exact = here == top_k
        return (
            jnp.where(enough, middle, low),
            jnp.where(exact, middle + 1, jnp.where(enough, high, middle)),
            exact,
            jnp.where(enough, above_high, here),
        )

    valid = count(none + 1)
    many = valid > top_k
    low = jnp.where(many, jnp.min(jnp.where(keys > none, keys, _MAX)), none)
    high = jnp.where(many, jnp.max(keys) + 1, none + 1)
    start = (low, high, jnp.bool_(False), jnp.int32(0))
    low, _, exact, above = lax.while_loop(lambda state: state[0] + 1 < state[1], halve, start)
    ties = jnp.where(many & ~exact, top_k - above, 0)
    return _Found(jnp.where(exact, low, low + 1), low, ties, valid)


# ---- scores as integers ----

_MAX = 2**31 - 1
_INFINITY = 255 << 23  # the bits of inf


def _keys(scores):
    """int32 in the order of the scores: the bits, negated below zero, and those of -inf for NaN.

    Of BF16 its 16 bits. Integers throughout: comparing floats drops subnormals on CPUs.
    """
    narrow = scores.dtype == jnp.bfloat16
    bits = lax.bitcast_convert_type(scores, jnp.int16 if narrow else jnp.int32).astype(jnp.int32)
    sign = bits >> 31
    keys = ((bits & (0x7FFF if narrow else _MAX)) ^ sign) - sign
    none = _none(scores.dtype)
    return jnp.where(keys > -none, none, keys)  # a negative NaN is below `none`, which does as well


def _none(dtype) -> int:
    """The key of -inf: what is not above it is not selected."""
    return -(_INFINITY >> 16 if dtype == jnp.bfloat16 else _INFINITY)


def _score(keys, dtype):
    """The scores that have these keys."""
    bits = jnp.where(keys < 0, -keys | jnp.int32(-_MAX - 1), keys)
    if dtype == jnp.bfloat16:
        bits = jnp.where(keys < 0, -keys | 0x8000, keys).astype(jnp.uint16)
    return lax.bitcast_convert_type(bits, dtype)

"""select_topk by counting: no sort of whole rows, no scatter, the same on every platform.

    threshold   the k-th largest key, bit by bit: the largest t with #{s: key[s] >= t} >= k. Then,
                where more than k reach it, the last of its equals that still fits, the same way
    indices     what is selected moves to the front in log2(S) masked shifts, then a bitonic sort
                of those k by (score, index)

Keys are integers in the order of the scores: 16 bits of a bfloat16, or of a float32 first the upper
and then, among what ties there, the lower 16 bits: half as wide, a pass is twice as fast. Rows go
in blocks, transposed where they are shifted and sorted, so that a vector holds one place of many.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.blocks import over_blocks
from kernels_pallas.compat import varying_like

ROWS = 32  # of a block, which stays in cache
LANES = 128  # counters of a row, so that 16 bits are enough for each
MOST_SORTED = 1 << 16  # the sort by score holds a place in 16 bits


def select(scores: Array, top_k: int, output: str):
    """scores [..., S], float32 or bfloat16 -> the selection, as `select_topk` describes it."""
    size = scores.shape[-1]
    k = min(top_k, size)

    def rows(x):
        key = keys(x)
        if top_k < size:
            value, last = threshold(key, k)
        else:  # all that are above -inf
            value, last = jnp.full_like(key[:, 0], lowest(key.dtype)), jnp.full(len(x), -1)
            last = varying_like(last.astype(jnp.int32), x)
        if output == "threshold":
            return value, last
        mask = (key > value[:, None]) | (
            (key == value[:, None]) & (jnp.arange(size, dtype=jnp.int32) <= last[:, None])
        )
        if output == "mask":
            return mask
        index = compact(mask, k)
        return index if output == "ascending" else best_first(key, index)

    found = over_rows(rows, scores)
    if output == "threshold":
        return scores_of(found[0], scores.dtype), found[1]
    if output in ("indices", "ascending") and top_k > k:
        return jnp.pad(found, [(0, 0)] * (found.ndim - 1) + [(0, top_k - k)], constant_values=-1)
    return found


def refusal(size: int, top_k: int, output: str) -> str | None:
    """Why top_k of `size` cannot be selected in this form, or None."""
    if output == "indices" and min(top_k, size) > MOST_SORTED:
        return f"output='indices' of top_k={top_k}, allowed: at most {MOST_SORTED}"
    return None


def positions(mask: Array, top_k: int) -> Array:
    """int32 [..., top_k]: where mask [..., S] is true, ascending, then -1; at most top_k are."""
    return over_rows(lambda x: compact(x, top_k), mask)


def over_rows(function, x: Array):
    """function [R, S] -> [R, ...] over blocks of rows of x [..., S]."""
    *lead, size = x.shape
    *batch, length = lead or (1,)
    x = x.reshape(-1, length, size)
    count = x.shape[0]

    def block(x):
        found = function(x.reshape(-1, size))
        return jax.tree.map(lambda y: y.reshape(count, -1, *y.shape[1:]), found)

    found = over_blocks(block, (x,), max(1, ROWS // count))
    return jax.tree.map(lambda y: y.reshape(*lead, *y.shape[2:]), found)


def keys(scores: Array) -> Array:
    """Integers in the order of the scores: int16 of bfloat16, int32 of float32.

    Both zeros are 0. NaN is taken for -inf, whose key is the lowest. The lowest integer is free.
    """
    integer = _integer(scores.dtype)
    bits = jax.lax.bitcast_convert_type(scores, integer)
    magnitude = bits & jnp.iinfo(integer).max
    key = jnp.where(bits < 0, -magnitude, magnitude)
    return jnp.where(magnitude > -lowest(integer), lowest(integer), key)


def lowest(integer) -> Array:
    """The key of -inf."""
    bits = 0x7F80 if integer == jnp.int16 else 0x7F800000
    return -jnp.asarray(bits, integer)


def _integer(dtype):
    return jnp.dtype(jnp.int16 if dtype == jnp.bfloat16 else jnp.int32)


def scores_of(key: Array, dtype) -> Array:
    """The scores that have these keys."""
    bits = jnp.where(key < 0, jnp.iinfo(key.dtype).min - key, key)
    return jax.lax.bitcast_convert_type(bits, dtype)


def threshold(key: Array, k: int) -> tuple[Array, Array]:
    """key [R, S] -> (key of the k-th best, int32 last index selected of its equals), [R] each.

    (lowest key, -1) where no more than k keys are above the lowest.
    """
    rows, size = key.shape
    k = jnp.full((rows, 1), k, jnp.int32)
    if key.dtype == jnp.int16:
        value = _kth(key, k)
    else:
        upper = (key >> 16).astype(jnp.int16)
        lower = ((key & 0xFFFF) - 0x8000).astype(jnp.int16)
        first = _kth(upper, k)
        rest = k - _count(upper > first)
        second = _kth(jnp.where(upper == first, lower, jnp.int16(-0x8000)), rest)
        value = (first.astype(jnp.int32) << 16) + (second.astype(jnp.int32) + 0x8000)

    bottom = lowest(key.dtype)
    none = _count(key > bottom) <= k
    value = jnp.where(none, bottom, value)
    backwards = size - 1 - jnp.arange(size, dtype=jnp.int32)
    backwards = backwards.astype(jnp.int16 if size <= 0x8000 else jnp.int32)
    backwards = jnp.where((key == value) & ~none, backwards, jnp.asarray(-1, backwards.dtype))
    room = k - _count(key > value)
    farthest = jax.lax.cond(
        jnp.any(~none & (_count(backwards >= 0) > room)),
        lambda: _kth(backwards, room),
        lambda: jnp.min(
            jnp.where(backwards < 0, jnp.iinfo(backwards.dtype).max, backwards),
            axis=1,
            keepdims=True,
        ),
    )
    last = jnp.where(none, -1, size - 1 - farthest.astype(jnp.int32))
    return value[:, 0], last[:, 0]


def _kth(key: Array, k: Array) -> Array:
    """The k-th largest of each row: key [R, S], int16 or int32, k int32 [R, 1] -> [R, 1]."""
    info = jnp.iinfo(key.dtype)

    def bit(i, low):
        place = (info.bits - 1 - i).astype(key.dtype)
        candidate = low + jnp.left_shift(jnp.asarray(1, key.dtype), place)
        return jnp.where(_count(key >= candidate) >= k, candidate, low)

    low = varying_like(jnp.full((key.shape[0], 1), info.min, key.dtype), key, k)
    return jax.lax.fori_loop(0, info.bits, bit, low)


def _count(mask: Array) -> Array:
    """How many of each row are true: [R, S] -> int32 [R, 1]."""
    rows, size = mask.shape
    lanes = min(LANES, size)
    mask = jnp.pad(mask, ((0, 0), (0, -size % lanes))).reshape(rows, -1, lanes)
    narrow = jnp.int16 if mask.shape[1] < 0x8000 else jnp.int32
    return jnp.sum(jnp.sum(mask, axis=1, dtype=narrow).astype(jnp.int32), axis=1, keepdims=True)


def compact(mask: Array, k: int) -> Array:
    """int32 [R, k]: where mask [R, S] is true, ascending, then -1. At most k are true in a row."""
    size = mask.shape[1]
    integer = jnp.int16 if size < 0x8000 else jnp.int32  # the count of all is one of its numbers
    mask = mask.T

    def rank(before, here):
        after = before + here.astype(integer)
        return after, before

    none = varying_like(jnp.zeros(mask.shape[1], integer), mask)
    total, before = jax.lax.scan(rank, none, mask)
    # How far each is to move. The lower bits first, no two ever meet; what is left behind is 0.
    far = jnp.where(mask, jnp.arange(size, dtype=integer)[:, None] - before, 0)

    steps = (size - 1).bit_length()

    def shift(bit, far):
        step = jnp.left_shift(jnp.asarray(1, integer), bit.astype(integer))
        coming = jnp.pad(far, ((0, 1 << steps >> 1), (0, 0)))
        coming = jax.lax.dynamic_slice_in_dim(coming, jnp.left_shift(1, bit), size)
        return jnp.where(coming & step != 0, coming, jnp.where(far & step != 0, 0, far))

    far = jax.lax.fori_loop(0, steps, shift, far)[:k]
    place = jnp.arange(k, dtype=jnp.int32)[:, None]
    return jnp.where(place < total, place + far.astype(jnp.int32), -1).T


def best_first(key: Array, index: Array) -> Array:
    """index int32 [R, k], ascending and then -1, by descending key [R, S], ascending if equal."""
    best = jnp.take_along_axis(key, jnp.maximum(index, 0), axis=1).astype(jnp.int32)
    if key.dtype == jnp.int16:
        return jnp.take_along_axis(index, _order(jnp.where(index < 0, -0x8000, best)), axis=1)
    # By the lower halves, then by the upper ones, where equals stay in the order they have.
    order = _order((best & 0xFFFF) - 0x8000)
    upper = jnp.where(index < 0, -0x8000, best >> 16)
    order = jnp.take_along_axis(order, _order(jnp.take_along_axis(upper, order, axis=1)), axis=1)
    return jnp.take_along_axis(index, order, axis=1)


def _order(half: Array) -> Array:
    """Places of int32 [R, k], 16 bits with sign, in descending order, ascending where equal.

    A bitonic sort of integers that hold a place in their lower half; k is at most MOST_SORTED.
    """
    k = half.shape[1]
    size = 2 << ((k - 1) >> 1).bit_length()
    half = jnp.pad(half.T, ((0, size - k), (0, 0)), constant_values=-0x8000)
    place = jnp.arange(size, dtype=jnp.int32)[:, None]
    runs = range(1, size.bit_length())  # log2 of what a merge leaves sorted
    merged = jnp.asarray([run for run in runs for _ in range(run)], jnp.int32)
    stride = jnp.asarray([1 << at for run in runs for at in range(run - 1, -1, -1)], jnp.int32)

    def stage(i, x):
        ahead = jnp.pad(x, ((0, size // 2), (0, 0)))
        ahead = jax.lax.dynamic_slice_in_dim(ahead, stride[i], size)
        behind = jnp.pad(x, ((size // 2, 0), (0, 0)))
        behind = jax.lax.dynamic_slice_in_dim(behind, size // 2 - stride[i], size)
        later = place & stride[i] != 0
        other = jnp.where(later, behind, ahead)
        descending = place >> merged[i] & 1 == 0
        return jnp.where(later == descending, jnp.minimum(x, other), jnp.maximum(x, other))

    packed = jax.lax.fori_loop(0, len(merged), stage, (half << 16) | (0xFFFF - place))
    return (0xFFFF - (packed & 0xFFFF)).T[:, :k]

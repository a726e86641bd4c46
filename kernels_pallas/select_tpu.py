"""Which scores of a row are the top_k best, inside a Mosaic TPU kernel: on keys that lie in VMEM.

Keys are integers in the order of the scores. The k-th largest is found bit by bit, each a count
over all of them; of the entries equal to it the lowest, by a search over positions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

LANES = 128
INFINITY = 0x7F800000  # its bits


@dataclasses.dataclass(frozen=True)
class Order:
    """How scores become ordered integers: their float32 bits, or the 16 of bfloat16."""

    bits: int

    @property
    def lowest(self) -> int:
        """What is never selected; the key of a NaN alone, whose key is not used."""
        return -(1 << self.bits - 1)

    @property
    def _flip(self) -> int:  # of negative numbers, whose bits fall as they rise
        return -1 - self.lowest

    def keys(self, scores: Array, visible: Array) -> Array:
        """int32, in the order of the scores; `lowest` where NaN, -inf or not visible."""
        bits = lax.bitcast_convert_type(scores, jnp.int32)
        if self.bits == 16:  # to the nearest, ties to even
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = jnp.where(bits == self.lowest, 0, bits)  # -0
        keys = jnp.where(bits < 0, bits ^ self._flip, bits)
        no_nan = (lax.bitcast_convert_type(scores, jnp.int32) & 0x7FFFFFFF) <= INFINITY
        above = keys > -1 - (INFINITY >> 32 - self.bits)
        return jnp.where(visible & no_nan & above, keys, self.lowest)

    def scores(self, keys: Array) -> Array:
        """float32 of keys; -inf for `lowest`."""
        bits = jnp.where(keys < 0, keys ^ self._flip, keys) << 32 - self.bits
        values = lax.bitcast_convert_type(bits, jnp.float32)
        return jnp.where(keys == self.lowest, -jnp.inf, values)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The keys [blocks, queries, entries] in VMEM, of which [start, stop) hold something."""

    keys: jax.Ref
    start: Array
    stop: Array

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.keys.shape

    def lanes(self, block) -> Iterator[tuple[slice, Array, Array]]:
        """Of a block by 128 lanes, which keeps masks in registers: the slice, keys, entries."""
        lane = lax.broadcasted_iota(jnp.int32, (self.shape[1], LANES), 1)
        for start in range(0, self.shape[2], LANES):
            part = slice(start, start + LANES)
            yield part, self.keys[block, :, part], block * self.shape[2] + start + lane

    def count(self, test) -> Array:
        """int32 [queries, 1]: how many keys meet a test."""

        def step(block, total):
            return total + self.count_in(block, test)

        zero = jnp.zeros((self.shape[1], LANES), jnp.float32)
        return _sum_lanes(lax.fori_loop(self.start, self.stop, step, zero))

    def count_in(self, block, test) -> Array:
        """float32 [queries, 128], to be summed over lanes."""
        return _sum(jnp.where(test(keys), 1.0, 0.0) for _, keys, _ in self.lanes(block))


def _sum(counts: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, counts)


def _sum_lanes(counts: Array) -> Array:
    """int32 [..., 1]; float32 sums of whole numbers are exact up to 2^24."""
    return jnp.sum(counts, axis=1, keepdims=True).astype(jnp.int32)


def threshold(blocks: Blocks, spare, order: Order, top_k: int) -> tuple[Array, Array]:
    """(key, last), int32 [queries, 1]: selected are the keys above `key`, and of those equal to it
    the entries up to `last`. (lowest, -1) where no more than top_k count, and for top_k 0: all that
    do. spare: int32 [queries, entries a block], for the search.
    """
    rows = (blocks.shape[1], 1)
    lowest = jnp.full(rows, order.lowest, jnp.int32)
    if top_k == 0:
        return lowest, jnp.full(rows, -1, jnp.int32)

    def bit(i, value):  # bits from the highest on: keep those with which top_k are as large
        candidate = value + (1 << order.bits - 1 - i)
        enough = blocks.count(lambda keys: keys >= candidate) >= top_k
        return jnp.where(enough, candidate, value)

    value = lax.fori_loop(0, order.bits, bit, lowest)
    wanted = top_k - blocks.count(lambda keys: keys > value)
    last = _position(blocks, spare, value, wanted)
    many = blocks.count(lambda keys: keys > order.lowest) > top_k
    return jnp.where(many, value, order.lowest), jnp.where(many, last, -1)


def _position(blocks: Blocks, spare, value: Array, wanted: Array) -> Array:
    """int32 [queries, 1]: the entry at which `wanted` of the keys equal to `value` are reached.

    First the block, then the place in it. spare receives of each query's block the entries whose
    key is `value`, and something larger elsewhere.
    """
    size, far = blocks.shape[2], jnp.iinfo(jnp.int32).max

    def step(block, carry):
        seen, before, found = carry
        count = seen + _sum_lanes(blocks.count_in(block, lambda keys: keys == value))
        here = (seen < wanted) & (wanted <= count)
        for part, keys, entry in blocks.lanes(block):
            spare[:, part] = jnp.where(here, jnp.where(keys == value, entry, far), spare[:, part])
        return count, jnp.where(here, seen, before), jnp.where(here, block, found)

    zero = jnp.zeros(value.shape, jnp.int32)
    _, before, found = lax.fori_loop(blocks.start, blocks.stop, step, (zero, zero, zero))
    bits = (size - 1).bit_length()

    def bit(i, position):
        candidate = position + (1 << bits - 1 - i)
        parts = (spare[:, lane : lane + LANES] for lane in range(0, size, LANES))
        count = _sum(jnp.where(part < candidate, 1.0, 0.0) for part in parts)
        return jnp.where(before + _sum_lanes(count) < wanted, candidate, position)

    return lax.fori_loop(0, bits, bit, found * size)


def write_mask(out, blocks: Blocks, value: Array, last: Array):
    """int8 [1, queries, entries] of a threshold; 0 in blocks that no query sees."""
    size = blocks.shape[2]

    def write(block, part, selected):
        start = pl.multiple_of(block * size + part.start, LANES)
        out[0, :, pl.ds(start, LANES)] = selected.astype(jnp.int8)

    def step(block, _):
        for part, keys, entry in blocks.lanes(block):
            selected = (keys > value) | ((keys == value) & (entry <= last))
            write(block, part, jnp.where(selected, 1, 0))

    def clear(block, _):
        start = pl.multiple_of(block * size, LANES)
        out[0, :, pl.ds(start, size)] = jnp.zeros(blocks.shape[1:], jnp.int8)

    lax.fori_loop(0, blocks.start, clear, None)
    lax.fori_loop(blocks.start, blocks.stop, step, None)
    lax.fori_loop(blocks.stop, blocks.shape[0], clear, None)

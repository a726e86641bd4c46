"""Which tiles of rows meet which expert: the steps of a kernel over tokens sorted by expert.

A tile of rows that holds tokens of several experts is visited once for each, under a mask of rows,
so tokens stay where they are (the idea of megablox).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
    """Steps of a kernel over tiles of rows, int32 [V] each, with V fixed and `active` of them real.

    tile, expert: what is read. first, end: the rows, counted from row 0, that are the expert's;
    first == end where there are none. live [1]: visits from here on are not of experts: they write
    zeros to the rows [first, end) that no expert has, or (first == end) do nothing. Visits that
    read nothing new repeat the indices of the one before, so that nothing is copied for them.
    """

    tile: Array
    expert: Array
    first: Array
    end: Array
    live: Array


def visits(group_sizes: Array, total: int, rows: int, *, every: bool) -> Visits:
    """Visits of tiles of `rows` rows, in the order of rows and experts.

    every: an expert without tokens is visited too, and the rows past the last group are not;
    otherwise the reverse.
    """
    tiles, experts = pl.cdiv(total, rows), group_sizes.shape[0]
    ends = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), total)
    if every:
        steps = tiles + experts - 1
    else:  # the rest is one more group
        ends = jnp.append(ends, total)
        steps = tiles + min(experts + 1, total) - 1
    starts = jnp.pad(ends[:-1], (1, 0))
    first_tile = jnp.minimum(starts // rows, tiles - 1)
    count = jnp.where(starts < ends, (ends - 1) // rows - first_tile + 1, int(every))
    stop = jnp.cumsum(count)
    active, live = stop[-1], stop[experts - 1]
    visit = jnp.minimum(jnp.arange(steps, dtype=jnp.int32), active - 1)
    group = jnp.searchsorted(stop, visit, side="right").astype(jnp.int32)
    tile = first_tile[group] + visit - (stop - count)[group]
    owner = jnp.max(jnp.where(visit < live, group, 0))  # the last expert that has tokens
    inert = jnp.arange(steps) >= active
    return Visits(
        tile=tile,
        expert=jnp.where(visit < live, group, owner),
        first=jnp.where(inert, 0, starts[group]),
        end=jnp.where(inert, 0, ends[group]),
        live=live[None],
    )


def mask(visits: Visits, visit, rows: int) -> Array:
    """bool [rows, 1]: which rows of the visit's tile are its expert's."""
    row = visits.tile[visit] * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    return (visits.first[visit] <= row) & (row < visits.end[visit])


def rows_of_tile(total: int, experts: int) -> int:
    """Rows a tile: half an expert's average, because tiles at borders are computed twice."""
    if total < 64:
        return 16 * pl.cdiv(total, 16)
    average = total // (2 * experts)
    return 256 if average >= 256 else 128 if average >= 128 else 64

"""Where compression windows lie: one entry for every `rate` tokens of a sample (report 3.4.3).

Windows start anew with each sample, and a sample's last, incomplete window makes no entry. In a
row of T tokens there are at most C = T // rate entries; with packed samples fewer may be real.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kernels_pallas.visibility import Range, visible_range


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("last", "first", "position", "seen", "start", "place"),
    meta_fields=("rate",),
)
@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows of a batch of rows.

    rate: tokens a window.  last: int32 [B, C], the token that closes the entry's window (T where
    the entry is not real).  first: bool [B, C], the entry is its sample's first.
    position: int32 [B, C], the window's first token counted within its sample.
    seen: the range (first, end), int32 [B, T] each, of the entries that a token sees: those of its
    own sample, from the token that closes an entry's window onward.  start: int32 [B, C] first
    token in the row, or None when windows tile the row.  place: int32 [B, T] slot of each token in
    the flat [C * rate], -1 for none, or None.
    """

    rate: int
    last: jax.Array
    first: jax.Array
    position: jax.Array
    seen: Range
    start: jax.Array | None
    place: jax.Array | None

    @classmethod
    def make(cls, rate: int, positions: jax.Array, segment_ids: jax.Array | None) -> "Windows":
        """Windows of `rate` tokens over positions int32 [B, T] (restarting with each sample)."""
        batch, length = positions.shape
        count = length // rate
        seen = visible_range(batch, length, count, rate, segment_ids)
        entry = jnp.arange(count, dtype=jnp.int32)
        if segment_ids is None:
            shape = (batch, count)
            return cls(
                rate=rate,
                last=jnp.broadcast_to(entry * rate + rate - 1, shape),
                first=jnp.broadcast_to(entry == 0, shape),
                position=jnp.broadcast_to(entry * rate, shape),
                seen=seen,
                start=None,
                place=None,
            )
        closes = (positions + 1) % rate == 0
        closed = jnp.cumsum(closes, axis=1, dtype=jnp.int32)  # [B T] entries closed up to here
        last = jnp.sum(closed[:, None, :] <= entry[:, None], axis=-1, dtype=jnp.int32)  # [B C]
        at = jnp.minimum(last, length - 1)
        position = jnp.take_along_axis(positions, at, axis=1) - (rate - 1)
        # A token's window closes rate-1-slot tokens on, if that is still the same sample.
        slot = positions % rate
        end = jnp.arange(length, dtype=jnp.int32) + rate - 1 - slot
        inside = jnp.minimum(end, length - 1)
        # Positions tell samples apart where ids do not: padding is 0 on both sides of a sample.
        same = (
            (end < length)
            & (jnp.take_along_axis(segment_ids, inside, axis=1) == segment_ids)
            & (jnp.take_along_axis(positions, inside, axis=1) == positions + rate - 1 - slot)
        )
        place = (jnp.take_along_axis(closed, inside, axis=1) - 1) * rate + slot
        return cls(
            rate=rate,
            last=last,
            first=position == 0,
            position=jnp.maximum(position, 0),
            seen=seen,
            start=jnp.where(last < length, last - (rate - 1), -1),
            place=jnp.where(same, place, -1),
        )

    def split(self, x: jax.Array) -> jax.Array:
        """x [B, T, A] -> [B, C, rate, A]; entries that are not real read zeros."""
        batch, length, width = x.shape
        count = self.last.shape[1]
        if self.start is None:
            return x[:, : count * self.rate].reshape(batch, count, self.rate, width)
        slots = self.start[..., None] + jnp.arange(self.rate, dtype=jnp.int32)
        slots = jnp.where(self.start[..., None] < 0, -1, slots).reshape(batch, -1)
        rows = move_rows(x, slots, self.place)
        return rows.reshape(batch, count, self.rate, width)


@jax.custom_vjp
def move_rows(x: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """Rows of x [B, T, A] by index: out[b, i] = x[b, source[b, i]], zero where source is -1.

    `target` is the inverse: source[b, target[b, t]] == t, -1 where row t goes nowhere. With it the
    gradient is a gather too, instead of a scatter, which is slow on CPU and unordered on GPU.
    """
    rows = jnp.take_along_axis(x, jnp.maximum(source, 0)[..., None], axis=1)
    return jnp.where(source[..., None] < 0, 0, rows)


def _move_forward(x, source, target):
    return move_rows(x, source, target), (source, target)


def _move_backward(residuals, g):
    source, target = residuals
    return move_rows(g, target, source), None, None


move_rows.defvjp(_move_forward, _move_backward)

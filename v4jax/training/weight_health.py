"""What FP4 does to a weight while it trains: the numbers that tell why a QAT run goes wrong.

A weight w is held as value q times block scale s. Its bins are the intervals that round to one
value; E2M1's are 0.5 wide around 0 to 1.5, and 0.75, 1, 1.5 and 2 around 2, 3, 4 and 6.

`measure` compares two masters, one step apart. `track` follows oscillation, which needs a memory
of every element: Nagel et al. (ICML 2022) count changes of q against the direction of the one
before; TetraJet-v2 divides the way that the rounded weight went by the way of the master.
Changes of a block's scale are counted apart: one changes what all of its values mean.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from v4jax.numerics import Format, blocks, dequantize, quantize

BOUNDARIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Where the rounding of |w| / s to E2M1 changes its result."""

LARGEST = 6.0
EDGE = 0.005
"""So near to a boundary, in widths of its bin, a weight is at the edge."""


class Held(NamedTuple):
    """A weight as its format holds it. value: q; scale: s, of its block; rounded: q s. [..., n]"""

    value: Array
    scale: Array
    rounded: Array


def hold(weight: Array, fmt: Format) -> Held:
    """`weight` [..., n] in an FP4 format, all float32. Raises ValueError for another element."""
    if fmt.bits != 4:
        raise ValueError(f"weight_health: {fmt.name} is not an FP4 format")
    q = quantize(weight, fmt)
    scale = q.scales.astype(jnp.float32)
    if q.tensor_scale is not None:
        scale = scale * q.tensor_scale
    inner = jnp.expand_dims(scale, blocks.inner_axes(fmt.tile))
    whole = jnp.broadcast_to(inner, blocks.split(weight, fmt.tile).shape)
    return Held(
        q.values.astype(jnp.float32),
        blocks.merge(whole, weight.shape, fmt.tile),
        dequantize(q),
    )


def measure(before: Array, after: Array, fmt: Format) -> dict[str, Array]:
    """Shares, float32 [], of one weight [..., n] before and after an update:

    flipped: elements whose value changed while their scale did not. scale_flipped: elements whose
    scale changed. at_edge, saturated (|w| > 6 s), underflowing (rounded to 0, not 0): of `after`.
    snr_db: 10 log10 of |w|^2 over the rounding error's, of `after`. update_over_bin: mean |change|
    over the width of the bin that `before` was in.
    """
    was, now = hold(before, fmt), hold(after, fmt)
    rescaled = was.scale != now.scale
    ratio = jnp.abs(after) / now.scale
    width = bin_width(jnp.abs(now.value))
    nearest = jnp.min(jnp.stack([jnp.abs(ratio - edge) for edge in BOUNDARIES]), axis=0)
    error = jnp.sum(jnp.square(after - now.rounded))
    bins = bin_width(jnp.abs(was.value)) * was.scale

    def share(mask: Array) -> Array:
        return jnp.mean(mask, dtype=jnp.float32)

    return {
        "flipped": share((was.value != now.value) & ~rescaled),
        "scale_flipped": share(rescaled),
        "at_edge": share(nearest < EDGE * width),
        "saturated": share(ratio > LARGEST),
        "underflowing": share((now.value == 0) & (after != 0)),
        "snr_db": 10 * jnp.log10(jnp.sum(jnp.square(after)) / jnp.maximum(error, 1e-38)),
        "update_over_bin": jnp.mean(jnp.abs(after - before) / bins),
    }


def bin_width(value: Array) -> Array:
    """Width of the bin around |q|, one of E2M1's: 0, 0.5, 1, 1.5, 2, 3, 4, 6."""
    small = jnp.where(value < 2, 0.5, 0.75)
    return jnp.where(value < 3, small, jnp.where(value < 4, 1.0, jnp.where(value < 6, 1.5, 2.0)))


class Oscillation(NamedTuple):
    """The memory of `track`, a weight's shape each. direction: int8, of the last change of q.
    frequency: float32, of changes against it. rounded_way, master_way: float32, way made since
    `fresh`."""

    direction: Array
    frequency: Array
    rounded_way: Array
    master_way: Array


def fresh(weight: Array) -> Oscillation:
    """No change seen yet."""
    zero = jnp.zeros(weight.shape, jnp.float32)
    return Oscillation(jnp.zeros(weight.shape, jnp.int8), zero, zero, zero)


def track(
    state: Oscillation, before: Array, after: Array, fmt: Format, momentum: float = 0.01
) -> Oscillation:
    """The memory after an update from `before` to `after` [..., n].

    frequency <- momentum * o + (1 - momentum) * frequency, o = 1 where q changed against the
    direction of its last change. Elements whose scale changed count as unchanged here.
    """
    was, now = hold(before, fmt), hold(after, fmt)
    moved = jnp.where(was.scale == now.scale, jnp.sign(now.value - was.value), 0).astype(jnp.int8)
    turned = (moved != 0) & (moved == -state.direction)
    return Oscillation(
        direction=jnp.where(moved == 0, state.direction, moved),
        frequency=momentum * turned + (1 - momentum) * state.frequency,
        rounded_way=state.rounded_way + jnp.abs(now.rounded - was.rounded),
        master_way=state.master_way + jnp.abs(after - before),
    )


def oscillating(
    state: Oscillation, frequency: float = 0.02, ratio: float = 8.0
) -> dict[str, Array]:
    """Shares, float32 []: oscillating_often, whose frequency is above `frequency`; oscillating_far,
    whose rounded weight went at least `ratio` times as far as its master since `fresh`.

    The limits are Nagel's two to three times the momentum, and TetraJet-v2's.
    """
    far = (state.rounded_way > 0) & (state.rounded_way >= ratio * state.master_way)
    return {
        "oscillating_often": jnp.mean(state.frequency > frequency, dtype=jnp.float32),
        "oscillating_far": jnp.mean(far, dtype=jnp.float32),
    }


def straight_through_cosine(at_rounded: Array, at_master: Array) -> Array:
    """Cosine, float32 [], of the gradient at the rounded weight, which straight-through training
    uses, with the gradient at the master."""
    a, b = (jnp.ravel(x).astype(jnp.float32) for x in (at_rounded, at_master))
    return jnp.vdot(a, b) / jnp.maximum(jnp.linalg.norm(a) * jnp.linalg.norm(b), 1e-30)


def over_noise(at_rounded: Array, at_master: Array) -> Array:
    """Norm of the gradient over sqrt(3) times the norm of what rounding adds to it, float32 [].

    Below 1, training on rounded weights no longer helps ("FP4 All the Way", arXiv 2505.19115). What
    rounding adds is the difference of the gradients at the rounded weight and at the master.
    """
    a, b = (jnp.ravel(x).astype(jnp.float32) for x in (at_rounded, at_master))
    return jnp.linalg.norm(a) / jnp.maximum(jnp.sqrt(3.0) * jnp.linalg.norm(a - b), 1e-30)

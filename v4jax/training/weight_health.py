"""What FP4 does to a weight while it trains: the numbers that tell why a QAT run goes wrong.

A weight w is held as value q times block scale s. Its bins are the intervals that round to one
value; E2M1's are 0.5 wide around 0 to 1.5, and 0.75, 1, 1.5 and 2 around 2, 3, 4 and 6.

`Watch` compares the masters of a run before and after one update. `track` follows oscillation,
which needs a memory of every element: Nagel et al. (ICML 2022) count changes of q against the
direction of the one before; TetraJet-v2 divides the way that the rounded weight went by the way of
the master.
Changes of a block's scale are counted apart: one changes what all of its values mean.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from v4jax.numerics import Format, take_apart
from v4jax.quantization import PARTS, Quantization, flat_paths, resolve

BOUNDARIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Where the rounding of |w| / s to E2M1 changes its result."""

LARGEST = 6.0
EDGE = 0.005
"""So near to a boundary, in widths of its bin, a weight is at the edge."""

MOMENTUM = 0.01
"""Nagel's, of the frequency of changes."""

OFTEN = 0.02
"""A frequency above it is oscillation: two to three times the momentum, as Nagel has it."""

RATIO = 8.0
"""From this ratio of the ways on a weight oscillates, as TetraJet-v2 has it."""


class Held(NamedTuple):
    """A weight as its format holds it. value: q; scale: s, of its block; rounded: q s. [..., n]"""

    value: Array
    scale: Array
    rounded: Array


def hold(weight: Array, fmt: Format) -> Held:
    """`weight` [..., n] in an FP4 format, all float32. Raises ValueError for another element."""
    if fmt.bits != 4:
        raise ValueError(f"weight_health: {fmt.name} is not an FP4 format")
    return Held(*take_apart(weight, fmt))


def count(before: Array, after: Array, fmt: Format) -> dict[str, Array]:
    """Sums over one weight [..., n], before and after an update, that `shares` divides; float32 [].

    Those of several weights may be added.
    """
    was, now = hold(before, fmt), hold(after, fmt)
    rescaled = was.scale != now.scale
    ratio = jnp.abs(after) / now.scale
    nearest = functools.reduce(jnp.minimum, [jnp.abs(ratio - edge) for edge in BOUNDARIES])
    bins = bin_width(jnp.abs(was.value)) * was.scale
    found = {
        "elements": jnp.ones(before.shape),
        "flipped": (was.value != now.value) & ~rescaled,
        "scale_flipped": rescaled,
        "at_edge": nearest < EDGE * bin_width(jnp.abs(now.value)),
        "saturated": ratio > LARGEST,
        "underflowing": (now.value == 0) & (after != 0),
        "update_over_bin": jnp.abs(after - before) / bins,
        "power": jnp.square(after),
        "error": jnp.square(after - now.rounded),
    }
    return {name: jnp.sum(x, dtype=jnp.float32) for name, x in found.items()}


def shares(counted: Mapping[str, Array]) -> dict[str, Array]:
    """Of what `count` found, or several of these added, float32 []:

    flipped: share of elements whose value changed while their scale did not. scale_flipped: of
    those whose scale changed. at_edge, saturated (|w| > 6 s), underflowing (rounded to 0, but not
    0): of elements after the update. update_over_bin: mean |change| over the width of the bin that
    the element was in. snr_db: 10 log10 of |w|^2 over the rounding error's.
    """
    elements, power, error = (counted[name] for name in ("elements", "power", "error"))
    found = {
        name: x / elements
        for name, x in counted.items()
        if name not in ("elements", "power", "error")
    }
    return found | {"snr_db": 10 * jnp.log10(power / jnp.maximum(error, 1e-38))}


def measure(before: Array, after: Array, fmt: Format) -> dict[str, Array]:
    """`shares` of one weight."""
    return shares(count(before, after, fmt))


class Watch:
    """Measures a run's FP4 weights over single updates, by the parts of `quantization.PARTS`.

    `keep` copies them before an update, `measure` compares: {"fp4/routed_experts/flipped": ...}.
    False where a quantization has no FP4 weights.
    """

    def __init__(self, quantization: Quantization, params: Any):
        resolved = resolve(quantization, params)
        formats = {path: fmt for path, fmt in resolved.weights.items() if fmt.bits == 4}
        self._formats = formats
        self._copy = jax.jit(self._copied)
        self._measure = jax.jit(self._by_part)

    def __bool__(self) -> bool:
        return bool(self._formats)

    def keep(self, params: Any) -> dict[str, Array]:
        """Copies: a training step gives its parameters away."""
        return self._copy(params)

    def measure(self, before: Mapping[str, Array], params: Any) -> dict[str, Array]:
        """By part and name of `shares`, for the update from `before` to `params`."""
        return self._measure(before, params)

    def _copied(self, params: Any) -> dict[str, Array]:
        flat = flat_paths(params)
        return {path: jnp.copy(flat[path]) for path in self._formats}

    def _by_part(self, before: Mapping[str, Array], params: Any) -> dict[str, Array]:
        after = flat_paths(params)
        # Equal shapes are stacked: a program over each of a hundred weights compiles for minutes.
        alike: dict[tuple[str, Format, tuple[int, ...]], list[str]] = {}
        for path, fmt in self._formats.items():
            alike.setdefault((part_of(path), fmt, before[path].shape), []).append(path)
        sums: dict[str, dict[str, Array]] = {}
        for (part, fmt, _), paths in alike.items():
            was, now = (jnp.stack([x[path] for path in paths]) for x in (before, after))
            found = count(was, now, fmt)
            known = sums.get(part)
            sums[part] = found if known is None else jax.tree.map(jnp.add, known, found)
        return {
            f"fp4/{part}/{name}": value
            for part, counted in sums.items()
            for name, value in shares(counted).items()
        }


def part_of(path: str) -> str:
    """The part that a weight belongs to, as a metric's name has it."""
    found = (name for name, (pattern, _) in PARTS.items() if re.fullmatch(pattern, path))
    return next(found, "others").replace(" ", "_")


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
    state: Oscillation, before: Array, after: Array, fmt: Format, momentum: float = MOMENTUM
) -> Oscillation:
    """The memory after an update from `before` to `after` [..., n].

    frequency <- momentum * o + (1 - momentum) * frequency, o = 1 where q changed against the
    direction of its last change. Elements whose scale changed count as unchanged here.
    """
    change = jnp.abs(after - before)
    return track_held(state, hold(before, fmt), hold(after, fmt), change, momentum)


def track_held(
    state: Oscillation, was: Held, now: Held, change: Array, momentum: float = MOMENTUM
) -> Oscillation:
    """`track` of weights that are held in any way; `change` is the way of the masters."""
    moved = jnp.where(was.scale == now.scale, jnp.sign(now.value - was.value), 0).astype(jnp.int8)
    turned = (moved != 0) & (moved == -state.direction)
    return Oscillation(
        direction=jnp.where(moved == 0, state.direction, moved),
        frequency=momentum * turned + (1 - momentum) * state.frequency,
        rounded_way=state.rounded_way + jnp.abs(now.rounded - was.rounded),
        master_way=state.master_way + change,
    )


def far(state: Oscillation, ratio: float = RATIO) -> Array:
    """bool, a weight's shape: its rounded value went at least `ratio` times as far as its master
    since `fresh`."""
    return (state.rounded_way > 0) & (state.rounded_way >= ratio * state.master_way)


def oscillating(
    state: Oscillation, frequency: float = OFTEN, ratio: float = RATIO
) -> dict[str, Array]:
    """Shares, float32 []: oscillating_often, whose frequency is above `frequency`; oscillating_far,
    of `far`."""
    return {
        "oscillating_often": jnp.mean(state.frequency > frequency, dtype=jnp.float32),
        "oscillating_far": jnp.mean(far(state, ratio), dtype=jnp.float32),
    }

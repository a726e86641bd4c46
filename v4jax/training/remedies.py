"""Remedies for weights that swing between two values of their format instead of settling.

    dampening       a gradient towards the rounded value, 2 lambda (w - Q(w)): Nagel et al. (ICML
                    2022, arXiv 2203.11086), their loss lambda |w - Q(w)|^2
    freeze_above    a weight whose frequency of oscillation is above it stays where it was on
                    average: the same paper's iterative freezing
    reset_every     every so many updates, weights whose rounded value went 8 times as far as the
                    master are set to it, the middle of their bin: TetraJet-v2's OsciReset (arXiv
                    2510.27527), which looks at the last 50 of 200 updates; here at all of them
    ema_decay       which of its two neighbours a weight is rounded to is up to an exponential mean
                    of the master: TetraJet's Q-EMA (arXiv 2502.20853)
    rounding        "stochastic": to the upper neighbour with the probability that makes the mean
                    the master

Some need to remember something of each weight: the memory, a dict of name -> path -> array, {}
where nothing is to be remembered. Everything here is pure and meant to be traced; parameters are
nested dicts of float32 masters. Formats other than FP4 are rounded as ever and left alone.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from v4jax.numerics import Format, quantize_stochastically, quantize_toward
from v4jax.quantization import Resolved, flat_paths, quantize_params
from v4jax.training import weight_health
from v4jax.training.weight_health import MOMENTUM, Held, Oscillation

ROUNDINGS = ("nearest", "stochastic")
WINDOW = 50
"""Updates over which the ways of weights are compared where nothing is reset."""

Memory = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RemedyConfig:
    """What is done against oscillation; 0 and "nearest" are nothing. Raises ValueError, one line.

    dampening: lambda, in nats per squared unit of weight. freeze_above: a frequency (0.02 is twice
    its momentum). reset_every: updates. ema_decay: of the mean, a step. track: remember oscillation
    for the metrics, although nothing is done about it.
    """

    dampening: float = 0.0
    freeze_above: float = 0.0
    reset_every: int = 0
    ema_decay: float = 0.0
    rounding: str = "nearest"
    track: bool = False

    def __post_init__(self):
        self._require("dampening", _number(self.dampening, math.inf), "a number >= 0")
        self._require("freeze_above", _number(self.freeze_above, 1), "a number in [0, 1)")
        whole = isinstance(self.reset_every, int) and not isinstance(self.reset_every, bool)
        whole = whole and self.reset_every >= 0 and self.reset_every != 1
        self._require("reset_every", whole, "0, or an integer >= 2: one update is no oscillation")
        self._require("ema_decay", _number(self.ema_decay, 1), "a number in [0, 1)")
        self._require("rounding", self.rounding in ROUNDINGS, " | ".join(ROUNDINGS))
        if self.rounding == "stochastic":
            why = "0 with rounding='stochastic'"
            self._require("ema_decay", not self.ema_decay, f"{why}, which picks the side itself")
            self._require("dampening", not self.dampening, f"{why}, whose mean is the master")

    def _require(self, name: str, condition: bool, allowed: str):
        if not condition:
            value = getattr(self, name)
            raise ValueError(f"RemedyConfig.{name}: got {value!r}, allowed: {allowed}")

    @property
    def tracks(self) -> bool:
        """Whether oscillation is remembered."""
        return bool(self.track or self.freeze_above or self.reset_every)

    @property
    def remembers(self) -> bool:
        """Whether there is any memory, where there are FP4 weights."""
        return self.tracks or bool(self.ema_decay)


def _number(value, below: float) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value < below


PLAIN = RemedyConfig()


def start(config: RemedyConfig, params: Any, resolved: Resolved) -> Memory:
    """The memory before the first quantized update; {} where none is needed.

    updates: int32 [], seen so far. direction, frequency, rounded_way, master_way: of
    `weight_health.Oscillation`, the ways since the window began. far: float32 [], share of the
    weights that oscillated by their ways in the last whole window. frozen (bool), average (float32,
    of the rounded weight): of freezing. ema: float32, of the master.
    """
    weights = fp4(params, resolved)
    if not weights or not config.remembers:
        return {}
    memory: Memory = {"updates": jnp.zeros((), jnp.int32)}
    if config.tracks:
        memory |= _swapped({path: weight_health.fresh(w) for path, w in weights.items()})
        memory["far"] = {path: jnp.zeros((), jnp.float32) for path in weights}
    if config.freeze_above:
        memory["frozen"] = {path: jnp.zeros(w.shape, jnp.bool) for path, w in weights.items()}
        memory["average"] = {
            path: weight_health.hold(w, resolved.weights[path]).rounded
            for path, w in weights.items()
        }
    if config.ema_decay:
        memory["ema"] = {path: jnp.copy(w) for path, w in weights.items()}
    return memory


@jax.named_scope("quantization")
def rounded(
    config: RemedyConfig, params: Any, resolved: Resolved, memory: Memory, step: Array, seed: int
) -> Any:
    """The parameters that the forward pass of the update after `step` updates computes with.

    Without a remedy that rounds, `quantize_params`, bit for bit. Stochastic rounding depends on
    (seed, step, path) alone.
    """
    if config.rounding == "stochastic":
        uniform = _uniform(jax.random.fold_in(jax.random.key(seed), step), fp4(params, resolved))
        return _rounded_by(
            params, resolved, lambda path, w, fmt: quantize_stochastically(w, uniform[path], fmt)
        )
    return deployed(config, params, resolved, memory)


def deployed(config: RemedyConfig, params: Any, resolved: Resolved, memory: Memory) -> Any:
    """The parameters that a trained model is to be used with: what `rounded` gives, but to nearest
    where it drew. Rounding them to nearest once more keeps MXFP4's values."""
    if not config.ema_decay:
        return quantize_params(params, resolved.weights)
    return _rounded_by(
        params, resolved, lambda path, w, fmt: quantize_toward(w, memory["ema"][path], fmt)
    )


def adjusted(
    config: RemedyConfig, grads: Any, params: Any, rounded: Any, resolved: Resolved
) -> Any:
    """The gradients with dampening's part. Saturated weights, beyond all bins, get none."""
    if not config.dampening:
        return grads
    masters, values = flat_paths(params), flat_paths(rounded)

    def leaf(path: str, grad: Array) -> Array:
        w, fmt = masters[path], resolved.weights[path]
        inside = jnp.abs(w) <= weight_health.LARGEST * weight_health.hold(w, fmt).scale
        return grad + jnp.where(inside, 2 * config.dampening * (w - values[path]), 0)

    return changed(grads, {path: leaf(path, g) for path, g in fp4(grads, resolved).items()})


def applied(
    config: RemedyConfig, before: Any, after: Any, resolved: Resolved, memory: Memory
) -> tuple[Any, Memory]:
    """(masters, memory) after an update took the masters from `before` to `after`.

    A frozen weight stays as it is, and one that is frozen now gets the neighbour of its master that
    is the nearer to its average. Then, at the end of a window, resets.
    """
    if not memory:
        return after, memory
    old, new = fp4(before, resolved), fp4(after, resolved)
    if config.freeze_above:
        new = {p: jnp.where(memory["frozen"][p], old[p], w) for p, w in new.items()}
    updates = memory["updates"] + 1
    found: dict[str, dict[str, Array]] = {}
    for path, fmt in _formats(resolved).items():
        mine = {name: of[path] for name, of in memory.items() if name != "updates"}
        new[path], kept = _applied(config, old[path], new[path], fmt, mine, updates)
        for name, value in kept.items():
            found.setdefault(name, {})[path] = value
    return changed(after, new), {"updates": updates, **found}


def _applied(
    config: RemedyConfig, before: Array, after: Array, fmt: Format, memory: Memory, updates: Array
) -> tuple[Array, Memory]:
    """One weight's new master and memory."""
    kept = {}
    if config.ema_decay:
        kept["ema"] = config.ema_decay * memory["ema"] + (1 - config.ema_decay) * after
    if not config.tracks:
        return after, kept
    was, now = (_held(w, known.get("ema"), fmt) for w, known in ((before, memory), (after, kept)))
    state = Oscillation(*(memory[name] for name in Oscillation._fields))
    state = weight_health.track_held(state, was, now, jnp.abs(after - before))
    if config.freeze_above:
        average = MOMENTUM * now.rounded + (1 - MOMENTUM) * memory["average"]
        freezes = (state.frequency > config.freeze_above) & ~memory["frozen"]
        after = jnp.where(freezes, quantize_toward(after, average, fmt), after)
        kept |= {"average": average, "frozen": memory["frozen"] | freezes}
    ends = updates % (config.reset_every or WINDOW) == 0
    far = weight_health.far(state)
    kept["far"] = jnp.where(ends, jnp.mean(far, dtype=jnp.float32), memory["far"])
    if config.reset_every:
        resets = ends & far
        if config.freeze_above:
            resets &= ~kept["frozen"]
        after = jnp.where(resets, now.rounded, after)
        if config.ema_decay:  # or its mean would pull it off again
            kept["ema"] = jnp.where(resets, now.rounded, kept["ema"])
    state = state._replace(
        rounded_way=jnp.where(ends, 0, state.rounded_way),
        master_way=jnp.where(ends, 0, state.master_way),
    )
    return after, kept | state._asdict()


def metrics(memory: Memory) -> dict[str, Array]:
    """{"fp4/<part>/<name>": float32 []} of what is remembered, by `weight_health.part_of`:

    oscillating_often: share of weights whose frequency is above OFTEN. oscillating_far: share that
    oscillated by their ways in the last whole window. frozen: share.
    """
    shares = {
        "oscillating_often": lambda path: memory["frequency"][path] > weight_health.OFTEN,
        "oscillating_far": lambda path: memory["far"][path],
        "frozen": lambda path: memory["frozen"][path],
    }
    source = dict(zip(shares, ("frequency", "far", "frozen"), strict=True))
    found: dict[str, Array] = {}
    sizes: dict[str, int] = {}
    for name, share in shares.items():
        for path in memory.get(source[name], ()):
            key = f"fp4/{weight_health.part_of(path)}/{name}"
            size = memory["direction"][path].size
            counted = size * jnp.mean(share(path), dtype=jnp.float32)
            found[key] = found[key] + counted if key in found else counted
            sizes[key] = sizes.get(key, 0) + size
    return {key: total / sizes[key] for key, total in found.items()}


# ---- trees ----


def _formats(resolved: Resolved) -> dict[str, Format]:
    return {path: fmt for path, fmt in resolved.weights.items() if fmt.bits == 4}


def fp4(params: Any, resolved: Resolved) -> dict[str, Array]:
    """The weights of FP4 formats by path."""
    flat = flat_paths(params)
    return {path: flat[path] for path in _formats(resolved)}


def changed(params: Any, leaves: Mapping[str, Array]) -> Any:
    """The tree with the leaves at these paths."""

    def leaf(path, x):
        return leaves.get(jax.tree_util.keystr(path, simple=True, separator="/"), x)

    return jax.tree_util.tree_map_with_path(leaf, params)


def _rounded_by(
    params: Any, resolved: Resolved, rule: Callable[[str, Array, Format], Array]
) -> Any:
    """`quantize_params`, but FP4 weights by `rule`."""
    formats = _formats(resolved)
    others = {path: fmt for path, fmt in resolved.weights.items() if path not in formats}
    weights = fp4(params, resolved)
    leaves = {path: rule(path, w, formats[path]) for path, w in weights.items()}
    return changed(quantize_params(params, others), leaves)


def _swapped(states: Mapping[str, Oscillation]) -> Memory:
    """Field -> path -> array."""
    return {
        name: {path: getattr(state, name) for path, state in states.items()}
        for name in Oscillation._fields
    }


def _uniform(key: Array, weights: Mapping[str, Array]) -> dict[str, Array]:
    """Numbers in [0, 1) by path, each path's from a key of its own.

    Those of one shape are drawn together, which changes none and compiles sooner.
    """
    alike: dict[tuple[int, ...], list[str]] = {}
    for path, w in weights.items():
        alike.setdefault(w.shape, []).append(path)
    found: dict[str, Array] = {}
    for shape, paths in alike.items():
        keys = jnp.stack([jax.random.fold_in(key, zlib.crc32(path.encode())) for path in paths])
        drawn = jax.vmap(lambda key, shape=shape: jax.random.uniform(key, shape))(keys)
        found |= dict(zip(paths, drawn, strict=True))
    return found


def _held(weight: Array, ema: Array | None, fmt: Format) -> Held:
    """A weight as it is rounded: to nearest, or towards its mean."""
    held = weight_health.hold(weight, fmt)
    if ema is None:
        return held
    value = quantize_toward(weight, ema, fmt)
    return Held(value / held.scale, held.scale, value)

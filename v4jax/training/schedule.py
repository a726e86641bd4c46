"""What depends on the step: learning rate, loss weights, attention, what learns, lengths and rows.

Report 4.2.2: linear warm-up, constant for most of training, cosine to a tenth near the end; the
MTP loss weighs 0.3, then 0.1 from the start of the decay; attention is dense first (every visible
compressed entry attended, while the indexer's loss runs over all of them), then only the indexer
learns for a short stage, then attention is sparse; rows get longer (4K to 1M) and batches larger.
Everything here is a pure function of the step, jittable with the step traced; what changes a
step's program (what learns, shapes) is in `v4jax.training.stages`.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp

FLAGS = {
    "total_steps": "steps",
    "warmup_steps": "warmup",
    "decay_start": "decay_start",
    "decay_end": "decay_end",
    "final_fraction": "final_fraction",
    "dense_until": "dense_until",
    "indexer_warmup": "indexer_warmup",
    "index_start": "index_start",
    "lengths": "lengths",
    "batch_sizes": "batch_sizes",
}
"""Field of `ScheduleConfig` -> the flag of the experiments that sets it: errors name both."""

Starts = tuple[tuple[int | float, int], ...]
"""(from which step or fraction of the steps, value) in order; () is one value throughout."""


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Steps (int) or a fraction of `total_steps` (float in [0, 1]), where both types are named.

    warmup_steps: of the learning rate; 0 is none. decay_start, decay_end: a cosine falls between
    them to `final_fraction`, which stays; decay_start 1.0 is no decay.
    dense_until: attention is dense before it. indexer_warmup: so many steps from there on, still
    dense, in which only the indexer learns. index_start: from where its loss counts.
    lengths: (start, tokens a row), growing, the last one the run's sequence length.
    batch_sizes: (start, rows a step), growing, the last one the run's batch size.

    Construction raises a ValueError of one line on values that cannot be.
    """

    total_steps: int
    warmup_steps: int | float = 0.03
    decay_start: int | float = 0.7
    final_fraction: float = 0.1  # of the learning rate, reached at `decay_end`
    mtp_weight: float = 0.3
    mtp_weight_decayed: float = 0.1  # from `decay_start` on
    dense_until: int | float = 0.1
    decay_end: int | float = 1.0
    indexer_warmup: int | float = 0
    index_start: int | float = 0
    lengths: Starts = ()
    batch_sizes: Starts = ()

    def __post_init__(self):
        whole = isinstance(self.total_steps, int) and not isinstance(self.total_steps, bool)
        self._require("total_steps", whole and self.total_steps >= 1, "an integer >= 1")
        for name in ("mtp_weight", "mtp_weight_decayed"):
            self._require(name, _number(getattr(self, name), math.inf), "a number >= 0")
        self._require("final_fraction", _number(self.final_fraction, 1.0), "a number in [0, 1]")
        for name in STEPS:
            within = self.resolve(name) <= self.total_steps
            self._require(name, within, f"at most the {self.total_steps} steps of the run")
        for name in ("lengths", "batch_sizes"):
            self._require_starts(name)
        self._require_order()

    def _require_order(self):
        """Phases follow each other."""
        self._require_at_most("warmup_steps", "decay_start")
        later = self.resolve("decay_end") >= self.resolve("decay_start")
        self._require("decay_end", later, f">= decay_start ({self.decay_start!r})")
        self._require_at_most("index_start", "dense_until")
        if not self.resolve("indexer_warmup"):
            return
        self._require_at_most("warmup_steps", "dense_until", ": indexer_warmup begins there")
        room = self.resolve("decay_start") - self.resolve("dense_until")
        self._require(
            "indexer_warmup",
            self.sparse_from <= self.resolve("decay_start"),
            f"at most the {max(room, 0)} steps from dense_until ({self.dense_until!r}) to "
            f"decay_start ({self.decay_start!r})",
        )

    def _require_at_most(self, name: str, other: str, why: str = ""):
        holds = self.resolve(name) <= self.resolve(other)
        self._require(name, holds, f"<= {other} ({getattr(self, other)!r}){why}")

    def _require_starts(self, name: str):
        try:
            pairs = tuple((start, value) for start, value in getattr(self, name))
        except (TypeError, ValueError):
            self._require(name, False, "(start, value) pairs")
            return
        object.__setattr__(self, name, pairs)  # JSON has lists
        starts = [at for at, _ in self.starts(name, 1)]
        values = [value for _, value in pairs]
        self._require(
            name,
            starts[0] == 0
            and starts[-1] < self.total_steps
            and _grow(starts)
            and all(type(value) is int and value >= 1 for value in values)
            and _grow(values),
            "(start, value) pairs, the first start 0, starts growing and within the "
            f"{self.total_steps} steps, values growing, integers >= 1",
        )

    def _require(self, name: str, condition: bool, allowed: str):
        if not condition:
            raise ValueError(f"{named(name)}: got {getattr(self, name)!r}, allowed: {allowed}")

    def resolve(self, name: str) -> int:
        """The field's value in steps."""
        return resolve_steps(named(name), getattr(self, name), self.total_steps)

    def starts(self, name: str, last: int) -> tuple[tuple[int, int], ...]:
        """`lengths` or `batch_sizes` as (first step, value); where it is (): (0, `last`)."""
        pairs = getattr(self, name) or ((0, last),)
        return tuple((resolve_steps(named(name), at, self.total_steps), v) for at, v in pairs)

    @property
    def sparse_from(self) -> int:
        """Steps before it attend densely: the dense ones and the indexer's warm-up."""
        return self.resolve("dense_until") + self.resolve("indexer_warmup")


STEPS = (
    "warmup_steps",
    "decay_start",
    "decay_end",
    "dense_until",
    "indexer_warmup",
    "index_start",
)
"""The fields of `ScheduleConfig` that are steps or fractions of the steps."""


def named(field: str) -> str:
    """A field of `ScheduleConfig` as errors name it, with its flag."""
    return f"ScheduleConfig.{field}" + (f" (--{FLAGS[field]})" if field in FLAGS else "")


def resolve_steps(name: str, value: int | float, total_steps: int) -> int:
    """Steps as they are (int), a fraction of `total_steps` rounded to a step (float in [0, 1]).

    Raises ValueError, one line that begins with `name`, on anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, float) and 0.0 <= value <= 1.0:
        return round(value * total_steps)
    raise ValueError(
        f"{name}: got {value!r}, allowed: steps (an integer >= 0) or a fraction of the "
        f"{total_steps} steps (a number with a decimal point in [0.0, 1.0])"
    )


def _grow(values: list) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))


def _number(value, largest: float) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 <= value <= largest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Phase:
    """A step's settings, traced scalars.

    Attributes:
      lr_scale: float32 [], a factor of the peak learning rate, never 0 before the decay.
      mtp_weight: float32 [], weight of the MTP loss.
      dense: bool [], every visible compressed entry is attended, not only the selected ones.
      index: bool [], the indexer's loss counts.
    """

    lr_scale: jax.Array
    mtp_weight: jax.Array
    dense: jax.Array
    index: jax.Array


def learning_rate_scale(config: ScheduleConfig, step) -> jax.Array:
    """The factor of the peak learning rate for the update after `step` updates, float32 [].

    (step + 1) / warm-up, so that the first update is not lost, then 1, then half a cosine from 1
    at `decay_start` to `final_fraction` at `decay_end` and after.
    """
    step = jnp.asarray(step, jnp.int32)
    warmup, decay, end = map(config.resolve, ("warmup_steps", "decay_start", "decay_end"))
    rise = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
    done = jnp.clip((step - decay) / max(end - decay, 1), 0.0, 1.0)
    fall = (1.0 + jnp.cos(jnp.pi * done)) / 2.0
    scale = rise * (config.final_fraction + (1.0 - config.final_fraction) * fall)
    return scale.astype(jnp.float32)


def phase(config: ScheduleConfig, step) -> Phase:
    """The settings of the training step that follows `step` updates (int or int32 [])."""
    step = jnp.asarray(step, jnp.int32)
    decaying = step >= config.resolve("decay_start")
    mtp_weight = jnp.where(decaying, config.mtp_weight_decayed, config.mtp_weight)
    return Phase(
        lr_scale=learning_rate_scale(config, step),
        mtp_weight=mtp_weight.astype(jnp.float32),
        dense=step < config.sparse_from,
        index=step >= config.resolve("index_start"),
    )

"""What depends on the step: learning rate, MTP weight, and dense or sparse attention.

Report 4.2.2: linear warm-up, constant for most of training, cosine to a tenth near the end; the
MTP loss weighs 0.3, then 0.1 from the start of the decay; attention is dense first (every visible
compressed entry attended, while the indexer's loss runs over all of them), then sparse.
Everything is a pure function of the step, jittable with the step traced. A later stage or
curriculum is one more field of `ScheduleConfig` and one more scalar of `Phase`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Lengths in steps (int) or as a fraction of `total_steps` (float in [0, 1]).

    Construction raises a ValueError of one line on values that cannot be. `warmup_steps` 0 is no
    warm-up; `decay_start` 1.0 is no decay.
    """

    total_steps: int
    warmup_steps: int | float = 0.03
    decay_start: int | float = 0.7
    final_fraction: float = 0.1  # of the learning rate, reached at `total_steps`
    mtp_weight: float = 0.3
    mtp_weight_decayed: float = 0.1  # from `decay_start` on
    dense_steps: int | float = 0.1

    def __post_init__(self):
        whole = isinstance(self.total_steps, int) and not isinstance(self.total_steps, bool)
        self._require("total_steps", whole and self.total_steps >= 1, "an integer >= 1")
        for name in ("mtp_weight", "mtp_weight_decayed"):
            self._require(name, _number(getattr(self, name), math.inf), "a number >= 0")
        self._require("final_fraction", _number(self.final_fraction, 1.0), "a number in [0, 1]")
        for name in ("warmup_steps", "decay_start", "dense_steps"):
            self.resolve(name)
        self._require(
            "warmup_steps",
            self.resolve("warmup_steps") <= self.resolve("decay_start"),
            f"<= decay_start ({self.decay_start!r})",
        )

    def _require(self, name: str, condition: bool, allowed: str):
        if not condition:
            value = getattr(self, name)
            raise ValueError(f"ScheduleConfig.{name}: got {value!r}, allowed: {allowed}")

    def resolve(self, name: str) -> int:
        """The field's value in steps."""
        return resolve_steps(f"ScheduleConfig.{name}", getattr(self, name), self.total_steps)


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
    """

    lr_scale: jax.Array
    mtp_weight: jax.Array
    dense: jax.Array


def learning_rate_scale(config: ScheduleConfig, step) -> jax.Array:
    """The factor of the peak learning rate for the update after `step` updates, float32 [].

    (step + 1) / warm-up, so that the first update is not lost, then 1, then half a cosine from 1
    at `decay_start` to `final_fraction` at `total_steps` and after.
    """
    step = jnp.asarray(step, jnp.int32)
    warmup, decay = config.resolve("warmup_steps"), config.resolve("decay_start")
    rise = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
    done = jnp.clip((step - decay) / max(config.total_steps - decay, 1), 0.0, 1.0)
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
        dense=step < config.resolve("dense_steps"),
    )

"""Loss spikes: whether the loss jumped just now, and at which step the jump began.

Level and trend of the loss are those of a straight line through the past losses, fitted by least
squares in which each counts `decay` times as much as the next, so that a loss that falls steeply
is not taken for noise:

    z = (loss - the next value of the line) / sigma,   sigma = 1.4826 x median of |last residuals|

A spike is a z above `threshold`; its onset is the first step of the unbroken run of z above
`suspect` that led to it. What is suspect is not learned from, or a slow rise would hide itself,
but after `lookback` such losses in a row it is the new normal. Report 4.2.3 has a detector and
does not describe it. Exponential means of level, trend and variance, as public re-implementations
have, still swing and hide spikes hundreds of steps after the steep start of a run.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class SpikeConfig:
    """threshold, suspect: in standard deviations. warmup: losses before the first alarm. cooldown:
    steps after an alarm without another, but not where a return skips the data. Construction raises
    a ValueError of one line."""

    threshold: float = 6.0
    suspect: float = 2.5
    lookback: int = 64
    warmup: int = 100
    cooldown: int = 500
    decay: float = 0.9

    def __post_init__(self):
        rules = {
            "threshold": (self.threshold > self.suspect, f"above suspect ({self.suspect})"),
            "suspect": (self.suspect > 0, "a number above 0"),
            "lookback": (self.lookback >= 1, "1 or more"),
            "warmup": (self.warmup >= 10, "10 or more"),
            "cooldown": (self.cooldown >= 0, "0 or more"),
            "decay": (0 < self.decay < 1, "between 0 and 1"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise ValueError(
                    f"SpikeConfig.{name}: got {getattr(self, name)!r}, allowed: {allowed}"
                )


DEFAULT = SpikeConfig()


class SpikeState(NamedTuple):
    """What the detector remembers: numbers alone, so JSON keeps every bit of it.

    seen: losses so far. sums: of the fit, discounted, over times t <= 0 from the newest loss y: of
    1, t, t^2, y, t y. residuals: the last `lookback` that were not suspect. suspects: losses in a
    row that were, the first of them at step `onset`. quiet_until: no alarm before this step.
    """

    seen: int = 0
    sums: tuple[float, ...] = (0.0,) * 5
    residuals: tuple[float, ...] = ()
    suspects: int = 0
    onset: int = 0
    quiet_until: int = 0

    @classmethod
    def from_json(cls, fields: list) -> SpikeState:
        """Of what JSON makes of a state: a list, with lists for tuples."""
        seen, sums, residuals, *rest = fields
        return cls(seen, tuple(sums), tuple(residuals), *rest)


class Spike(NamedTuple):
    """step: where it was seen. onset: where it began. z: how far from the prediction, in sigmas."""

    step: int
    onset: int
    z: float

    def __str__(self) -> str:
        return f"loss spike at step {self.step}, {self.z:.1f} sigma, since step {self.onset}"


def observe(
    config: SpikeConfig, state: SpikeState, step: int, loss: float
) -> tuple[SpikeState, Spike | None]:
    """The state after the loss of `step`, and the spike that it completes.

    A loss that is not finite is no spike and changes nothing: such a step is dealt with apart.
    """
    if not math.isfinite(loss):
        return state, None
    residual = loss - predicted(state.sums, loss)
    armed = state.seen >= config.warmup
    # A loss that does not vary at all has no spread: an ulp of it would be a spike.
    spread = statistics.median(map(abs, state.residuals)) if state.residuals else math.inf
    z = residual / max(1.4826 * spread, 1e-6 * abs(loss), 1e-30)
    state = state._replace(seen=state.seen + 1)
    if armed and z > config.suspect and state.suspects < config.lookback:
        onset = state.onset if state.suspects else step
        if z > config.threshold and step >= state.quiet_until:
            quiet_until = step + 1 + config.cooldown
            state = state._replace(suspects=0, quiet_until=quiet_until)
            return _passed_over(config, state), Spike(step, onset, z)
        state = state._replace(suspects=state.suspects + 1, onset=onset)
        return _passed_over(config, state), None
    suspects = state.suspects if armed and z > config.suspect else 0
    sums = _moved(config, state.sums)
    return state._replace(
        sums=(sums[0] + 1, sums[1], sums[2], sums[3] + loss, sums[4]),
        residuals=(*state.residuals, residual)[-config.lookback :],
        suspects=suspects,
    ), None


def predicted(sums: tuple[float, ...], otherwise: float) -> float:
    """The line's value one step after the newest loss; `otherwise` where there is no line yet."""
    ones, t, tt, y, ty = sums
    determinant = ones * tt - t * t
    if determinant <= 1e-9 * ones * ones:  # fewer than two losses
        return y / ones if ones else otherwise
    slope = (ones * ty - t * y) / determinant
    return (y - slope * t) / ones + slope


def _moved(config: SpikeConfig, sums: tuple[float, ...]) -> tuple[float, ...]:
    """The sums one step later: every loss is one step older and counts less."""
    ones, t, tt, y, ty = sums
    older = (ones, t - ones, tt - 2 * t + ones, y, ty - y)
    return tuple(config.decay * x for x in older)


def _passed_over(config: SpikeConfig, state: SpikeState) -> SpikeState:
    return state._replace(sums=_moved(config, state.sums))

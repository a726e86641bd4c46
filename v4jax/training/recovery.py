"""What a run does when its loss jumps or is not finite: when to go back, to where, what then.

Everything here is numbers of the host, a pure function of the losses seen, and part of each
checkpoint: a run killed at any instant, in the middle of going back too, comes to the same
decisions again. That is why a run goes back to checkpoints of its regular pace alone, and why a
spike is told one step later: no step then waits for its own loss.

Steps count updates: update `step` is the one after which so many were made.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax

from v4jax.training.anticipation import Active
from v4jax.training.spikes import SpikeState, observe
from v4jax.training.stability import StabilityConfig

Event = dict[str, Any]
"""{"step": when it was seen, "event": its name, ...}; of JSON's types."""


class Return(NamedTuple):
    """Go back to the newest regular checkpoint before step `before`. step: where it was seen."""

    step: int
    before: int
    why: str
    event: str


class Ruin(NamedTuple):
    """End the run: going back did not help."""

    why: str


Verdict = Return | Ruin


@dataclasses.dataclass(frozen=True)
class Recovery:
    """What a run remembers of its losses and of what it did about them.

    failed: steps in a row that were not finite. rollbacks: how often it went back. active: the
    steps that route by older parameters. skips: (step, n): from that step on, the data is n rows
    further on. events: everything that happened, oldest first.
    """

    spikes: SpikeState = SpikeState()
    failed: int = 0
    rollbacks: int = 0
    active: Active | None = None
    skips: tuple[tuple[int, int], ...] = ()
    events: tuple[Event, ...] = ()

    @classmethod
    def begin(cls, config: StabilityConfig) -> Recovery:
        """At the start of a run."""
        at = config.anticipate_from
        return cls(active=None if at is None else Active(at, at + config.active_steps))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Recovery:
        """Inverse of `to_json`, also after JSON."""
        active = fields["active"]
        return cls(
            spikes=SpikeState.from_json(fields["spikes"]),
            failed=fields["failed"],
            rollbacks=fields["rollbacks"],
            active=None if active is None else Active(*active),
            skips=tuple((step, count) for step, count in fields["skips"]),
            events=tuple(dict(event) for event in fields["events"]),
        )

    def skipped(self, step: int) -> int:
        """Rows of data that no update took, before those of update `step` + 1."""
        return sum(count for first, count in self.skips if first <= step)

    def phase(self, config: StabilityConfig, step: int) -> str:
        """Of routing, for update `step` + 1: as `Active.phase`."""
        return "normal" if self.active is None else self.active.phase(step, config.delay_steps)

    def lag(self, config: StabilityConfig, step: int) -> int | None:
        """How old the choice of experts is in update `step` + 1; None: not older."""
        return None if self.active is None else self.active.lag(step, config.delay_steps)

    def ahead(self, config: StabilityConfig, step: int) -> range:
        """The updates, less 1, whose batches are looked at before update `step` + 1."""
        return range(0) if self.active is None else self.active.ahead(step, config.delay_steps)

    def saw(
        self, config: StabilityConfig, step: int, loss: float, norm: float, applied: bool
    ) -> tuple[Recovery, Verdict | None]:
        """After update `step`, with its loss (nats a token), its gradient's norm, and whether it
        was applied: what is remembered, and what to do."""
        found = self._told(_changed_phase(self, config, step))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return found._not_finite(config, step, loss, norm)
        if not applied:
            found = found._told({"step": step, "event": "outlier", "loss": loss, "norm": norm})
        spikes, spike = observe(config.spikes, self.spikes, step, loss)
        found = dataclasses.replace(found, spikes=spikes, failed=0)
        if spike is None:
            return found, None
        event = {"step": step, "event": "spike", "onset": spike.onset, "z": spike.z, "loss": loss}
        found = found._told(event)
        routed = self.active is not None and step <= self.active.end
        if config.on_spike == "note" or routed or self.rollbacks >= config.max_rollbacks:
            return found, None
        return found, Return(step, spike.onset, str(spike), config.on_spike)

    def _not_finite(
        self, config: StabilityConfig, step: int, loss: float, norm: float
    ) -> tuple[Recovery, Verdict | None]:
        failed = self.failed + 1
        event = {"step": step, "event": "not finite", "loss": str(loss), "norm": str(norm)}
        found = dataclasses.replace(self, failed=failed)._told(event)
        if failed < config.max_nonfinite:
            return found, None
        first = step - failed + 1
        why = f"loss or gradient not finite in steps {first} to {step}"
        if self.rollbacks < config.max_rollbacks:
            return found, Return(step, first, why, "rollback")
        return found, Ruin(f"{why}, after {self.rollbacks} returns to a checkpoint")

    def back(
        self, config: StabilityConfig, order: Return, there: Recovery, step: int, rows: int
    ) -> Recovery:
        """What is remembered at checkpoint `step`, where `there` was, once `order` is carried out.

        rows: of data that the updates from there to `order.step` take.

        Events, the number of returns and the data skipped stay known; the detector is as it was
        there. Where the same data comes again it is silent beyond the spike. Where data is skipped
        the next may be as bad: of its steps with a jump a second return skips 2 times as many, a
        third 4 times, so that a few returns get past many bad batches.
        """
        event = {"step": order.step, "event": order.event, "to": step, "why": order.why}
        found = dataclasses.replace(
            self,
            spikes=there.spikes,
            failed=0,
            rollbacks=self.rollbacks + 1,
            active=there.active,
        )
        if order.event == "anticipate":
            active = Active(step, step + config.active_steps)
            event |= {"from": step, "until": active.end}
            quiet = max(order.step + 1 + config.spikes.cooldown, there.spikes.quiet_until)
            spikes = there.spikes._replace(quiet_until=quiet)
            return dataclasses.replace(found, active=active, spikes=spikes)._told(event)
        more = (2**self.rollbacks - 1) * (order.step + 1 - order.before)  # steps
        rows += rows * more // (order.step - step)
        # On with the rows after those that the order is about, whatever was skipped on the way.
        kept = tuple(skip for skip in self.skips if skip[0] <= step)
        here = dataclasses.replace(found, skips=kept)
        count = rows + self.skipped(order.step - 1) - here.skipped(step)
        event |= {"rows": count}
        return dataclasses.replace(here, skips=(*kept, (step, count)))._told(event)

    def _told(self, event: Event | None) -> Recovery:
        return self if event is None else dataclasses.replace(self, events=(*self.events, event))


def _changed_phase(recovery: Recovery, config: StabilityConfig, step: int) -> Event | None:
    """Update `step` was the first of another phase of anticipatory routing."""
    before, now = (recovery.phase(config, s) for s in (step - 2, step - 1))
    if before == now:
        return None
    return {"step": step, "event": "anticipatory routing", "phase": now}


def describe(event: Event) -> str:
    """One line."""
    details = {name: value for name, value in event.items() if name not in ("step", "event")}
    shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in details.items())
    return f"step {event['step']}: {event['event']}; {', '.join(shown)}"


class Watch:
    """Follows the steps of a run, one behind.

    recovery: what is remembered where it goes on. pending: a verdict not yet told, as `keep` says.
    """

    def __init__(self, config: StabilityConfig, recovery: Recovery, pending: Verdict | None = None):
        self.recovery = recovery
        self._config, self._pending = config, pending
        self._waiting: tuple[int, Any] | None = None

    def saw(self, step: int, metrics: Any) -> Verdict | None:
        """Call after each step, with its metrics: what to do about the one before it."""
        self._look()
        verdict, self._pending = self._pending, None
        self._waiting = step, tuple(metrics[name] for name in ("loss", "grad_norm", "applied"))
        return verdict

    def last(self) -> Verdict | None:
        """What to do about the last step, which it waits for."""
        self._look()
        verdict, self._pending = self._pending, None
        return verdict

    def keep(self) -> dict[str, Any]:
        """For a checkpoint, of JSON's types. Waits for the last step; a verdict on it is told after
        the next one, as it would have been."""
        self._look()
        pending = self._pending
        told = None if pending is None else [type(pending).__name__, *pending]
        return {"recovery": self.recovery.to_json(), "pending": told}

    @classmethod
    def resumed(cls, config: StabilityConfig, kept: dict[str, Any] | None) -> Watch:
        """From what `keep` gave, also after JSON; None: at the start of a run."""
        if kept is None:
            return cls(config, Recovery.begin(config))
        told, pending = kept["pending"], None
        if told is not None:
            pending = {"Return": Return, "Ruin": Ruin}[told[0]](*told[1:])
        return cls(config, Recovery.from_json(kept["recovery"]), pending)

    def _look(self) -> None:
        if self._waiting is None:
            return
        step, values = self._waiting
        self._waiting = None
        loss, norm, applied = (float(x) for x in jax.device_get(values))
        self.recovery, self._pending = self.recovery.saw(
            self._config, step, loss, norm, applied > 0
        )

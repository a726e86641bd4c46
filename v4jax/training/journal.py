"""What happened to a run beside its steps, for people and for reports: events and undone lines.

    <run>/events.jsonl   one line an event (`recovery.Event`), also said when it happens
    <run>/undone.jsonl   the lines of metrics.jsonl that a return to a checkpoint took back, each
                         with "rollback", the number of that return

The truth is in the checkpoints: a run that goes on writes events.jsonl anew from there.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from v4jax import distributed
from v4jax.training.files import as_path
from v4jax.training.metrics import read_metrics, to_json
from v4jax.training.recovery import Event, Recovery, describe
from v4jax.training.run_config import write_atomically


class Journal:
    """Tells what is new in a run's `Recovery`; recovery: what is known where it goes on."""

    def __init__(self, folder: pathlib.Path, recovery: Recovery):
        self._folder, self._events = folder, recovery.events
        if distributed.is_main() and (recovery.events or (folder / "events.jsonl").exists()):
            self._write()

    def tell(self, recovery: Recovery) -> None:
        """Says the new events and writes them down."""
        new = recovery.events[len(self._events) :]
        if not new:
            return
        self._events = recovery.events
        for event in new:
            distributed.say(f"{self._folder.name}: {describe(event)}")
        if distributed.is_main():
            self._write()

    def _write(self) -> None:
        lines = [json.dumps(event) + "\n" for event in self._events]
        write_atomically(self._folder / "events.jsonl", "".join(lines))


def of_events(events: Sequence[Event]) -> dict[str, float]:
    """Metrics of the step at which events were told: `spike_onset` (a step), `spike_z` (sigmas),
    `not_finite` and `outlier` (the step that was left out)."""
    found: dict[str, float] = {}
    for event in events:
        if event["event"] == "spike":
            found |= {"spike_onset": event["onset"], "spike_z": event["z"]}
        elif event["event"] in ("not finite", "outlier"):
            found[event["event"].replace(" ", "_")] = event["step"]
    return found


def read_events(folder: str | os.PathLike) -> list[Event]:
    """The events of the run in `folder`, oldest first; [] without any."""
    return _read(as_path(folder) / "events.jsonl")


def set_aside(folder: pathlib.Path, step: int, rollback: int) -> None:
    """Copies the metrics after `step` to undone.jsonl, as those of return number `rollback`."""
    path = folder / "undone.jsonl"
    kept = [line for line in _read(path) if line["rollback"] < rollback]
    undone = [to_json(line) for line in read_metrics(folder) if line["step"] > step]
    kept += [{"rollback": rollback} | line for line in undone]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


def read_undone(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines that were taken back, in the order of their returns; [] without any."""
    return _read(as_path(folder) / "undone.jsonl")


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

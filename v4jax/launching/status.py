"""What every run of a sweep does now, read from its folder; `python launch.py status DIR`.

An experiment says how far it is by its files: `<run>/<phase>/metrics.jsonl`, whose lines have step,
loss and seconds_per_step, and, if it knows what is to come, `<run>/phases.json`, the phases in the
order in which they run: [{"name": "pretrain", "first": 0, "last": 448}, ...].
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from v4jax.launching import claim
from v4jax.launching.display import display, table
from v4jax.launching.run_folder import RunFolder, State
from v4jax.training.files import as_path, read_end, together

REFRESH = 1.0
"""Seconds between two looks with --watch."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is; None where it does not say.

    step, steps: updates made and to make, over all phases. eta: seconds to go, from the median
    seconds_per_step of the last lines.
    """

    phase: str | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    seconds_per_step: float | None = None
    eta: float | None = None


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """A run's state and progress. state: one of `run_folder.STATES`, or "lost": running, says its
    folder, but its launcher is dead; the sweep's command goes on with it."""

    name: str
    state: State
    progress: Progress

    def to_dict(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self.state) | dataclasses.asdict(self.progress)
        return {"name": self.name} | fields


def inspect(name: str, folder: pathlib.Path) -> RunStatus:
    """What the run in `folder` does now. Raises ValueError, one line, on a damaged state.json."""
    files = RunFolder(folder)
    state = files.read_state()
    if state.state == "running" and claim.owner_of(files.claims) is None:
        state = files.read_state()  # it may have ended in between
        if state.state == "running":
            state = dataclasses.replace(state, state="lost")
    return RunStatus(name, state, read_progress(folder) if state.attempt else Progress())


def read_progress(folder: pathlib.Path) -> Progress:
    """How far the run in `folder` is, from its own files; damaged ones count as absent."""
    newest, phase = 0.0, None
    for path in [*folder.glob("*/metrics.jsonl"), *folder.glob("metrics.jsonl")]:
        try:
            modified = path.stat().st_mtime
        except OSError:
            continue
        if modified > newest:
            newest, phase = modified, path
    if phase is None:
        return Progress()
    rows = _last_rows(phase)
    if not rows:
        return Progress(phase=phase.parent.name)
    step, loss = int(rows[-1]["step"]), _number(rows[-1].get("loss"))
    took = [s for row in rows[-20:] if (s := _number(row.get("seconds_per_step"))) is not None]
    seconds = statistics.median(took) if took else None
    done, steps = _over_phases(folder, phase.parent.name, step)
    left = None if steps is None or seconds is None else max(0, steps - done) * seconds
    return Progress(phase.parent.name, done, steps, loss, seconds, left)


def _over_phases(folder: pathlib.Path, phase: str, step: int) -> tuple[int, int | None]:
    """(steps made in this and all earlier phases, steps of all); (step, None) if nothing says."""
    try:
        phases = [
            (str(one["name"]), int(one["first"]), int(one["last"]))
            for one in json.loads((folder / "phases.json").read_bytes())
        ]
    except (OSError, ValueError, LookupError, TypeError):
        return step, None
    before = 0
    for name, first, last in phases:
        if name == phase:
            return before + step - first, sum(end - begin for _, begin, end in phases)
        before += last - first
    return step, None


def _last_rows(path: pathlib.Path, size: int = 16384) -> list[dict]:
    """The whole lines within the last bytes of the file that are objects with a step."""
    try:
        end, cut = read_end(path, size)
        lines = end.split(b"\n")[cut:-1]  # the last one is empty, or torn
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, LookupError, TypeError):
            continue
        rows.append(row)
    return rows


def _number(value: Any) -> float | None:
    try:
        return float(value)  # "NaN" is written as a string
    except (TypeError, ValueError):
        return None


def find_runs(folder: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
    """(name, folder) of the runs of the sweep in `folder`, which may also be a single run's.

    Raises ValueError, one line, where there is neither.
    """
    from v4jax.launching.plan import read_plan

    if (folder / "sweep.json").exists():
        return [(run.name, run.folder) for run in read_plan(folder).runs]
    if (folder / "launch" / "state.json").exists():
        return [(folder.name, folder)]
    missing = "there is no such folder" if not folder.is_dir() else "it holds no sweep"
    raise ValueError(f"status {folder}: {missing}; give the --workdir of a sweep")


def look(runs: Iterable[tuple[str, pathlib.Path]]) -> list[RunStatus]:
    """`inspect` of each run; one with a damaged state.json stays, as failed."""

    def one(run: tuple[str, pathlib.Path]) -> RunStatus:
        try:
            return inspect(*run)
        except ValueError as error:
            return RunStatus(run[0], State("failed", error=str(error)), Progress())

    listed = list(runs)
    return together(one, listed, listed[0][1]) if listed else []


def main(folder: str | pathlib.Path, watch: bool = False, as_json: bool = False) -> int:
    """Prints what each run in `folder` does now; with `watch` until all have ended or Ctrl-C.

    as_json: one JSON object a line instead: {"counts": {state: number}, "runs": [{...}]}.

    Raises ValueError, one line, where the folder holds no sweep.
    """
    folder = as_path(folder)
    screen = display(sys.stdout) if watch and not as_json else None
    try:
        while True:
            found = look(find_runs(folder))
            if as_json:
                print(to_json(found), flush=True)
            elif screen is not None:
                screen.update(found)
            else:
                print("\n".join(table(found)), flush=True)
            if not watch or all(one.state.state in ("done", "failed") for one in found):
                return 0
            time.sleep(REFRESH)
    except KeyboardInterrupt:
        return 130
    finally:
        if screen is not None:
            screen.close()


def to_json(found: Sequence[RunStatus]) -> str:
    """One line; NaN and infinities are strings, as in metrics.jsonl."""
    counts: dict[str, int] = {}
    for one in found:
        counts[one.state.state] = counts.get(one.state.state, 0) + 1
    runs = [
        {k: str(v) if isinstance(v, float) and v - v != 0 else v for k, v in one.to_dict().items()}
        for one in found
    ]
    return json.dumps({"counts": counts, "runs": runs}, sort_keys=True)

"""The runs of a sweep: their names, folders and arguments, and sweep.json, which keeps them.

sweep.json stands in the sweep's folder and knows nothing of where that is, so a folder can move.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from v4jax.launching import claim
from v4jax.training.files import absolute, in_bucket, write_whole

FORMAT = 1
LONGEST = 100  # characters of a run's name


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: started with `arguments` and, after them, --workdir=`folder`."""

    name: str
    folder: Path
    settings: dict[str, str]  # flag -> value, what the sweep set
    arguments: tuple[str, ...]
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)  # `settings` as parsed


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep: runs of one experiment that differ by flags.

    axes: flag -> its values in the sweep, in order. fixed: the flags that all runs have, in one
    spelling, so that two starts can be compared. after_switch: flags that leave the pre-training
    as it is; growing: flags by which a later start may differ, to add runs. Neither is kept in
    sweep.json.
    """

    experiment: str
    workdir: Path
    runs: tuple[Run, ...]
    axes: dict[str, list[str]]
    fixed: tuple[str, ...] = ()
    after_switch: tuple[str, ...] = ()
    growing: tuple[str, ...] = ()

    def share(self, one: Run, other: Run) -> bool:
        """Whether the two have one pre-training, which the second may copy from the first."""
        first, second = (
            {setting for setting in _key(run) if setting[0] not in self.after_switch}
            for run in (one, other)
        )
        return bool(self.after_switch) and first == second

    def parsed(self, values: Sequence[Mapping[str, str]]) -> Plan:
        """This plan with the `values` that every run's settings mean to the experiment.

        1e-3 and 0.001 mean the same: the first spelling stands for all, and of equal runs there is
        one.
        """
        runs = (
            dataclasses.replace(run, values=dict(own))
            for run, own in zip(self.runs, values, strict=True)
        )
        return self._with(_unique(runs))

    def _with(self, runs: Sequence[Run]) -> Plan:
        return dataclasses.replace(self, runs=tuple(runs), axes=_axes(runs))

    def settled(self) -> Plan:
        """This plan with the names that an earlier start in its folder gave to equal settings.

        Raises:
          ValueError: the folder holds a sweep of another experiment or of other fixed flags, or
            its sweep.json is damaged.
        """
        stored = self._stored()
        if stored is None:
            return self
        differs = []
        if stored.experiment != self.experiment:
            differs.append((f"--experiment={stored.experiment}", f"--experiment={self.experiment}"))
        before, now = self._lasting(stored.fixed), self._lasting(self.fixed)
        if before != now:
            before = [flag for flag in before if flag not in self.fixed]
            now = [flag for flag in now if flag not in stored.fixed]
            differs.append((" ".join(before) or "none of these", " ".join(now) or "no such flag"))
        if differs:
            before_all, now_all = (" ".join(side) for side in zip(*differs, strict=True))
            raise ValueError(
                f"--workdir={self.workdir}: its sweep has {before_all}, this one {now_all}; give "
                "the same flags, or another folder"
            )
        known = {_key(run): run for run in _unique([*stored.runs, *self.runs])}
        return self._with([known[_key(run)] for run in self.runs])

    def write(self) -> Plan:
        """Adds the runs to sweep.json of the folder, which it makes; returns `settled()`.

        Raises:
          ValueError: see `settled`; or the folder cannot be written.
        """
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            with _alone(self.workdir):  # or of two launchers, one would drop the other's runs
                plan, stored = self.settled(), self._stored()
                runs = {run.name: run for run in (*(stored.runs if stored else ()), *plan.runs)}
                everything = dataclasses.replace(plan, runs=tuple(runs.values()))
                if stored and len(runs) == len(stored.runs):  # fewer seeds than it has: those stand
                    everything = dataclasses.replace(everything, fixed=stored.fixed)
                write_whole(self.workdir / "sweep.json", _to_json(everything))
        except OSError as error:
            raise ValueError(
                f"--workdir={self.workdir}: cannot be written: {error.strerror or error}"
            ) from error
        return plan

    def _lasting(self, fixed: Sequence[str]) -> list[str]:
        return [flag for flag in fixed if flag[2:].partition("=")[0] not in self.growing]

    def _stored(self) -> Plan | None:
        return read_plan(self.workdir) if (self.workdir / "sweep.json").exists() else None


def make_plan(
    experiment: str,
    workdir: str | os.PathLike[str],
    settings: Sequence[Mapping[str, str]],
    arguments: Sequence[str] = (),
) -> Plan:
    """The plan of runs with `settings`, each beside the `arguments` that all have.

    Two of equal settings are one run.
    """
    folder = absolute(workdir)
    runs = (_run(folder, run_name(one), dict(one), [*arguments, *_flags(one)]) for one in settings)
    unique = tuple(_unique(runs))
    return Plan(experiment, folder, unique, _axes(unique))


def run_name(settings: Mapping[str, str]) -> str:
    """The folder's name of a run: learning_rate=1e-3,seed=0. Other settings have another name.

    In values, + stands for a comma and - for what is not a letter, a digit or one of ._-; a name
    with such a -, or one cut at 100 characters, ends in 8 hex digits of the settings' hash.
    """
    plain = all(re.fullmatch(r"[A-Za-z0-9._,-]+", value) for value in settings.values())
    name = ",".join(
        f"{flag}={re.sub('[^A-Za-z0-9._+-]', '-', value.replace(',', '+'))}"
        for flag, value in settings.items()
    )
    if plain and len(name) <= LONGEST:
        return name or "defaults"
    # Without a "=", so that no setting can look like it.
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:8]
    return f"{name[: LONGEST - 9]},{digest}"


def read_plan(workdir: str | os.PathLike[str]) -> Plan:
    """The plan that `Plan.write` kept in `workdir`, with all runs that were ever added.

    Raises:
      ValueError: there is none, it is damaged or of another format.
    """
    folder = absolute(workdir)
    path = folder / "sweep.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        version = kept["format"]
        plan = _from_json(folder, kept) if version == FORMAT else None
    except OSError as error:
        raise ValueError(f"{workdir}: holds no sweep: no sweep.json can be read there") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is damaged: {error!r}") from error
    if plan is None:
        raise ValueError(f"{path}: is of format {version}; this version reads {FORMAT}")
    return plan


def table(plan: Plan, columns: Sequence[Mapping[str, Any]] = ()) -> str:
    """What --dry_run prints: the number of runs, and a line for each with its `columns`."""
    names = list(dict.fromkeys(name for row in columns for name in row))
    rows = [["run", *names]]
    for index, run in enumerate(plan.runs):
        row = columns[index] if index < len(columns) else {}
        rows.append([run.name, *(_cell(row.get(name, "")) for name in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    number = f"{len(plan.runs)} run" + ("" if len(plan.runs) == 1 else "s")
    lines = [f"{number} of {plan.experiment}, in {plan.workdir}"]
    for row in rows:
        name, *cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([name.strip().ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _run(workdir: Path, name: str, settings: dict[str, str], arguments: Sequence[str]) -> Run:
    return Run(name, workdir / name, settings, tuple(arguments))


def _flags(settings: Mapping[str, str]) -> list[str]:
    return [f"--{flag}={value}" for flag, value in settings.items()]


def _key(run: Run) -> frozenset[tuple[str, str]]:
    """What makes two runs of a sweep the same."""
    return frozenset((run.values or run.settings).items())


def _unique(runs: Iterable[Run]) -> list[Run]:
    """The first of all equal runs, each value in the first spelling that it has among all runs."""
    first: dict[tuple[str, str], str] = {}
    unique: dict[frozenset[tuple[str, str]], Run] = {}
    for run in runs:
        if _key(run) in unique:
            continue
        settings = {
            flag: first.setdefault((flag, run.values.get(flag, text)), text)
            for flag, text in run.settings.items()
        }
        if settings != run.settings:
            common = run.arguments[: len(run.arguments) - len(settings)]
            run = dataclasses.replace(
                run,
                name=run_name(settings),
                folder=run.folder.parent / run_name(settings),
                settings=settings,
                arguments=(*common, *_flags(settings)),
            )
        unique[_key(run)] = run
    return list(unique.values())


def _axes(runs: Sequence[Run]) -> dict[str, list[str]]:
    axes: dict[str, dict[str, None]] = {}
    for run in runs:
        for flag, value in run.settings.items():
            axes.setdefault(flag, {})[value] = None
    return {flag: list(values) for flag, values in axes.items()}


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _to_json(plan: Plan) -> bytes:
    kept = {
        "format": FORMAT,
        "experiment": plan.experiment,
        "fixed": plan.fixed,
        "axes": list(_axes(plan.runs).items()),  # pairs: sorted keys would lose their order
        "runs": [
            {
                "name": run.name,
                "settings": run.settings,
                "arguments": run.arguments,
                "values": dict(run.values),
            }
            for run in plan.runs
        ],
    }
    return json.dumps(kept, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _from_json(folder: Path, kept: Mapping[str, Any]) -> Plan:
    axes = {flag: list(values) for flag, values in kept["axes"]}
    runs = []
    for run in kept["runs"]:
        settings = {flag: run["settings"][flag] for flag in axes if flag in run["settings"]}
        read = _run(folder, run["name"], settings, run["arguments"])
        runs.append(dataclasses.replace(read, values=run.get("values", {})))
    return Plan(kept["experiment"], folder, tuple(runs), axes, tuple(kept["fixed"]))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; the system frees it when the holder ends, however that happens.

    A bucket has no locks: there it is a claim, which a dead holder loses too.
    """
    if in_bucket(folder):
        while (mine := claim.take(folder / "launch" / "claims")) is None:
            time.sleep(1)
        try:
            yield
        finally:
            mine.release()
        return
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with open(folder / ".sweep.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

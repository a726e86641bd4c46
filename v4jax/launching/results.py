"""A sweep's numbers: every run's, their mean and spread over seeds, and the files that hold them.

A run's numbers are those of its result.json, a flat JSON object name -> number, once the run is
done. Without that file they are the last losses of its metrics.jsonl. Runs that differ only in the
flag seed (or seeds) are one row of the table; every other flag of the sweep is an axis.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from v4jax.launching.plan import Plan, Run, read_plan
from v4jax.launching.printable import clean, last_line
from v4jax.launching.run_folder import RunFolder, ending
from v4jax.training.files import BucketError, together, write_whole
from v4jax.training.metrics import NOT_FINITE, read_metrics

SEEDS = ("seed", "seeds")
"""The axes that are averaged over."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one run.

    state: of its state.json; "missing" where it was never started. why: why it has no numbers, in
    lines of which the last says most; "" where it has. numbers: empty unless the state is "done".
    """

    run: Run
    state: str
    attempt: int
    why: str
    numbers: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Summary:
    """mean: NaN where a value is not finite. spread: the sample standard deviation (n - 1); None
    for a single value, or where one is not finite."""

    mean: float
    spread: float | None
    seeds: int


@dataclasses.dataclass(frozen=True)
class Group:
    """The runs that differ only in their seeds: a row of the table."""

    settings: Mapping[str, str]
    results: tuple[Result, ...]

    def values(self, metric: str) -> list[float]:
        return [r.numbers[metric] for r in self.results if metric in r.numbers]

    def summary(self, metric: str) -> Summary | None:
        """None where no run has the metric."""
        return summarize(self.values(metric))


@dataclasses.dataclass(frozen=True)
class Results:
    """A sweep with what became of its runs, in its order."""

    plan: Plan
    results: tuple[Result, ...]

    @property
    def axes(self) -> dict[str, list[str]]:
        """Flag -> its values, seeds left out."""
        return {flag: values for flag, values in self.plan.axes.items() if flag not in SEEDS}

    @property
    def metrics(self) -> list[str]:
        """The names of the numbers, in the order in which they are met."""
        return list(dict.fromkeys(name for r in self.results for name in r.numbers))

    @property
    def states(self) -> Counter[str]:
        return Counter(result.state for result in self.results)

    def groups(self) -> list[Group]:
        found: dict[tuple, list[Result]] = {}
        for result in self.results:
            settings = {k: v for k, v in result.run.settings.items() if k not in SEEDS}
            found.setdefault(tuple(sorted(settings.items())), []).append(result)
        rows = []
        for settings_, results in found.items():
            known = dict(settings_)
            settings = {flag: known[flag] for flag in self.axes if flag in known}
            rows.append(Group(settings, tuple(results)))
        return rows


def read_results(workdir: str | Path) -> Results:
    """The sweep in `workdir` as it stands; runs may still be at work.

    Raises:
      ValueError: there is no sweep there, or its sweep.json is damaged.
    """
    plan = read_plan(workdir)
    return Results(plan, tuple(together(_result, plan.runs, plan.workdir)))


def summarize(values: Sequence[float]) -> Summary | None:
    """Mean and spread of a metric over seeds; None of no values."""
    if not values:
        return None
    if not all(map(math.isfinite, values)):
        return Summary(math.nan, None, len(values))
    try:
        spread = statistics.stdev(values) if len(values) > 1 else None
    except OverflowError:
        spread = math.inf
    return Summary(float(statistics.mean(values)), spread, len(values))


def choose_metric(results: Results, metric: str | None = None) -> str | None:
    """`metric`, or the first whose name holds "loss", or the first; None where there are none.

    Raises:
      ValueError: one line: no run has `metric`.
    """
    names = results.metrics
    if metric is not None and metric not in names:
        there = ", ".join(names) or "none yet"
        raise ValueError(f"--metric={metric}: no finished run has it; there are: {there}")
    if metric is None:
        metric = next((name for name in names if "loss" in name.lower()), None)
    return metric or next(iter(names), None)


def best(results: Results, metric: str, highest: bool = False) -> tuple[Group, Result] | None:
    """The settings of the best mean over seeds, and the best single run; the first of equals.

    None where no value is finite. A mean over fewer seeds counts as much as one over more.
    """

    def key(value: float) -> float:
        return -value if highest else value

    runs = [r for r in results.results if math.isfinite(r.numbers.get(metric, math.nan))]
    means = [(group, group.summary(metric)) for group in results.groups()]
    groups = [(g, s.mean) for g, s in means if s is not None and math.isfinite(s.mean)]
    if not groups:
        return None
    group = min(groups, key=lambda pair: key(pair[1]))[0]
    return group, min(runs, key=lambda result: key(result.numbers[metric]))


# ---- a run's files ----


def _result(run: Run) -> Result:
    folder = RunFolder(run.folder)
    path = run.folder / "result.json"
    try:
        state = folder.read_state()
    except ValueError as error:
        return Result(run, "damaged", 0, str(error), {})
    known = (folder.launch / "state.json").exists()
    name = state.state if known else "done" if path.exists() else "missing"
    if name != "done":
        why = state.error or ("" if state.exit is None else ending(state.exit))
        return Result(run, name, state.attempt, clean(why), {})
    try:
        numbers = read_numbers(path) if path.exists() else _last_losses(run.folder)
    except ValueError as error:
        return Result(run, "done", state.attempt, clean(str(error)), {})
    why = "" if numbers else "it ended well, but wrote neither result.json nor losses"
    return Result(run, "done", state.attempt, why, numbers)


def read_numbers(path: Path) -> dict[str, float]:
    """The numbers of a result.json; "NaN", "Infinity" and "-Infinity" are floats too.

    Raises:
      ValueError: one line: the file is damaged, or not a flat object of numbers.
    """
    try:
        stored = json.loads(path.read_bytes())
        if not isinstance(stored, dict):
            raise ValueError("not a JSON object")
        for name, value in stored.items():
            if value not in NOT_FINITE and not isinstance(value, int | float):
                raise ValueError(f"{name!r} is not a number")
        return {clean(name): float(value) for name, value in stored.items()}
    except BucketError:
        raise
    except (OSError, OverflowError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def curves(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """A run's training losses: name of the part -> (step, loss) pairs; "" is the run's own folder.

    Earlier parts come first. A part without a loss is left out.

    Raises:
      ValueError: one line: a metrics.jsonl is damaged.
    """
    found = {}
    for path in (folder / "metrics.jsonl", *sorted(folder.glob("*/metrics.jsonl"))):
        rows = [
            row for row in read_metrics(path.parent) if isinstance(row.get("loss"), int | float)
        ]
        if rows:
            name = "" if path.parent == folder else clean(path.parent.name)
            found[name] = [(float(row["step"]), float(row["loss"])) for row in rows]
    return dict(sorted(found.items(), key=lambda item: item[1][0][0]))


def _last_losses(folder: Path) -> dict[str, float]:
    return {f"{name}/loss".lstrip("/"): line[-1][1] for name, line in curves(folder).items()}


def as_number(text: str) -> float | None:
    """The finite number that a flag's value is, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# ---- the files ----

Column = tuple[str, list[Any]]


def run_columns(results: Results) -> list[Column]:
    """runs.csv: a row for every run: name, state, the sweep's flags, its numbers, its error."""
    every = results.results
    columns: list[Column] = [("run", [r.run.name for r in every])]
    columns.append(("state", [r.state for r in every]))
    for flag in results.plan.axes:
        columns.append((flag, [r.run.settings.get(flag) for r in every]))
    for name in results.metrics:
        columns.append((name, [r.numbers.get(name) for r in every]))
    columns.append(("error", [last_line(r.why) or None for r in every]))
    return _distinct(columns)


def group_columns(results: Results) -> list[Column]:
    """table.csv: a row for every setting: the axes, runs and finished ones, and for each metric its
    mean, its standard deviation and over how many seeds."""
    groups = results.groups()
    columns: list[Column] = [
        (axis, [g.settings.get(axis) for g in groups]) for axis in results.axes
    ]
    columns.append(("runs", [len(g.results) for g in groups]))
    columns.append(("done", [sum(r.state == "done" for r in g.results) for g in groups]))
    for name in results.metrics:
        found = [group.summary(name) for group in groups]
        columns.append((f"{name} mean", [s and s.mean for s in found]))
        columns.append((f"{name} sd", [s and s.spread for s in found]))
        columns.append((f"{name} seeds", [s and s.seeds for s in found]))
    return _distinct(columns)


def _distinct(columns: Iterable[Column]) -> list[Column]:
    """A metric may be called like a flag, or "state": the later gets a number."""
    taken: Counter[str] = Counter()
    found = []
    for name, values in columns:
        while taken[name]:
            taken[name] += 1
            name = f"{name} {taken[name]}"
        taken[name] = 1
        found.append((name, values))
    return found


def write_tables(results: Results, folder: Path) -> list[Path]:
    """Writes runs.csv, table.csv and, where pyarrow is installed, runs.parquet; says if not."""
    written = []
    for name, columns in (("runs", run_columns(results)), ("table", group_columns(results))):
        written.append(folder / f"{name}.csv")
        write_whole(written[-1], _csv(columns))
    path = folder / "runs.parquet"
    content = _parquet(run_columns(results))
    if content is None:
        path.unlink(missing_ok=True)  # an older sweep's state
        print("report: no runs.parquet, for want of pyarrow: pip install pyarrow", file=sys.stderr)
        return written
    write_whole(path, content)
    return [*written, path]


def _csv(columns: Sequence[Column]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([name for name, _ in columns])
    writer.writerows(zip(*(values for _, values in columns), strict=True))
    return _utf8(text.getvalue())


def _utf8(text: str) -> bytes:
    """JSON and command lines can hold lone surrogates, UTF-8 cannot: written as \\ud800."""
    return text.encode("utf-8", "backslashreplace")


def _parquet(columns: Sequence[Column]) -> bytes | None:
    """Numbers as numbers, flags too where all are; None without pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return None
    arrays = {_utf8(name).decode(): _array(values) for name, values in columns}
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(arrays), file)
    return file.getvalue()


def _array(values: list[Any]):
    """A column in Parquet's types: flags are text here, and numbers there where all of them are."""
    import pyarrow

    known = [value for value in values if value is not None]
    if not all(isinstance(value, str) for value in known):
        return pyarrow.array(values)
    if not known or any(as_number(value) is None for value in known):
        text = [None if value is None else _utf8(value) for value in values]
        return pyarrow.array(text, pyarrow.string())
    kind = int if all(re.fullmatch(r"[+-]?[0-9]{1,18}", value) for value in known) else float
    return pyarrow.array([None if value is None else kind(value) for value in values])

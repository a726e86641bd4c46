"""One report for all studies: arms over seeds, on the same held-out windows, and what it says.

A run of a study leaves two files (`v4jax.analysis.study_run`): losses.npz with the nats of every
window of each of its arms, and study.json with what it was. From those of a sweep comes one dict,
the report: tables of losses and of paired differences, and claims that the numbers decide.

    python -m v4jax.analysis.study FILE.json          prints a report again, and draws it anew
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import pathlib
import shlex
import statistics
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from v4jax.analysis import findings, study_plot
from v4jax.analysis.paired import Paired, Windows
from v4jax.training.files import as_path, write_whole
from v4jax.training.metrics import table

Pair = tuple[str, str]
"""An arm, and the arm that is subtracted from it."""


@dataclasses.dataclass(frozen=True)
class Losses:
    """arms: arm -> seed -> nats of each held-out window, float64 [W]. windows: arm -> these.
    numbers: arm -> seed -> name -> a number. runs: what each run was. command: what makes it again.
    missing: runs of the sweep that left no losses."""

    name: str
    arms: dict[str, dict[int, np.ndarray]]
    numbers: dict[str, dict[int, dict[str, float]]]
    windows: dict[str, Windows]
    runs: list[dict[str, Any]]
    command: str
    missing: int = 0

    def mean(self, arm: str) -> float:
        """Nats a token, over seeds."""
        return statistics.fmean(self.each(arm).values())

    def each(self, arm: str) -> dict[int, float]:
        """Seed -> nats a token."""
        tokens = self.windows[arm].mask.sum()
        return {seed: float(nll.sum() / tokens) for seed, nll in self.arms[arm].items()}


def read(workdir: str | pathlib.Path, label: Callable[[dict], str] = lambda what: "") -> Losses:
    """The losses that the runs of the sweep in `workdir` left.

    label: what a run was -> a prefix for its arms' names, where runs have arms of one name.

    Raises:
      ValueError: one line: no run left any; two of an arm were measured on different windows, or
        are of the same seed.
    """
    folder = as_path(workdir)
    sweep = json.loads((folder / "sweep.json").read_bytes())
    found: dict[str, dict[int, np.ndarray]] = {}
    numbers: dict[str, dict[int, dict[str, float]]] = {}
    runs: list[dict[str, Any]] = []
    windows: dict[str, Windows] = {}
    for name in (run["name"] for run in sweep["runs"]):
        if not (folder / name / "study.json").exists():
            continue
        what = json.loads((folder / name / "study.json").read_bytes())
        with np.load(io.BytesIO((folder / name / "losses.npz").read_bytes())) as kept:
            held_out = types.SimpleNamespace(
                document=kept["document"], mask=kept["tokens"][:, None]
            )
            nll = {key.removeprefix("arm "): kept[key] for key in kept if key.startswith("arm ")}
        runs.append(what | {"run": name})
        for arm in nll:
            full = f"{label(what)} {arm}".strip()
            if not _same_windows(windows.setdefault(full, held_out), held_out):
                raise ValueError(f"{name}: arm {full!r} has other windows than with other seeds")
            if what["seed"] in found.setdefault(full, {}):
                raise ValueError(f"{name}: arm {full!r}, seed {what['seed']} is of another run too")
            found[full][what["seed"]] = nll[arm]
            numbers.setdefault(full, {})[what["seed"]] = what.get("numbers", {}).get(arm, {})
    if not runs:
        raise ValueError(f"{folder}: no run has left losses.npz and study.json")
    words = ["python", "launch.py", f"--experiment={sweep['experiment']}", *sweep["fixed"]]
    command = shlex.join([*words, f"--workdir=runs/{folder.name}"])
    name = pathlib.Path(sweep["experiment"]).stem
    return Losses(name, found, numbers, windows, runs, command, len(sweep["runs"]) - len(runs))


def _same_windows(one: Windows, other: Windows) -> bool:
    return np.array_equal(one.document, other.document) and np.array_equal(one.mask, other.mask)


# ---- what the numbers say ----


@dataclasses.dataclass(frozen=True)
class Claim:
    """That `arm` has a lower loss than `reference` (higher: a higher one), in words."""

    text: str
    arm: str
    reference: str
    higher: bool = False


def difference(losses: Losses, pair: Pair) -> dict[str, Any] | None:
    """The paired difference of two arms over the seeds that both have: `mean`, `low`, `high` (95%),
    `spread` (sample standard deviation over seeds, None for one), `seeds`; None without a seed.

    Raises ValueError where they were measured on different windows."""
    a, b = (losses.arms.get(name, {}) for name in pair)
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    windows, others = (losses.windows[name] for name in pair)
    if not _same_windows(windows, others):
        raise ValueError(f"{pair[0]} and {pair[1]} were measured on different windows")
    paired = Paired(windows)
    rows = [np.stack([side[seed] for seed in seeds]) for side in (a, b)]
    each = [float(value) for value in paired.of_seeds(*rows)]
    return {
        "arm": pair[0],
        "reference": pair[1],
        **dataclasses.asdict(paired.over_seeds(*rows)),
        "spread": statistics.stdev(each) if len(each) > 1 else None,
        "seeds": dict(zip(seeds, each, strict=True)),
    }


def verdict(claim: Claim, found: Mapping[str, Any] | None) -> dict[str, Any]:
    """{"held": True, False or None (not measured), "sentence"}: whether a claim held, plainly."""
    if found is None:
        return {"held": None, "sentence": f"{claim.text}: not measured."}
    where, each = findings.side(found), found["seeds"].values()
    held = where == ("above" if claim.higher else "below")
    word = "above" if claim.higher else "below"
    if held:
        what = "held"
    elif where == "holds":
        what = "did not hold: not told apart"
    else:
        what = "did not hold: the opposite did"
    agree = sum(value > 0 if claim.higher else value < 0 for value in each)
    seeds = f"{word} 0 on {agree} of {len(each)} seeds" if len(each) > 1 else "one seed"
    return {
        "held": held,
        "sentence": f"{claim.text}: {what}. {claim.arm} - {claim.reference} = "
        f"{findings.millinats(found)} millinats, {findings.SIDES[where]}; {seeds}.",
    }


@dataclasses.dataclass(frozen=True)
class Curves:
    """Differences over a quantity. series: name -> [(x, arm, reference), ...]."""

    x: str
    series: dict[str, list[tuple[float, str, str]]]


@dataclasses.dataclass(frozen=True)
class Lines:
    """Quantities as they are. series: name -> [(x, y), ...]."""

    x: str
    y: str
    series: dict[str, list[tuple[float, float]]]


def make_report(
    losses: Losses,
    title: str,
    sections: Mapping[str, Sequence[Pair]],
    claims: Sequence[Claim] = (),
    notes: Sequence[str] = (),
    curves: Curves | None = None,
    lines: Lines | None = None,
) -> dict[str, Any]:
    """The report: a dict of what JSON holds. sections: heading -> pairs; those with an arm that was
    not measured are left out. notes: sentences."""
    arms = []
    for arm, found in losses.numbers.items():
        each = losses.each(arm)
        names = dict.fromkeys(name for numbers in found.values() for name in numbers)
        values = {name: [n[name] for n in found.values() if name in n] for name in names}
        arms.append(
            {
                "arm": arm,
                "mean": losses.mean(arm),
                "spread": statistics.stdev(each.values()) if len(each) > 1 else None,
                "seeds": each,
                "numbers": {name: statistics.fmean(v) for name, v in values.items()},
            }
        )
    measure = functools.cache(functools.partial(difference, losses))  # a claim's is a table's too
    measured = {
        heading: [found for pair in pairs if (found := measure(pair))]
        for heading, pairs in sections.items()
    }
    drawn = {}
    for name, points in (curves.series if curves else {}).items():
        found = [(x, measure((arm, base))) for x, arm, base in points]
        drawn[name] = [[x, d["mean"], d["low"], d["high"]] for x, d in found if d]
    return {
        "name": losses.name,
        "title": title,
        "command": losses.command,
        "what": _what(losses),
        "arms": arms,
        "sections": {heading: found for heading, found in measured.items() if found},
        "claims": [verdict(c, measure((c.arm, c.reference))) for c in claims],
        "notes": list(notes),
        "curves": {"x": curves.x, "series": drawn} if curves else None,
        "lines": dataclasses.asdict(lines) if lines else None,
    }


def _what(losses: Losses) -> dict[str, Any]:
    """What the runs were, one value or the different ones of all."""
    skipped = {"run", "numbers", "seed", "seconds", "date"}
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for run in losses.runs for name in run):
        if name not in skipped:
            found[name] = _one_or_all([run[name] for run in losses.runs if name in run])
    windows = list(losses.windows.values())
    return found | {
        "runs": len(losses.runs),
        "missing": losses.missing,
        "seeds": sorted({run["seed"] for run in losses.runs}),
        "seconds": sum(run.get("seconds", 0.0) for run in losses.runs),
        "date": max(run.get("date", "") for run in losses.runs),
        "windows": _one_or_all([len(w.document) for w in windows]),
        "documents": _one_or_all([len(np.unique(w.document)) for w in windows]),
        "eval_tokens": _one_or_all([int(w.mask.sum()) for w in windows]),
    }


def _one_or_all(values: list) -> Any:
    """The value that all are, or the different ones."""
    same = [value for i, value in enumerate(values) if value not in values[:i]]
    return same[0] if len(same) == 1 else same


# ---- on paper ----


def write_report(workdir: str | pathlib.Path, report: Mapping[str, Any]) -> None:
    """Writes report/<name>.json, .md and .png in `workdir`, and prints what the claims came to."""
    folder = as_path(workdir) / "report"
    name = report["name"]
    write_whole(folder / f"{name}.json", (json.dumps(report, indent=1) + "\n").encode())
    write_whole(folder / f"{name}.md", markdown(report).encode())
    study_plot.save(folder / f"{name}.png", report)
    print("\n".join([report["title"], *sentences(report), str(folder / f"{name}.md")]), flush=True)


def sentences(report: Mapping[str, Any]) -> list[str]:
    """Claims, then notes."""
    return [claim["sentence"] for claim in report["claims"]] + list(report["notes"])


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page: what it says, the tables, what made them."""
    parts = [f"# {report['title']}", f"![differences with their intervals]({report['name']}.png)"]
    if said := sentences(report):
        parts.append("\n".join(f"- {sentence}" for sentence in said))
    for heading, rows in report["sections"].items():
        cells = [
            (
                row["arm"],
                row["reference"],
                findings.millinats(row),
                findings.SIDES[findings.side(row)],
                findings.number(row["spread"], ".2f", 1000),
                f"{sum(v < 0 for v in row['seeds'].values())} of {len(row['seeds'])}",
            )
            for row in rows
        ]
        heads = ("arm", "minus", "millinats", "95% interval", "sd over seeds", "seeds below 0")
        parts.append(f"## {heading}\n\n{table(cells, heads)}")
    names = list(dict.fromkeys(name for arm in report["arms"] for name in arm["numbers"]))
    rows = [
        (
            arm["arm"],
            arm["mean"],
            findings.number(arm["spread"], ".4f"),
            len(arm["seeds"]),
            *(findings.number(arm["numbers"].get(name), ".4g") for name in names),
        )
        for arm in report["arms"]
    ]
    heads = ("arm", "nats/token", "sd over seeds", "seeds", *names)
    parts.append(f"## Held-out losses\n\n{table(rows, heads)}")
    parts.append(_made_by(report))
    return "\n\n".join(parts) + "\n"


def _made_by(report: Mapping[str, Any]) -> str:
    what = dict(report["what"])
    lines = [f"{name.replace('_', ' ')}: {_text(value)}" for name, value in what.items()]
    return (
        f"## What made it\n\n```sh\n{report['command']}\n```\n\n"
        "Differences are in millinats (0.001 nats) a token, paired by seed on the same windows. "
        "Intervals are 95%: held-out documents are resampled, and the seeds' error is added as "
        "Student's t has it; of one seed they are of its own weights alone.\n\n"
        + "\n".join(f"- {line}" for line in lines)
    )


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def main(path: str) -> None:
    """Prints the report that stands in a JSON file, and draws its picture beside it; SystemExit of
    one line where there is none."""
    try:
        report = json.loads(pathlib.Path(path).read_bytes())
        page = markdown(report)
    except (OSError, ValueError, LookupError, TypeError) as error:
        allowed = "allowed: the JSON of a study's report, such as docs/studies/gap.json"
        raise SystemExit(f"study: {path}: cannot be read ({error}); {allowed}") from None
    print(page, end="")
    study_plot.save(pathlib.Path(path).with_suffix(".png"), report)


if __name__ == "__main__":
    main(sys.argv[1])

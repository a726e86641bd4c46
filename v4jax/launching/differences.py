"""What differs between a sweep's runs besides the flags it names: configurations and versions.

Compared are every config.json that a run wrote, in its folder or one level below, and the commit
and the versions that the launcher kept (`launch/command.json`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from v4jax.launching.plan import Run
from v4jax.training.trackers import flat

LAUNCH = ("commit", "changed", "python", "packages")  # of command.json; the rest is each run's own


@dataclasses.dataclass(frozen=True)
class Difference:
    """follows: the flag of the sweep whose values part the runs in the same way, if there is one.

    values: value -> the names of the runs that have it, at least two values.
    """

    name: str
    values: Mapping[str, tuple[str, ...]]
    follows: str | None


def differences(runs: Sequence[Run]) -> list[Difference]:
    """Those of the runs that have written something; first what no flag of the sweep explains."""
    found = {run.name: _configuration(run.folder) for run in runs}
    found = {name: values for name, values in found.items() if values}
    axes = {flag: {run.name: value for run in runs if (value := run.settings.get(flag))}
            for flag in dict.fromkeys(flag for run in runs for flag in run.settings)}  # fmt: skip
    result = []
    for key in dict.fromkeys(key for values in found.values() for key in values):
        parts: dict[str, list[str]] = {}
        for name, values in found.items():
            parts.setdefault(values.get(key, "(none)"), []).append(name)
        if len(parts) < 2:
            continue
        same = {frozenset(names) for names in parts.values()}
        follows = next((f for f, values in axes.items() if _parts(values, found) == same), None)
        result.append(Difference(key, {v: tuple(n) for v, n in parts.items()}, follows))
    return sorted(result, key=lambda difference: difference.follows is not None)


def _parts(values: Mapping[str, str], names: Mapping[str, Any]) -> set[frozenset[str]]:
    parts: dict[str | None, set[str]] = {}
    for name in names:
        parts.setdefault(values.get(name), set()).add(name)
    return {frozenset(part) for part in parts.values()}


def _configuration(folder: Path) -> dict[str, str]:
    """Dotted name -> value. Where a run's parts differ, its value is all of theirs, in order."""
    values: dict[str, list[str]] = {}
    for path in (folder / "config.json", *sorted(folder.glob("*/config.json"))):
        stored = _object(path)
        inner = stored.get("config")  # beside the number of the format
        for name, value in flat(inner if isinstance(inner, dict) else stored).items():
            values.setdefault(name, []).append(value)
    launch = _object(folder / "launch" / "command.json")
    for name, value in flat({key: launch[key] for key in LAUNCH if key in launch}).items():
        values[name] = [value]
    return {name: " | ".join(dict.fromkeys(found)) for name, found in values.items()}


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none yet, or half of one."""
    try:
        stored = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}

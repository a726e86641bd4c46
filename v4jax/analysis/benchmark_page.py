"""A benchmark's report on paper: what was run on what, and the file that holds it."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from v4jax.analysis.findings import number
from v4jax.analysis.report import bullets, fenced, jsonable
from v4jax.training.run_config import write_atomically


def header(report: Mapping[str, Any], *more: str) -> str:
    """The command, the machine and how loaded it was, and `more` lines. report["what"] is
    `provenance.environment()` with `command`, `load_before` and `load_after`."""
    what = jsonable(report)["what"]
    versions = ", ".join(f"{name} {version}" for name, version in what["versions"].items())
    lines = [
        f"Date: {what['date']}",
        f"Machine: {what['device']}, {what['cores']} cores for this process; Python "
        f"{what['python']}, {versions}",
        f"Load of the machine (processes that want a core, over a minute): before "
        f"{number(what['load_before'], '.2f')}, after {number(what['load_after'], '.2f')}",
        *more,
    ]
    return bullets(f"## What was run\n\n{fenced(what['command'], 'sh')}", lines)


def write(folder: pathlib.Path, name: str, report: Mapping[str, Any], page: str) -> pathlib.Path:
    """Writes <folder>/<name, device, cores, jax>.md and .json; returns the path of the page."""
    what = report["what"]
    words = f"{name} {what['device']} {what['cores']} cores jax {what['versions']['jax']}"
    stem = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(jsonable(report), indent=1, allow_nan=False)
    write_atomically(folder / f"{stem}.json", text + "\n")
    write_atomically(folder / f"{stem}.md", page)
    return folder / f"{stem}.md"

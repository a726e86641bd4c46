"""The experiments there are, what one starts with, and what its file says of itself."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def available() -> dict[str, str]:
    """Experiment names, each with the first line of its docstring (read, not imported)."""
    found = {}
    for path in sorted((ROOT / "experiments").glob("[!_]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = docstring.partition("\n")[0]
    return found


def located(experiment: str) -> str:
    """`experiment` if it is a name in experiments/, else the absolute path of its file.

    Raises:
      ValueError: there is no such experiment; the message names the nearest one.
    """
    if experiment.endswith(".py"):
        if not Path(experiment).is_file():
            raise ValueError(f"--experiment={experiment}: there is no such file")
        return os.path.abspath(experiment)
    names = list(available())
    if experiment not in names:
        near = difflib.get_close_matches(experiment, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(names) or 'none'}"
        raise ValueError(f"--experiment={experiment}: no such file in experiments/; {hint}")
    return experiment


def source(experiment: str) -> str:
    """The path of the experiment's file; errors as `located`."""
    found = located(experiment)
    return found if found.endswith(".py") else str(ROOT / "experiments" / f"{found}.py")


@dataclasses.dataclass(frozen=True)
class Study:
    """What makes an experiment's file a study: SWEEP, the --sweep that stands where none is given,
    and whether it has a function report(workdir) for when all of the sweep's runs are done."""

    sweep: str | None = None
    reports: bool = False


def study(experiment: str) -> Study:
    """What the experiment's file has of a `Study` (read, not imported); errors as `located`.

    Raises:
      ValueError: its SWEEP is not a text.
    """
    try:
        body = ast.parse(Path(source(experiment)).read_text(encoding="utf-8")).body
    except SyntaxError:  # who starts it will see it
        return Study()
    assigned = {ast.unparse(n.targets[0]): n.value for n in body if isinstance(n, ast.Assign)}
    if "SWEEP" not in assigned:
        return Study()
    value = assigned["SWEEP"]
    if not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
        raise ValueError(
            f"--experiment={experiment}: SWEEP is {ast.unparse(value)}; allowed: the text of a "
            "--sweep, such as 'runs()'"
        )
    return Study(
        value.value, any(isinstance(n, ast.FunctionDef) and n.name == "report" for n in body)
    )


def report(experiment: str, workdir: Path) -> int:
    """Calls the file's report(workdir) in a process of its own; the exit code, 0 without one."""
    if not study(experiment).reports:
        return 0
    line = [sys.executable, "-P", "-m", "v4jax.launching.own_report", experiment, str(workdir)]
    return subprocess.run(line, env=importable(os.environ), stdin=subprocess.DEVNULL).returncode


def command_line(experiment: str, arguments: Sequence[str]) -> list[str]:
    """The command line that runs `experiment` with `arguments`, for use with `environment`.

    Raises:
      ValueError: there is no such experiment; the message names the nearest one.
    """
    found = located(experiment)
    if found.endswith(".py"):
        return [sys.executable, experiment, *arguments]
    # -P: a folder of that name where the user happens to stand is not ours.
    return [sys.executable, "-P", "-m", f"experiments.{found}", *arguments]


def huge_pages(environ: Mapping[str, str]) -> dict[str, str]:
    """The setting that gives a CPU run huge pages; empty where it is not wanted or not known.

    XLA's CPU client maps and returns the memory of its temporaries at every step, and with pages of
    4 KiB much of the step goes into faults. glibc reads the variable only as a process starts.
    """
    if "GLIBC_TUNABLES" in environ:  # the user's own stands
        return {}
    devices = ("nvidiactl", "kfd", "accel0", "vfio/0")  # NVIDIA, AMD, TPU
    platform = "accelerator" if any(Path("/dev", name).exists() for name in devices) else "cpu"
    if (environ.get("JAX_PLATFORMS") or platform) != "cpu":
        return {}
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()  # "glibc 2.36"
        known = library == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
    except (AttributeError, OSError, ValueError):  # another system, another C library
        return {}
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if known else {}


def importable(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with this repository importable."""
    path = os.pathsep.join(filter(None, (str(ROOT), environ.get("PYTHONPATH"))))
    return {**environ, "PYTHONPATH": path}


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with this folder importable and what a run should start with, which it says."""
    settings = huge_pages(environ)
    for name, value in settings.items():
        print(f"launch: {name}={value} (huge pages; your own setting stands)", file=sys.stderr)
    return {**importable(environ), **settings}


@dataclasses.dataclass(frozen=True)
class Question:
    """What to ask of an experiment's file; all may stay empty."""

    functions: Sequence[str] = ()  # functions of the file to call, flags as in `fixed`: settings
    swept: Sequence[str] = ()  # flags that differ between the runs
    fixed: Sequence[str] = ()  # arguments that all runs have
    runs: Sequence[Sequence[str]] = ()  # the whole arguments of each run
    columns: bool = False  # call the file's describe() for each run
    others: Sequence[str] = ()  # options that are not the experiment's: for suggestions
    taken: Sequence[str] = ()  # those of them that were given: the experiment may not have these


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the file said: the functions' settings; `fixed` in one spelling; in one spelling the
    swept flags of each run; its describe(); AFTER_SWITCH: flags that leave the pre-training as it
    is; GROWING: flags of its function alone, which may differ from start to start."""

    functions: dict[str, list[dict[str, str]]]
    fixed: tuple[str, ...]
    values: tuple[dict[str, str], ...]
    columns: tuple[dict[str, Any], ...]
    after_switch: tuple[str, ...] = ()
    growing: tuple[str, ...] = ()


def describe(experiment: str, question: Question) -> Answer:
    """Imports the experiment's file in a process of its own and asks it; runs nothing of it.

    Raises:
      ValueError: no such experiment, or it cannot be imported; a flag that it does not have, with
        the nearest one; a value that a flag does not take.
    """
    request = {"experiment": located(experiment), **dataclasses.asdict(question)}
    # absl's flags belong to a process: two experiments in one would clash.
    run = subprocess.run(
        [sys.executable, "-P", "-m", "v4jax.launching.describe"],
        input=json.dumps(request),
        env=importable(os.environ),
        capture_output=True,
        text=True,
    )
    if run.returncode != 0 or not run.stdout:
        last = (run.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise ValueError(f"--experiment={experiment}: its process ended when imported: {last}")
    answer = json.loads(run.stdout)
    if "error" in answer:
        raise ValueError(answer["error"])
    return Answer(
        answer["functions"],
        tuple(answer["fixed"]),
        tuple(answer["values"]),
        tuple(answer["columns"]),
        tuple(answer["after_switch"]),
        tuple(answer["growing"]),
    )

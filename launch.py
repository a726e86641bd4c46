"""Starts an experiment: python launch.py --experiment=NAME [the experiment's own flags]

NAME is a file of experiments/ without its .py, or any path that ends in .py. Every other flag is
the experiment's and goes to it unchanged, --workdir too; `--experiment=NAME --help` lists them. The
experiment replaces this process, so its exit code is the launcher's and signals reach it.

`python -m experiments.NAME` works too, but some settings must stand in the environment before a
process starts: on a CPU, huge pages make a training step faster.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def available() -> dict[str, str]:
    """Experiment names, each with the first line of its docstring (read, not imported)."""
    found = {}
    for path in sorted((ROOT / "experiments").glob("[!_]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = docstring.partition("\n")[0]
    return found


def command(experiment: str, arguments: list[str]) -> list[str]:
    """The command line that runs `experiment` with `arguments`, for use with `environment`.

    Raises:
      ValueError: there is no such experiment; the message names the nearest one.
    """
    if experiment.endswith(".py"):
        if not Path(experiment).is_file():
            raise ValueError(f"--experiment={experiment}: there is no such file")
        return [sys.executable, experiment, *arguments]
    names = list(available())
    if experiment not in names:
        near = difflib.get_close_matches(experiment, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(names) or 'none'}"
        raise ValueError(f"--experiment={experiment}: no such file in experiments/; {hint}")
    # -P: a folder of that name where the user happens to stand is not ours.
    return [sys.executable, "-P", "-m", f"experiments.{experiment}", *arguments]


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


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with this folder importable and what a run should start with, which it says."""
    settings = huge_pages(environ)
    for name, value in settings.items():
        print(f"launch: {name}={value} (huge pages; your own setting stands)", file=sys.stderr)
    path = os.pathsep.join(filter(None, (str(ROOT), environ.get("PYTHONPATH"))))
    return {**environ, **settings, "PYTHONPATH": path}


def main(argv: list[str]) -> int:
    """Runs the experiment in place of this process; returns only where none was started."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--experiment", nargs="?")
    own, arguments = parser.parse_known_args(argv)
    if own.experiment is None:
        listing = "\n".join(f"  {name:16} {line}" for name, line in available().items())
        if {"--help", "-help", "-h"} & set(arguments):
            print(f"{__doc__}\nExperiments:\n{listing}")
            return 0
        print(f"launch: --experiment=NAME is missing; there are:\n{listing}", file=sys.stderr)
        return 2
    try:
        line = command(own.experiment, arguments)
    except ValueError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2
    os.execve(line[0], line, environment(os.environ))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

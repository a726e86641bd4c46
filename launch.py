"""Starts experiments: one, a sweep of them, or a look at a sweep.

    python launch.py --experiment=NAME [the experiment's own flags]     one run, or a study's sweep
    python launch.py --experiment=NAME --workdir=DIR --sweep SPEC [options] [flags]      a sweep
    python launch.py status DIR [--watch] [--json]        what every run of a sweep does now
    python launch.py report DIR [--metric=NAME] [--highest]      its numbers, as one HTML page, and
                                                          the study's own report where it has one

NAME is a file of experiments/ without its .py, or any path that ends in .py. One run: every other
flag is the experiment's and goes to it unchanged, --workdir too; `--experiment=NAME --help` lists
them. The experiment replaces this process, so its exit code is the launcher's and signals reach it.

A sweep runs once for each combination of its --sweep SPECs, in DIR/<the flags that differ>/:

    --sweep "learning_rate=1e-3,3e-4" --sweep "seed=0:3"      a grid of 6
    --sweep "steps=100,200 warmup=0.1,0.2"                    pairs
    --sweep "scopes=[a,b],[a],[]"                             brackets keep commas; [] is empty
    --sweep "learning_rate=loguniform(1e-4,1e-2)" --draws=8   uniform, intuniform, choice too
    --sweep "pairs()"                                         the experiment file's own function

    --parallel=N        so many runs at a time (1)     --retries=N    of a failed run (2)
    --executor=NAME     where runs live (local)        --dry_run      only print the plan
    --draws=N, --sweep_seed=N     of random draws      --max_runs=N   only the first N of the plan

and the executor's own options; `--sweep x --executor=NAME --help` lists those. Flags are checked
before anything starts. The same command goes on where it was stopped, and another adds its runs.
A study is an experiment whose file names its SWEEP: that is run where no --sweep is given, and then
its report is made; with --single it is one run, of the flags given.
Exit codes: 0, all runs are done; 1, some failed; 2, refused, as the one line says; 130, 129 and 75
after SIGINT, SIGHUP and SIGTERM.

`python -m experiments.NAME` works too, but some settings must stand in the environment before a
process starts: on a CPU, huge pages make a training step faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import signal
import sys
from typing import Any, NoReturn

from v4jax.launching import experiments

EXECUTORS = {
    "in_process": "v4jax.launching.in_process:InProcess",
    "local": "v4jax.launching.local:Local",
    "slurm": "v4jax.launching.slurm:Slurm",
    "k8s": "v4jax.launching.kubernetes:Kubernetes",
    "tpu": "v4jax.launching.tpu:Tpu",
}
HELP = {"--help", "-help", "-h"}


class Parser(argparse.ArgumentParser):
    """Its errors are a ValueError, one line, with what is allowed where that was given."""

    def __init__(self, allowed: str | None = None) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self._allowed = f"; allowed: {allowed}" if allowed else ""

    def error(self, message: str) -> NoReturn:
        said = message.removeprefix("argument ")
        said = said.replace("ignored explicit argument", "takes no value, not")
        raise ValueError(said + self._allowed)


def whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed: a whole number") from None


def start_sweep(argv: list[str]) -> int:
    """Plans the sweep, checks it, and runs it or, with --dry_run, prints it."""
    parser = Parser()
    parser.add_argument("--experiment")
    parser.add_argument("--workdir")
    parser.add_argument("--sweep", action="append")
    parser.add_argument("--executor", default="local")
    parser.add_argument("--dry_run", action="store_true")
    numbers = {"parallel": 1, "retries": 2, "draws": 1, "sweep_seed": 0, "max_runs": None}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=whole_number, default=default)
    executor = find_executor(parser.parse_known_args(argv)[0].executor)
    for name in executor.RESOURCES:
        parser.add_argument(f"--{name}", dest=f"resource {name}")
    own, arguments = parser.parse_known_args(argv)
    if HELP & set(arguments):
        lines = [f"  --{name:14} {text}" for name, text in executor.RESOURCES.items()]
        print("\n".join([__doc__ or "", f"Options of --executor={own.executor}:", *lines]))
        return 0
    if not own.workdir:  # empty as an unset variable of the shell leaves it: not this folder
        raise ValueError("--workdir=DIR is missing; a sweep keeps its runs there")
    for name, least in {"parallel": 1, "retries": 0, "draws": 1, "max_runs": 1}.items():
        if (value := getattr(own, name)) is not None and value < least:
            raise ValueError(f"--{name}={value}: allowed: {least} or more")
    given = {name: getattr(own, f"resource {name}") for name in executor.RESOURCES}
    resources = {name: value for name, value in given.items() if value is not None}

    options = ["executor", *numbers, "dry_run", *executor.RESOURCES]
    plan, columns = make_sweep(own, arguments, options, list(resources))
    runner = executor(resources, slots=own.parallel)
    # Asked before anything is written: it refuses what could not start.
    preview = runner.preview(plan, own.retries) if hasattr(runner, "preview") else ""
    if own.dry_run:
        from v4jax.launching.plan import table

        print(table(plan, columns))
    if own.dry_run or not hasattr(runner, "start"):  # one that only prints
        print(preview, end="")
        return 0
    if own.executor == "slurm":  # jobs run by themselves: nothing is left to do here
        from v4jax.launching.slurm import submit_plan

        print(submit_plan(plan.write(), runner, own.retries))
        return 0
    from v4jax.launching.runner import run_plan

    code = run_plan(plan.write(), runner, parallel=own.parallel, retries=own.retries)
    return code or experiments.report(plan.experiment, plan.workdir)


def make_sweep(own, arguments: list[str], options: list[str], taken: list[str]) -> tuple[Any, Any]:
    """The plan, its flags checked against the experiment's, and the columns of --dry_run.

    options: what the launcher takes itself; taken: those of the executor's that were given.
    """
    from v4jax.launching import sweep
    from v4jax.launching.plan import make_plan

    experiment = experiments.located(own.experiment)
    functions = {}
    if names := sweep.functions_of(own.sweep):
        asked = experiments.Question(names, fixed=arguments, others=options)
        functions = experiments.describe(experiment, asked).functions
    settings = sweep.expand(own.sweep, own.draws, own.sweep_seed, functions)[: own.max_runs]
    plan = make_plan(experiment, own.workdir, settings, arguments)
    question = experiments.Question(
        swept=list(plan.axes),
        fixed=arguments,
        runs=[[*run.arguments, f"--workdir={run.folder}"] for run in plan.runs],
        columns=own.dry_run,
        others=options,
        taken=taken,
    )
    answer = experiments.describe(experiment, question)
    plan = dataclasses.replace(
        plan, fixed=answer.fixed, after_switch=answer.after_switch, growing=answer.growing
    )
    columns = {run.name: row for run, row in zip(plan.runs, answer.columns, strict=False)}
    plan = plan.parsed(answer.values)
    return plan.settled(), [columns.get(run.name, {}) for run in plan.runs]


def find_executor(name: str) -> Any:
    """The executor's class, imported only now."""
    if name not in EXECUTORS:
        raise ValueError(f"--executor={name}: allowed: {', '.join(EXECUTORS)}")
    module, _, attribute = EXECUTORS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def show_status(argv: list[str]) -> int:
    """python launch.py status DIR [--watch] [--json]"""
    parser = Parser(show_status.__doc__)
    parser.add_argument("DIR")
    parser.add_argument("--watch", action="store_true")
    parser.add_argument("--json", action="store_true")
    own = parser.parse_args(argv)
    from v4jax.launching import status

    return status.main(own.DIR, watch=own.watch, as_json=own.json)


def write_report(argv: list[str]) -> int:
    """python launch.py report DIR [--metric=NAME] [--highest]"""
    parser = Parser(write_report.__doc__)
    parser.add_argument("DIR")
    parser.add_argument("--metric")
    parser.add_argument("--highest", action="store_true")
    own = parser.parse_args(argv)
    from v4jax.launching import page

    try:
        path = page.write_report(own.DIR, own.metric, own.highest)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"report {own.DIR}: cannot be written: {reason}") from error
    print(path, flush=True)
    from v4jax.launching.plan import read_plan

    plan = read_plan(own.DIR)
    try:
        return experiments.report(plan.experiment, plan.workdir)
    except ValueError:  # the experiment's file is no longer there
        return 0


def start_one(argv: list[str]) -> int:
    """Runs one experiment in place of this process; returns only where none was started."""
    parser = Parser()
    parser.add_argument("--experiment", nargs="?")
    own, arguments = parser.parse_known_args(argv)
    if own.experiment is None:
        listing = "\n".join(f"  {name:16} {line}" for name, line in experiments.available().items())
        if HELP & set(arguments):
            print(f"{__doc__}\nExperiments:\n{listing}")
            return 0
        if arguments and not arguments[0].startswith("-"):
            raise ValueError(f"{arguments[0]!r}: allowed first: status, report, or a --flag")
        raise ValueError(f"--experiment=NAME is missing; there are:\n{listing}")
    line = experiments.command_line(own.experiment, arguments)
    os.execve(line[0], line, experiments.environment(os.environ))


def main(argv: list[str]) -> int:
    """The exit code: 2, after one line, for what cannot be started as it was asked."""
    hint = ""
    try:
        if argv[:1] in (["status"], ["report"]):
            command = show_status if argv[0] == "status" else write_report
            if HELP & set(argv):
                print(command.__doc__)
                return 0
            return command(argv[1:])
        parser = Parser()
        parser.add_argument("--sweep", action="append")
        parser.add_argument("--experiment", nargs="?")
        own, rest = parser.parse_known_args(argv)
        if own.experiment and not own.sweep and not HELP & set(rest):
            spec = experiments.study(own.experiment).sweep
            if spec and "--single" in rest:
                argv = [word for word in argv if word != "--single"]
            elif spec:
                argv, own.sweep = [*argv, f"--sweep={spec}"], [spec]
                hint = "; --single makes one run"
        sweeps = own.sweep and (own.experiment or HELP & set(rest))
        return start_sweep(argv) if sweeps else start_one(argv)
    except BrokenPipeError:  # who read it has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        swept = "is in a --sweep too" in str(error)
        print(f"launch: {error}{hint if swept else ''}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nlaunch: interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

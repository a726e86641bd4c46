"""The files that make a sweep's runs an array of Slurm jobs: a batch script, and a list of runs.

Pure: resources and runs -> text. What happens to it is in `slurm`, what a job does in `slurm_job`.
"""

from __future__ import annotations

import hashlib
import pathlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence

from v4jax.launching.experiments import ROOT
from v4jax.launching.resources import COUNT, check_resources
from v4jax.launching.run_folder import RunFolder

LEAD = 120
"""Seconds between SIGTERM and the time limit. Slurm itself is only exact to a minute."""

RESTARTS = 100
"""So often a job is put back into the queue."""

PEERS = 60
"""Seconds that the tasks of a job live when the first has left: to save, or to notice."""

RESOURCES: Mapping[str, str] = {
    "partition": "partition of the jobs",
    "account": "account that pays",
    "qos": "quality of service",
    "constraint": "features that the nodes must have",
    "nodes": "nodes of each run; default 1",
    "tasks_per_node": "processes of a run on each node, each with its GPUs; default 1",
    "cpus_per_task": "cores of each process",
    "gpus_per_node": "GPUs on each node",
    "memory": "memory on each node, such as 64G; 0: all",
    "time": "time limit, such as 30 (minutes), 4:00:00 or 2-00 (days-hours)",
    "lead": "seconds before the time limit at which a run is told to save; default 120",
    "setup": "a shell command before the run, such as 'module load cuda'",
    "sbatch": "more options of sbatch, such as '--exclude=node7 --mail-type=END'",
}

ALLOWED = {
    **dict.fromkeys(("nodes", "tasks_per_node", "cpus_per_task"), COUNT),
    "gpus_per_node": (r"([\w.-]+:)?[1-9]\d*", "a whole number from 1 on, or TYPE:NUMBER"),
    "lead": (r"\d{1,5}", "whole seconds"),
    "memory": (r"\d+[KMGT]?", "a number of megabytes, or with K, M, G or T"),
    "time": (r"\d+|\d+:\d+(:\d+)?|\d+-\d+(:\d+){0,2}", "minutes, H:MM:SS or D-HH:MM:SS"),
    "setup": (r".+", "one line"),
    "sbatch": (r"(--?[a-zA-Z][^\s]*\s*)+", "options, each --name=value"),
}


def check(resources: Mapping[str, str]) -> None:
    """Raises ValueError, one line, on a resource or a value that sbatch would not take."""
    name = (r"[\w.,:&|*()+-]+", "a name")
    check_resources("slurm", resources, RESOURCES, allowed=ALLOWED, otherwise=name)
    lead = int(resources.get("lead", LEAD))
    if "time" in resources and seconds(resources["time"]) <= lead:
        raise ValueError(f"--time={resources['time']}: allowed: more than --lead={lead} seconds")


def seconds(limit: str) -> int:
    """A time limit in seconds: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = {1: (0, *parts, 0), 2: (0, *parts), 3: parts}[len(parts)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def files(
    given: Mapping[str, str],
    slots: int,
    submission: pathlib.Path,
    folders: Sequence[RunFolder],
    retries: int,
) -> dict[str, str]:
    """The files of the folder `submission`, name -> text: for jobs that run `folder.command`.

    given: resources that `check` has seen. retries: of a run that fails, within its job.
    """
    tasks = int(given.get("nodes", 1)) * int(given.get("tasks_per_node", 1))
    first = folders[0].command
    assert first is not None
    options = {
        "job-name": job_name(submission),
        "array": f"1-{len(folders)}%{slots}",
        "chdir": first.directory,
        "output": str(submission).replace("%", "%%") + "/%A_%a.txt",
        "open-mode": "append",
        "nodes": given.get("nodes", "1"),
        "ntasks-per-node": given.get("tasks_per_node", "1"),
        "cpus-per-task": given.get("cpus_per_task"),
        "gpus-per-node": given.get("gpus_per_node"),
        "mem": given.get("memory"),
        "time": given.get("time"),
        "signal": f"TERM@{given.get('lead', LEAD)}",
        **{name: given.get(name) for name in ("partition", "account", "qos", "constraint")},
    }
    directives = [f"--{k}={_quoted(v)}" for k, v in options.items() if v is not None]
    directives += ["--requeue", *_more(given.get("sbatch", ""))]
    keeper = [sys.executable, "-P", "-m", "v4jax.launching.slurm_job", f"--retries={retries}"]
    keeper += [f"--source={first.source}"] if first.source else []
    script = SCRIPT.format(
        directives="\n".join(f"#SBATCH {directive}" for directive in directives),
        runs=shlex.quote(str(submission / "runs.txt")),
        setup=f"{given['setup']}\n" if "setup" in given else "",
        root=shlex.quote(str(ROOT)),
        keeper=shlex.join(keeper),
        label=" --label" if tasks > 1 else "",
        peers=PEERS,
        restarts=RESTARTS,
    )
    return {"runs.sbatch": script, "runs.txt": "".join(map(_line, folders))}


SCRIPT = """\
#!/bin/bash
# Runs of a sweep, one a task of the array: task N is line N of runs.txt. Written by launch.py.
{directives}

trap : TERM  # this shell goes on to the end: whether the job runs again is decided there
{setup}eval "set -- $(sed -n "$SLURM_ARRAY_TASK_ID"p {runs})"  # folder, command
folder=$1
shift
PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}} \\
    {keeper} "$folder" \\
    srun --kill-on-bad-exit=0 --wait={peers} --input=none{label} -- "$@"
code=$?

# 75: a checkpoint is written. A job that Slurm is ending, cancelled or for another, is not RUNNING.
job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
if [ $code = 75 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ] &&
    [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ]; then
    scontrol requeue "$job" && sleep 60  # Slurm ends this script meanwhile
fi
exit $code
"""


def _line(folder: RunFolder) -> str:
    """A line of runs.txt, as a shell reads it."""
    command = folder.command
    assert command is not None
    added = [f"{name}={value}" for name, value in sorted(command.environment.items())]
    words = [str(folder.path), *(["env", *added] if added else []), *command.argv]
    if any("\n" in word for word in words):
        raise ValueError(f"--executor=slurm: {folder.path.name}: a flag's value has a line end")
    return shlex.join(words) + "\n"


def _quoted(value: str) -> str:
    """A value in a line that begins with #SBATCH."""
    if re.fullmatch(r"[\w@%+=:,./-]+", value):
        return value
    if set(value) & set("\n\"'\\"):
        raise ValueError(f"--executor=slurm: {value!r}: no quotes, backslashes or line ends")
    return f'"{value}"'


def _more(options: str) -> list[str]:
    """The words of --sbatch, which are options."""
    return [_quoted(word) for word in shlex.split(options)]


def job_name(submission: pathlib.Path) -> str:
    """The name of a submission's jobs, by which they are found again."""
    digest = hashlib.sha256(str(submission).encode()).hexdigest()[:8]
    sweep = re.sub("[^A-Za-z0-9_.-]", "-", submission.parent.parent.name)[:40]
    return f"{sweep}.{submission.name}.{digest}"

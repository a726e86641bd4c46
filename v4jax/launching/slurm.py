"""Runs as jobs of Slurm: one plain sbatch array for all that a sweep has to run, srun inside.

`submit` writes two files into `<sweep>/slurm/N/` and gives the first to sbatch:

    runs.sbatch    the batch script; `sbatch runs.sbatch` submits all again, `sbatch --array=3` one
    runs.txt       line N is task N of the array: the run's folder, then its command
    ARRAY_TASK.txt what the batch script itself printed; a run's log is in the run's folder

The launcher may then end. A job owns its run (`slurm_job`): it takes the claim, writes state and
log, and tries a failed run again. A task that exits with 75 (a checkpoint is written, run me again)
puts its job back into the queue, and so does Slurm with a job that it ended for another; both go on
under the same id. With a time limit, the tasks get SIGTERM `--lead` seconds before it, so a run
longer than the limit is several lives of one job.

The sweep's folder must be one that all nodes see, at the same path.
"""

from __future__ import annotations

import dataclasses
import getpass
import os
import pathlib
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence

from v4jax.exit_codes import AGAIN
from v4jax.launching import claim, experiments, slurm_script
from v4jax.launching.asking import ask
from v4jax.launching.experiments import ROOT
from v4jax.launching.plan import Plan, Run
from v4jax.launching.run_folder import Command, RunFolder
from v4jax.launching.slurm_script import files, job_name
from v4jax.training.files import in_bucket, write_whole

TIMEOUT = 30.0
"""Seconds to wait for Slurm's answer. Its commands try for long where the controller is down."""

FRESH = 5.0
"""Seconds for which an answer of squeue serves: polling many runs asks it once."""

LARGEST = 1000
"""Tasks of an array: Slurm's default MaxArraySize is 1001. A larger sweep is several arrays."""


ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED")
"""States of jobs that run, or will."""


@dataclasses.dataclass(frozen=True)
class Handle:
    """A job: its id as Slurm's commands take it, of an array's task ARRAY_TASK."""

    job: str
    folder: pathlib.Path


class Slurm:
    """Jobs on a Slurm cluster, at most `slots` at a time. ValueError, one line, on bad resources.

    A job takes the run's claim itself, so whoever calls `start` or `submit` must not hold it.
    """

    RESOURCES = slurm_script.RESOURCES

    def __init__(self, resources: Mapping[str, str], slots: int):
        slurm_script.check(resources)
        self._given = dict(resources)
        self._slots = slots
        self._asked = -FRESH
        self._listed: dict[str, str] = {}  # job -> the name that `job_name` gave it
        self._silent = False

    def preview(self, plan: Plan, retries: int = 0) -> str:
        """The batch script and the list of runs that `submit_plan` would begin with."""
        _check_folder(plan)
        folders = [RunFolder(run.folder, command(plan, run)) for run in plan.runs][:LARGEST]
        submission = plan.workdir / "slurm" / "N"
        texts = files(self._given, self._slots, submission, folders, retries)
        return "\n".join(f"==> {submission / name} <==\n{text}" for name, text in texts.items())

    def start(self, run: Run, folder: RunFolder) -> Handle:
        """Submits an array of one. Raises ValueError, one line, as `submit`."""
        return self.submit([folder], retries=0)[0]

    def submit(self, folders: Sequence[RunFolder], retries: int) -> list[Handle]:
        """Submits jobs that run `folder.command`, as arrays of one sweep; returns their handles.

        Raises ValueError, one line, where Slurm is not there, does not answer or refuses.
        """
        handles = []
        for first in range(0, len(folders), LARGEST):
            part = folders[first : first + LARGEST]
            submission = _new_submission(part[0].path.parent)
            for name, text in files(self._given, self._slots, submission, part, retries).items():
                write_whole(submission / name, text.encode())
            array = _ask(["sbatch", "--parsable", str(submission / "runs.sbatch")])
            array = array.strip().partition(";")[0]  # "id;cluster" where there are several
            self._asked = -FRESH
            handles += [Handle(f"{array}_{n}", folder.path) for n, folder in enumerate(part, 1)]
        return handles

    def poll(self, handle: Handle) -> int | None:
        """The exit code of a job that has left the queue, else None.

        75: it was interrupted and Slurm will not start it again; 124: the time limit; 143: it was
        cancelled; 128 + n: ended by signal n; 1: also where nothing is known of it any more.
        Where Slurm does not answer, that is said once, and the answer is None: jobs go on.
        """
        try:
            listed = handle.job in self._queue()
            self._silent = False
        except ValueError as error:
            if not self._silent:
                print(f"launch: {error}; the jobs go on, asking again", file=sys.stderr)
            self._silent, listed = True, True
        if listed and not self._silent:
            return None
        state = RunFolder(handle.folder).read_state()
        if state.job == handle.job and state.state in ("done", "failed"):
            code = state.exit or 0
            return code if code >= 0 else 128 - code
        if listed:
            return None
        ended = _outcome(handle.job)
        if ended is not None:
            return None if ended[0] in ALIVE else _code(*ended)
        saved = state.job == handle.job and state.state == "preempted"
        return AGAIN if saved else 1

    def stop(self, handle: Handle) -> None:
        """Cancels the job: SIGTERM to all its processes, SIGKILL after the cluster's KillWait."""
        _ask(["scancel", handle.job])
        self._asked = -FRESH

    def queued(self, sweep: pathlib.Path) -> dict[pathlib.Path, str]:
        """Run folder -> job, of all jobs of the sweep that wait or run, whoever submitted them.

        Raises ValueError, one line, as `submit`.
        """
        self._queue()
        found = {}
        for submission in (sweep / "slurm").glob("[0-9]*"):
            jobs = [job for job, name in self._listed.items() if name == job_name(submission)]
            if jobs:
                lines = (submission / "runs.txt").read_text(encoding="utf-8").splitlines()
                for job in jobs:
                    task = int(job.rpartition("_")[2])
                    found[pathlib.Path(shlex.split(lines[task - 1])[0])] = job
        return found

    def _queue(self) -> dict[str, str]:
        """Job -> its name, of this user's jobs that wait or run."""
        if time.monotonic() - self._asked > FRESH:
            format = ["--noheader", "--array", "--format=%F_%K|%j"]
            text = _ask(["squeue", f"--user={getpass.getuser()}", *format])
            self._listed = dict(line.split("|", 1) for line in text.splitlines() if "|" in line)
            self._asked = time.monotonic()
        return self._listed


def submit_plan(plan: Plan, executor: Slurm, retries: int) -> str:
    """Submits the plan's runs that are not done and that nobody runs; says what it did.

    Raises ValueError, one line, where Slurm is not there, does not answer or refuses.
    """
    _check_folder(plan)
    queued = executor.queued(plan.workdir)
    folders, done, busy = [], 0, 0
    for run in plan.runs:
        folder = RunFolder(run.folder, command(plan, run))
        if folder.read_state().state == "done":
            done += 1
        elif run.folder in queued or claim.owner_of(folder.claims) is not None:
            busy += 1
        else:
            folders.append(folder)
    handles = executor.submit(folders, retries) if folders else []
    arrays = dict.fromkeys(handle.job.partition("_")[0] for handle in handles)
    parts = [f"submitted {len(folders)} of {len(plan.runs)} runs"]
    parts[0] += f" as job {', '.join(arrays)}" if arrays else ""
    parts += [f"{busy} wait or run already"] * bool(busy) + [f"{done} are done"] * bool(done)
    return "; ".join(parts)


def command(plan: Plan, run: Run) -> Command:
    """What a job runs: launch.py, which knows on the node itself what a run should start with."""
    experiment = experiments.located(plan.experiment)
    line = (sys.executable, f"{ROOT}/launch.py", f"--experiment={experiment}")
    argv = (*line, *run.arguments, f"--workdir={run.folder}")
    return Command(argv, os.getcwd(), {}, experiments.source(experiment))


def _check_folder(plan: Plan) -> None:
    if in_bucket(plan.workdir):
        raise ValueError(
            f"--workdir={plan.workdir}: allowed with --executor=slurm: a folder that all nodes "
            "see, as Slurm reads its script and writes its output there; a single run inside srun "
            "may have a bucket"
        )


def _new_submission(sweep: pathlib.Path) -> pathlib.Path:
    """A new folder <sweep>/slurm/N."""
    number = 1
    while True:
        folder = sweep / "slurm" / str(number)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def _ask(words: Sequence[str]) -> str:
    """What one of Slurm's commands answers. ValueError, one line, where it does not."""
    here = f"--executor=slurm: {words[0]}"
    absent, who = ": run this on a login node", " from Slurm's controller"
    return ask(words, TIMEOUT, here=here, absent=absent, who=who)


def _outcome(job: str) -> tuple[str, int, int] | None:
    """State, exit code and signal of a job, also when it has left the queue; None if forgotten."""
    queries = {
        r"JobState=(\w+).*\bExitCode=(\d+):(\d+)": ["scontrol", "show", "job", "-o", job],
        r"(\w+)[^|]*\|(\d+):(\d+)": [
            *("sacct", "--noheader", "--parsable2", "--allocations"),
            *("--jobs", job, "--format=State,ExitCode"),
        ],
    }
    for pattern, words in queries.items():
        try:
            found = re.search(pattern, _ask(words))
        except ValueError:
            continue  # it forgot the job; or there is no accounting
        if found:
            return found[1], int(found[2]), int(found[3])
    return None


def _code(state: str, code: int, number: int) -> int:
    """The exit code that stands for a job's end, as Slurm tells it."""
    if state == "COMPLETED":
        return 0
    if state in ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL"):
        return AGAIN
    known = {"TIMEOUT": 124, "DEADLINE": 124, "CANCELLED": 143, "OUT_OF_MEMORY": 137}
    return known.get(state) or (128 + number if number else code) or 1

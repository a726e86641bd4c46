"""What a Slurm job does around its run's tasks: it owns the run's folder while they run.

The batch script starts it, beside no launcher: the job takes the claim, writes the state and the
log, and tries a failed run again, so a sweep goes on and `status` tells of it when the launcher has
long ended.

    python -m v4jax.launching.slurm_job --retries=N [--source=X.py] FOLDER srun ... -- RUN...

Exit codes: the run's own (128 + n for a signal), where 75 asks the script to put the job back into
the queue; 1 if somebody else runs the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from v4jax.exit_codes import AGAIN, DONE
from v4jax.launching import claim
from v4jax.launching.run_folder import Command, RunFolder, ending, now

TERMINATED = 128 + signal.SIGTERM


def main(argv: Sequence[str]) -> int:
    """Runs a job's run to its end, with `retries` more attempts where it fails."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--retries", type=int, required=True)
    parser.add_argument("--source")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(argv)
    run = given.command[given.command.index("--") + 1 :]
    folder = RunFolder(given.folder, Command(tuple(run), os.getcwd(), {}, given.source))
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    try:
        mine = _take(folder)
        if mine is None:
            print(f"{folder.path}: {claim.owner_of(folder.claims)} runs it", flush=True)
            return 1
        try:
            folder = dataclasses.replace(folder, token=mine.token)
            return _attempts(folder, mine, given.command, given.retries, stopped)
        finally:
            mine.release()
    except (ValueError, OSError) as error:
        print(f"{folder.path}: {error}", flush=True)
        return 1


def _take(folder: RunFolder) -> claim.Claim | None:
    """The claim. This job's own former life may hold it: on another machine, that looks alive."""
    deadline = time.monotonic() + claim.STALE + 2 * claim.BEAT
    while True:
        mine = claim.take(folder.claims)
        again = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        if mine is not None or not again or time.monotonic() > deadline:
            return mine
        time.sleep(claim.BEAT / 2)


def _attempts(
    folder: RunFolder,
    mine: claim.Claim,
    command: Sequence[str],
    retries: int,
    stopped: Sequence[int],
) -> int:
    state = folder.read_state()
    if state.state == "done":
        print(f"{folder.path}: is done", flush=True)
        return DONE
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":  # a new submission, not a later life
        state = dataclasses.replace(state, failures=0)
    while True:
        folder = dataclasses.replace(folder, attempt=state.attempt + 1)
        folder.prepare()
        state = dataclasses.replace(
            state,
            state="running",
            attempt=folder.attempt,
            exit=None,
            host=mine.owner.host,
            pid=os.getpid(),
            started=now(),
            finished=None,
            executor="slurm",
            job=job_id(os.environ),
            error=None,
        )
        folder.write_state(state)
        print(f"{now()} {folder.path.name}: attempt {folder.attempt}", flush=True)
        code = _run(folder, mine, command)
        if code is None:  # its state is the new owner's to write
            print(f"{now()} {folder.path.name}: {claim.owner_of(folder.claims)} runs it now")
            return 1
        # 143 without a signal to this process: Slurm ends the tasks, of a run that does not save.
        interrupted = bool(stopped) or code in (AGAIN, TERMINATED)
        signed = code if code <= 128 else 128 - code
        state = state.ended(signed, interrupted=interrupted, retries=retries, error=folder.tail)
        folder.write_state(state)
        print(f"{now()} {folder.path.name}: {state.state}, {ending(signed)}", flush=True)
        if state.state != "pending":
            return AGAIN if code == TERMINATED and not stopped else code


def _run(folder: RunFolder, mine: claim.Claim, command: Sequence[str]) -> int | None:
    """Runs the command to its end; its exit code, 128 + n for a signal, None if it lost the run."""
    with open(folder.log, "ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | folder.environment(),
        )
    lost = False
    while True:
        try:
            code = process.wait(claim.BEAT)
        except subprocess.TimeoutExpired:
            if not lost and not mine.beat():
                lost = True
                process.terminate()  # srun passes it on
        else:
            return None if lost else code if code >= 0 else 128 - code


def job_id(environ) -> str:
    """The job's id as Slurm's commands take it: of an array's task, ARRAY_TASK."""
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ["SLURM_JOB_ID"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Runs the runs of a plan: claims, starts, restarts and retries them until all have ended.

All that this knows is in the runs' folders, so it may be killed at any instant and started again,
and several launchers may work on one folder: each run has one owner at a time (see `claim`).
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import os
import shutil
import sys
import time
from typing import Any, Protocol

from v4jax.exit_codes import AGAIN
from v4jax.launching import claim, experiments, signals
from v4jax.launching.display import Display, display, summary, table
from v4jax.launching.plan import Plan, Run
from v4jax.launching.run_folder import Command, RunFolder, State, ending, now
from v4jax.launching.status import look, read_progress
from v4jax.training.files import BucketError

POLL = 0.2
"""Seconds between two looks at what runs."""

ELSEWHERE = 2.0
"""Seconds between two looks at a run that another launcher has."""

FRUITLESS = 10
"""So many restarts on exit 75 in a row without a step made count as a failure."""


class Executor(Protocol):
    """Where runs live. Handles are its own; those with `pid` or `job` get it written down.

    An executor may also have `attach(run, folder) -> handle | None`, asked before `start` for a run
    whose launcher died: the handle of a job that goes on. `folder` is then of that attempt, with
    the state in `folder.read_state()`.
    """

    def start(self, run: Run, folder: RunFolder) -> Any:
        """Starts attempt `folder.attempt` of `folder.command`; returns at once."""

    def poll(self, handle: Any) -> int | None:
        """The exit code, None while anything of the run lives."""

    def stop(self, handle: Any) -> None:
        """Ends the run and all that it started, and returns when it has."""


def run_plan(
    plan: Plan,
    executor: Executor,
    *,
    parallel: int,
    retries: int,
    show: Display | None = None,
) -> int:
    """Runs all of the plan's runs that are not done, `parallel` at a time.

    Exit 75 starts a run again; a failed one is tried `retries` times more, with the last lines of
    its log shown, and anew when the sweep is started again. Bad input (exit 2) is not retried.
    SIGINT, SIGTERM and SIGHUP end all runs with their process groups, which may save before; a
    second one ends this process at once. SIGUSR1 has it say what every run does.

    Args:
      show: where to say what happens; default: standard error, see `display`.

    Returns: 0 if all runs are done, 1 if some failed, after a signal as in `signals`.

    Raises:
      ValueError: one line: the folder cannot be written, the disk is full, or other launchers have
        all that there is to run. Everything that was running is stopped; nothing is lost.
    """
    show = show if show is not None else display(sys.stderr)
    try:
        with signals.received() as received, signals.questions() as asked:
            return _Loop(plan, executor, parallel, retries, show).run(received, asked)
    except OSError as error:
        raise ValueError(_unwritable(plan, error)) from error
    finally:
        show.close()


def _unwritable(plan: Plan, error: OSError) -> str:
    what = error.strerror or str(error)
    if isinstance(error, BucketError):
        return f"{what}; start again when it does: nothing is lost"
    where = f" ({error.filename})" if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"--workdir={plan.workdir}: {what}{where}; " + (
        "make room and start again: nothing is lost" if full else "allowed: a folder to write to"
    )


@dataclasses.dataclass
class _Going:
    """A run that this launcher has started."""

    run: Run
    folder: RunFolder
    claim: claim.Claim
    state: State
    handle: Any
    beaten: float


class _Loop:
    def __init__(self, plan, executor, parallel: int, retries: int, show: Display):
        self.plan, self.executor = plan, executor
        self.parallel, self.retries, self.show = parallel, retries, show
        self.waiting = collections.deque(plan.runs)
        self.going: list[_Going] = []
        self.elsewhere: dict[str, float] = {}  # run -> when to look again
        self.fruitless: collections.Counter[str] = collections.Counter()
        self.progress: dict[str, Any] = {}  # run -> how far it was when it last asked for more
        self.shown, self.pause = -1.0, 1.0
        self.environment = _added_environment()
        # Those that had failed before get all their tries again; those that fail now do not.
        states = {run.name: RunFolder(run.folder).read_state() for run in plan.runs}
        self.failed_before = {n: s.attempt for n, s in states.items() if s.state == "failed"}
        kept = sum(state.state == "done" for state in states.values())
        if kept:
            show.note(f"{kept} of {len(plan.runs)} runs are done and kept")

    def run(self, received: list[str], asked: list[str]) -> int:
        try:
            self.refresh()
            self.fill()
            if not self.going and self.waiting:
                raise ValueError(self.busy())
            while self.going or self.waiting:
                if received:
                    self.show.note(
                        f"{received[0]}: ending {len(self.going)} runs; the same command goes on"
                    )
                    return signals.EXIT_CODES[received[0]]
                if asked:
                    asked.clear()
                    self.show.note("\n".join(table(self.look())))
                ended = [self.ended(going) for going in list(self.going)]
                self.fill()
                self.refresh()
                if not any(ended):
                    time.sleep(POLL)
        finally:
            self.stop_all()
            self.refresh(last=True)
        return int(any(one.state.state != "done" for one in self.look()))

    # ---- starting ----

    def fill(self) -> None:
        """Starts runs while slots are free; forgets those that have ended."""
        for run in list(self.waiting):
            if len(self.going) >= self.parallel:
                return
            if self.elsewhere.get(run.name, 0.0) > time.monotonic() or self.held(run):
                continue
            if self.over(run, RunFolder(run.folder).read_state()):
                self.waiting.remove(run)
                continue
            claimed = claim.take(RunFolder(run.folder).claims)
            if claimed is None:
                self.elsewhere[run.name] = time.monotonic() + ELSEWHERE
                continue
            self.waiting.remove(run)
            # Only now is the state ours to read: the last owner may have ended it just before.
            state = RunFolder(run.folder).read_state()
            if self.over(run, state):
                claimed.release()
            else:
                self.start(run, state, claimed)

    def held(self, run: Run) -> bool:
        """Whether a run is still making the pre-training that this one will copy."""
        return any(
            self.plan.share(going.run, run)
            and read_progress(going.run.folder).phase in (None, "pretrain")
            for going in self.going
        )

    def over(self, run: Run, state: State) -> bool:
        """Whether nothing is left to do for a run in this state."""
        again = self.failed_before.get(run.name) == state.attempt
        return state.state == "done" or (state.state == "failed" and not again)

    def start(self, run: Run, before: State, claimed: claim.Claim) -> None:
        attach = getattr(self.executor, "attach", None)
        if attach is not None and before.state == "running" and before.job:
            folder = self.folder(run, before.attempt, claimed)
            handle = attach(run, folder)
            if handle is not None:
                going = _Going(run, folder, claimed, before, handle, time.monotonic())
                self.going.append(going)
                return
        folder = self.folder(run, before.attempt + 1, claimed)
        state = State(
            state="running",
            attempt=folder.attempt,
            failures=0 if before.state == "failed" else before.failures,
            host=claimed.owner.host,
            started=now(),
            executor=type(self.executor).__name__.lower(),
        )
        going = _Going(run, folder, claimed, state, None, time.monotonic())
        try:
            folder.prepare()
            folder.write_state(state)
            going.handle = self.executor.start(run, folder)
            self.going.append(going)
            pid, job = (getattr(going.handle, name, None) for name in ("pid", "job"))
            going.state = dataclasses.replace(state, pid=pid, job=None if job is None else str(job))
            folder.write_state(going.state)
        except BaseException:
            if going.handle is None:  # nothing runs: leave the run to whoever comes
                with contextlib.suppress(OSError):
                    folder.write_state(before)
                with contextlib.suppress(OSError):
                    claimed.release()
            raise

    def folder(self, run: Run, attempt: int, claimed: claim.Claim) -> RunFolder:
        arguments = [*run.arguments, f"--workdir={run.folder}"]
        command = Command(
            argv=tuple(experiments.command_line(self.plan.experiment, arguments)),
            directory=os.getcwd(),
            environment=self.environment,
            source=experiments.source(self.plan.experiment),
        )
        return RunFolder(run.folder, command, attempt, claimed.token)

    # ---- ending ----

    def ended(self, going: _Going) -> bool:
        """Whether the run has ended; it is then dealt with."""
        code = self.executor.poll(going.handle)
        if code is None:
            self.beat(going)
            return False
        self.going.remove(going)
        self.finish(going, code)
        return True

    def finish(self, going: _Going, code: int) -> None:
        """Writes down how an attempt ended, and puts the run back where it is to run again."""
        if not going.claim.beat():
            self.lost(going)
            return
        going.folder.copy_log(ended=True)
        interrupted = code == AGAIN and self.is_further(going.run)
        state = going.state.ended(
            code,
            interrupted=interrupted,
            retries=self.retries,
            error=lambda: going.folder.tail() or _no_output(going.folder),
        )
        if state.state == "preempted":
            self.waiting.appendleft(going.run)
        elif state.state == "pending":
            self.waiting.append(going.run)
        if state.error is not None:
            self.show_failure(going, state)
        going.folder.write_state(state)
        going.claim.release()

    def is_further(self, run: Run) -> bool:
        """Whether a run that asks to be started again has got anywhere in its last starts."""
        reached = read_progress(run.folder)
        if self.progress.get(run.name) != reached:
            self.progress[run.name] = reached
            self.fruitless[run.name] = 0
        self.fruitless[run.name] += 1
        return self.fruitless[run.name] <= FRUITLESS

    def show_failure(self, going: _Going, state: State) -> None:
        again = f", trying again ({state.failures} of {self.retries})"
        what = f"{going.run.name}: {ending(state.exit or 0)}"
        what += again if state.state == "pending" else ", given up"
        if state.exit == AGAIN:
            what += f"; it asked {FRUITLESS} times to be started again and made no step"
        lines = "".join(f"\n    {line}" for line in (state.error or "").splitlines())
        self.show.note(f"{what}; the end of {going.folder.log}:{lines}")

    def beat(self, going: _Going) -> None:
        if time.monotonic() - going.beaten < claim.BEAT:
            return
        going.beaten = time.monotonic()
        going.folder.copy_log()
        if not going.claim.beat():
            self.going.remove(going)
            self.executor.stop(going.handle)
            self.lost(going)

    def lost(self, going: _Going) -> None:
        """Another launcher took us for dead: the run and its state are its own now."""
        self.show.note(f"{going.run.name}: its claim was lost to another launcher")
        self.waiting.append(going.run)

    def stop_all(self) -> None:
        """Ends what runs, all at the same time, and gives it back."""
        if not self.going:
            return
        with concurrent.futures.ThreadPoolExecutor(len(self.going)) as pool:
            list(pool.map(lambda going: self.executor.stop(going.handle), self.going))
        for going in self.going:
            code = self.executor.poll(going.handle)
            state = going.state.ended(code, interrupted=True, retries=0)
            with contextlib.suppress(OSError):  # without it, the run counts as lost: it goes on
                if going.claim.beat():
                    going.folder.copy_log(ended=True)
                    going.folder.write_state(state)
                    going.claim.release()
        self.going.clear()

    # ---- showing ----

    def look(self):
        return look((run.name, run.folder) for run in self.plan.runs)

    def refresh(self, last: bool = False) -> None:
        """Shows all runs, once a second, or less often where looking takes long."""
        began = time.monotonic()
        if not last and began - self.shown < self.pause:
            return
        self.show.update(self.look())
        self.shown = time.monotonic()
        self.pause = max(1.0, 20 * (self.shown - began))

    def busy(self) -> str:
        owners = [claim.owner_of(RunFolder(run.folder).claims) for run in self.waiting]
        who = "; ".join(sorted({str(owner) for owner in owners if owner})) or "it has just ended"
        return (
            f"--workdir={self.plan.workdir}: another launcher runs all that is left ({who}); "
            f"{summary(self.look())}"
        )


def _no_output(folder: RunFolder) -> str:
    """Why a log may be empty."""
    with contextlib.suppress(OSError):
        if shutil.disk_usage(folder.path).free < 1 << 16:
            return "(the log is empty: the disk is full)"
    return "(the log is empty)"


def _added_environment() -> dict[str, str]:
    """What `experiments.environment` adds to this process's own."""
    after = experiments.environment(os.environ)
    return {name: value for name, value in after.items() if os.environ.get(name) != value}

"""What the launcher keeps of a run, in `<run>/launch/`; `<run>` is the experiment's own --workdir.

    command.json        command line, directory, environment it added, commit, versions
    source.diff         what the sources differed from that commit, if they did
    experiment.py       the experiment's file, which may be in no repository
    state.json          what the run does now: `State`
    claims/             who runs it (see `claim`)
    attempts/N/log.txt  stdout and stderr of attempt N; to a bucket it is copied now and then

command.json and what goes with it are of the first attempt. Only the owner of the claim writes
here. Files are whole or absent, so anybody may read at any time.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import pathlib
import platform
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping

from v4jax.exit_codes import DONE, REFUSED
from v4jax.launching.experiments import ROOT
from v4jax.launching.processes import MARK
from v4jax.training.files import in_bucket, read_end, write_json, write_whole

STATES = ("pending", "running", "done", "failed", "preempted")


@dataclasses.dataclass(frozen=True)
class State:
    """state.json. `pending` with failures: it failed, and will be tried again.

    attempt: how often the run was started. failures: attempts that failed, since the sweep was last
    started to retry them. exit: of the last attempt, negative for a signal. started, finished: of
    the last attempt, UTC, ISO 8601. job: the scheduler's id. error: the last lines of its log.
    """

    state: str = "pending"
    attempt: int = 0
    failures: int = 0
    exit: int | None = None
    host: str | None = None
    pid: int | None = None
    started: str | None = None
    finished: str | None = None
    executor: str | None = None
    job: str | None = None
    error: str | None = None

    def ended(
        self, code: int | None, *, interrupted: bool, retries: int, error: Callable[[], str] = str
    ) -> State:
        """The state after an attempt that ended with `code`, negative for a signal, None: unknown.

        A failed run is `pending` again up to `retries` times; not after bad input, and not one that
        was `interrupted`: that is no failure. error: gives the last lines of the log, of a failure.
        """
        failed = code != DONE and not interrupted
        failures = self.failures + failed
        again = failed and code != REFUSED and failures <= retries
        after = "pending" if again else "failed" if failed else "preempted"
        return dataclasses.replace(
            self,
            state="done" if code == DONE else after,
            failures=failures,
            exit=code,
            finished=now(),
            error=error() if failed else None,
        )


@dataclasses.dataclass(frozen=True)
class Command:
    """What starts a run. environment: what is added to the launcher's own."""

    argv: tuple[str, ...]
    directory: str
    environment: Mapping[str, str]
    source: str | None = None
    """The experiment's file."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run's folder; for executors with the attempt to start, what starts it and its token."""

    path: pathlib.Path
    command: Command | None = None
    attempt: int = 0
    token: str = ""

    @property
    def launch(self) -> pathlib.Path:
        return self.path / "launch"

    @property
    def claims(self) -> pathlib.Path:
        return self.launch / "claims"

    @property
    def log(self) -> pathlib.Path:
        """The log of this attempt."""
        return self.launch / "attempts" / str(self.attempt) / "log.txt"

    @property
    def open_log(self) -> pathlib.Path:
        """Where this machine writes the log: the log itself, or on its way to a bucket."""
        if not in_bucket(self.path):
            return self.log
        name = hashlib.sha256(f"{self.token} {self.log}".encode()).hexdigest()[:32]
        return pathlib.Path(tempfile.gettempdir(), f"v4jax-{name}.log")

    def copy_log(self, ended: bool = False) -> None:
        """Brings what `open_log` has to `log`. ended: there will be no more."""
        if in_bucket(self.path) and self.open_log.exists():
            write_whole(self.log, self.open_log.read_bytes())
            if ended:
                self.open_log.unlink()

    def environment(self) -> dict[str, str]:
        """What the launcher adds to the worker's environment, the claim's token included."""
        added = {} if self.command is None else dict(self.command.environment)
        return {**added, MARK: self.token, "PYTHONUNBUFFERED": "1"}

    def read_state(self) -> State:
        """The state, a new one where there is none.

        Raises ValueError, one line, where the file is not one.
        """
        path = self.launch / "state.json"
        try:
            fields = json.loads(path.read_bytes())
            names = {field.name for field in dataclasses.fields(State)}
            state = State(**{name: fields[name] for name in names & fields.keys()})
        except FileNotFoundError:
            return State()
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged; delete it to run the run again") from error
        if state.state not in STATES:
            raise ValueError(f"{path}: state {state.state!r}; allowed: {', '.join(STATES)}")
        return state

    def write_state(self, state: State) -> None:
        write_json(self.launch / "state.json", dataclasses.asdict(state))

    def prepare(self) -> None:
        """Makes what attempt `self.attempt` needs; at the first, writes what reproduces it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self.command is None or (self.launch / "command.json").exists():
            return
        commit, diff = source_version()
        if self.command.source:
            source = pathlib.Path(self.command.source).read_bytes()
            write_whole(self.launch / "experiment.py", source)
        if diff:
            write_whole(self.launch / "source.diff", diff)
        record = {
            "argv": list(self.command.argv),
            "directory": self.command.directory,
            "environment": dict(self.command.environment),
            "commit": commit,
            "changed": bool(diff),
            "python": platform.python_version(),
            "packages": packages(),
        }
        write_json(self.launch / "command.json", record)  # last: it says that all is there

    def tail(self, lines: int = 10) -> str:
        """The last lines of this attempt's log, as a terminal shows them; "" without any."""
        try:
            text = read_end(self.log, 16384)[0].decode(errors="replace")
        except OSError:
            return ""
        # A progress line is rewritten in place: what was last written there counts.
        shown = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
        return "\n".join(line[:500] for line in [line for line in shown if line][-lines:])


def ending(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}" + (" (bad input)" if code == REFUSED else "")
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"


def now() -> str:
    """The time, as state.json has it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@functools.cache
def packages() -> dict[str, str]:
    """Every installed package and its version."""
    import importlib.metadata  # 30 ms, once

    found = ((d.metadata["Name"], d.version) for d in importlib.metadata.distributions())
    return {name: version for name, version in found if name}


def source_version(root: pathlib.Path = ROOT) -> tuple[str | None, bytes]:
    """The commit of the sources and their difference from it; (None, b"") outside a repository."""

    def git(*arguments: str) -> bytes:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, check=True, timeout=30
        ).stdout

    try:
        top = git("rev-parse", "--show-toplevel").decode().strip()
        if pathlib.Path(top).resolve() != root:  # installed somewhere within another's
            return None, b""
        return git("rev-parse", "HEAD").decode().strip(), git("diff", "HEAD", "--binary")
    except (OSError, subprocess.SubprocessError):
        return None, b""

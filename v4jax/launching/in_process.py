"""Runs in this process, one after another: for tests, debuggers and notebooks.

Nothing is started, so the run has this process's environment, devices and imports. Only what the
experiment's own file defines is new at every run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping

from v4jax.launching.resources import check_resources
from v4jax.launching.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Handle:
    code: int


class InProcess:
    """Runs each experiment's `main` in this process; `start` returns when it has ended."""

    RESOURCES: Mapping[str, str] = {}

    def __init__(self, resources: Mapping[str, str], slots: int):
        check_resources("in_process", resources, self.RESOURCES)
        if slots != 1:
            raise ValueError(f"--parallel={slots}: --executor=in_process runs one at a time: 1")

    def start(self, run, folder: RunFolder) -> Handle:
        """Runs it, what it prints through Python going to `folder.log`."""
        assert folder.command is not None
        with (
            open(folder.open_log, "a", encoding="utf-8", buffering=1) as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
            _environment(folder.environment()),
            _interrupts(),
            _own_flags(),
            _own_logging(),
        ):
            return Handle(_run(list(folder.command.argv)))

    def poll(self, handle: Handle) -> int | None:
        return handle.code

    def stop(self, handle: Handle) -> None:
        """Nothing: what has a handle has ended."""


def _run(argv: list[str]) -> int:
    """Runs `python [-P] [-m] WHAT ARGUMENTS...` here; the exit code that it would have."""
    options = argv[2:] if argv[1] == "-P" else argv[1:]
    module = options[0] == "-m"
    before = sys.argv, list(sys.path)
    sys.argv = options[1:] if module else options
    try:
        if module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(sys.argv[0]))  # as Python does for a script
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as leave:
        if leave.code is None or isinstance(leave.code, int):
            return leave.code or 0
        print(leave.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.argv, sys.path[:] = before
    return 0


@contextlib.contextmanager
def _environment(added: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Ctrl-C ends the experiment, which may turn it into an exit code, and then the launcher."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = []

    def interrupt(number, frame):
        seen.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if seen:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def _own_flags() -> Iterator[None]:
    """absl's flags as they were: those of the experiment's file go, others get back their values.

    Modules that the experiment imported stay, and so do their flags, with their defaults.
    """
    from absl import flags

    values = flags.FLAGS
    parsed = values.is_parsed()
    before = {name: dict(vars(values[name])) for name in values}
    try:
        yield
    finally:
        for name in list(values):
            if name in before:
                vars(values[name]).update(before[name])
            elif values.find_module_defining_flag(name) in sys.modules:
                values[name].unparse()
            else:
                delattr(values, name)
        if not parsed:
            values.unparse_flags()


@contextlib.contextmanager
def _own_logging() -> Iterator[None]:
    """The root logger has absl's handler alone, as in a process of its own, and writes to the run's
    log; afterwards it and absl's are as they were: `app.run` leaves its handler behind."""
    from absl import logging as absl_logging

    loggers = logging.root, logging.getLogger("absl")
    levels = [logger.level for logger in loggers]
    handlers = list(logging.root.handlers)
    absl_handler = absl_logging.get_absl_handler()
    stream = absl_handler.python_handler.stream
    logging.root.handlers[:] = []
    absl_logging.use_absl_handler()  # `app.run` does so in the first run only
    absl_handler.python_handler.setStream(sys.stderr)
    try:
        yield
    finally:
        absl_handler.python_handler.setStream(stream)
        logging.root.handlers[:] = handlers
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

"""Signals that stop a sweep, noted for its loop to see: it may be in the middle of anything."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from v4jax.exit_codes import AGAIN

EXIT_CODES = {"SIGINT": 130, "SIGTERM": AGAIN, "SIGHUP": 129}
"""The launcher's exit code after each. SIGTERM is how schedulers pre-empt: run me again."""


@contextlib.contextmanager
def questions() -> Iterator[list[str]]:
    """SIGUSR1s that came since: what asks where this process is, and would end it otherwise."""
    asked: list[str] = []
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "SIGUSR1"):
        yield asked
        return
    before = signal.signal(signal.SIGUSR1, lambda number, frame: asked.append("SIGUSR1"))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGUSR1, before)


@contextlib.contextmanager
def received() -> Iterator[list[str]]:
    """The names of the signals that came since; the second one ends this process, as by default.

    Workers on this machine then die with it (see `local`). In another thread than the main one
    nothing comes: signals do as they did. So does SIGHUP under nohup.
    """
    names: list[str] = []

    def receive(number, frame):
        if names:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        names.append(signal.Signals(number).name)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in EXIT_CODES:
            number = getattr(signal, name)
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, receive)
    try:
        yield names
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

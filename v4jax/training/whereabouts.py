"""SIGUSR1: a process says where it is, and goes on.

    kill -USR1 PID         srun: scancel --signal=USR1 JOB.STEP

On standard error come first the Python stacks of all threads, written by the signal's C handler:
at once, also while the main thread waits for a compiler or for a collective that hangs. Then one
line: what runs, step, loss, rate, since when. It comes from Python, so where the main thread hangs
in C it comes when that ends; the stacks say where it hangs.
"""

import datetime
import faulthandler
import os
import signal
import threading
from collections.abc import Callable

_began = datetime.datetime.now().astimezone()
_where: Callable[[], str] = lambda: "starting"  # noqa: E731


def now(where: str | Callable[[], str]) -> None:
    """Notes what this process does from now on: words, or a function that finds them when asked.

    The function runs within a signal handler: it takes no lock and waits for no device.
    """
    global _where
    _where = (lambda: where) if isinstance(where, str) else where


def line() -> str:
    """The line that SIGUSR1 prints."""
    return f"where: {_where()}; process {os.getpid()}, since {_began:%Y-%m-%d %H:%M:%S}"


def _answer(number, frame) -> None:
    os.write(2, f"{line()}\n".encode())  # print may be in the middle of a line of this thread


def answer_signals() -> None:
    """From now on SIGUSR1 prints, where a system has it; other signals stay as they are.

    In another thread than the main one, and where standard error is closed, nothing changes.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "SIGUSR1"):
        return
    signal.signal(signal.SIGUSR1, _answer)
    try:  # by number: standard error may have been replaced by one without a file
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True, chain=True)
    except OSError:
        pass

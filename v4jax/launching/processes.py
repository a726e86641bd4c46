"""Which processes live on this machine, and which of them belong to a claim.

A worker carries the token of the claim it runs under in its environment, and so does all that it
starts. By that mark a successor finds what a killed launcher left behind, in whatever process group
it is. Linux tells it in /proc; elsewhere nothing is found, and only a worker's group is ended.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import time
from collections.abc import Collection

MARK = "V4JAX_CLAIM"
"""The environment variable that holds the token."""

GRACE = 30.0
"""Seconds between SIGTERM and SIGKILL: enough to write a checkpoint."""

_PROC = pathlib.Path("/proc")

VISIBLE = (_PROC / "self" / "environ").exists()
"""Whether this system shows the environment of processes, so that `marked` finds any."""


def machine() -> str:
    """Names this machine since it started, and the process ids that are seen here.

    Two containers may share a host name, but not the ids of their processes.
    """
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def start_time(pid: int) -> str | None:
    """When process `pid` of this machine began, as the system tells it; None if it has ended.

    A process id comes back in time, the pair of id and start does not.
    """
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None if (_PROC / "self" / "stat").exists() else _start_by_ps(pid)
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return None if fields[0] in "ZX" else fields[19]


def _start_by_ps(pid: int) -> str | None:
    line = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True
    ).stdout.strip()
    state, _, began = line.partition(" ")
    return None if not line or state.startswith("Z") else began.strip()


def marked(tokens: Collection[str]) -> list[int]:
    """The living processes that carry one of the tokens, this one left out."""
    marks = {f"{MARK}={token}".encode() for token in tokens}
    found = []
    for folder in _PROC.glob("[0-9]*") if marks else ():
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if not marks.isdisjoint((folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
    return [pid for pid in found if pid != os.getpid() and start_time(pid) is not None]


def end(tokens: Collection[str], grace: float = GRACE) -> bool:
    """Ends all that carry one of the tokens and waits until none lives. Whether there were any.

    SIGTERM first, SIGKILL after `grace` seconds.
    """
    left = marked(tokens)
    found = bool(left)
    deadline = time.monotonic() + grace
    send(left, signal.SIGTERM)
    while left := marked(tokens):  # looked for anew: they may start others
        if time.monotonic() >= deadline:
            send(left, signal.SIGKILL)
        time.sleep(0.05)
    return found


def send(pids: Collection[int], number: int) -> None:
    """Sends a signal to each of the processes that still lives."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)

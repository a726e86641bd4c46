"""Who runs a run: one owner at a time, on one machine or on several that share folder or bucket.

`<run>/launch/claims/N` are JSON files; the newest number counts. A claim is taken by creating the
next one, which file system and bucket let only one do, so nothing is ever locked and no file is
replaced by somebody else:

    {"host": ..., "machine": ..., "pid": ..., "started": ..., "token": ..., "released": false}

An owner touches its file (`beat`), and says when it is done with the run (`release`). A claim is
dead, and anybody may take the next one, if its owner was a process of this machine that has ended,
or is on another machine and has not beaten for `STALE` seconds. An owner that was taken for dead
learns it from the next beat.

What a dead owner started may still run. `take` ends it before it returns: workers carry the token
(see `processes`). On another machine it cannot, so `local.py` has the kernel end a worker when its
launcher dies.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import secrets
import socket
import time

from v4jax.launching import processes
from v4jax.training.files import create, in_bucket, modified, touch, write_whole

BEAT = 10.0
"""Seconds between two beats."""

STALE = 120.0
"""Seconds without a beat after which an owner on another machine counts as dead.

File systems of several machines may show a new time up to a minute late.
"""

CLOCK = 300.0
"""Seconds for which the difference between a bucket's clock and this machine's counts as known."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process, and the token that what it starts carries."""

    host: str
    machine: str
    pid: int
    started: str | None
    token: str
    released: bool = False

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim that this process has taken. `token` is for what it starts."""

    path: pathlib.Path
    owner: Owner

    @property
    def token(self) -> str:
        return self.owner.token

    def beat(self) -> bool:
        """Shows that the owner lives. False: another has taken the run, so end what runs."""
        number, _ = _newest(self.path.parent)
        if number != int(self.path.name):
            return False
        touch(self.path)
        return True

    def release(self) -> None:
        """Gives the run back: nothing of this claim runs any more."""
        write_whole(self.path, _encode(dataclasses.replace(self.owner, released=True)))


def take(folder: pathlib.Path) -> Claim | None:
    """Claims the run whose claims are in `folder`; None if it has a living owner.

    May take `processes.GRACE` seconds where a dead owner's worker has to be ended first.
    """
    number, owner = _newest(folder)
    if number and _lives(folder, number, owner):
        return None
    mine = Owner(
        host=socket.gethostname(),
        machine=processes.machine(),
        pid=os.getpid(),
        started=processes.start_time(os.getpid()),
        token=secrets.token_hex(16),
    )
    path = folder / str(number + 1)
    if not create(path, _encode(mine)):
        return None
    # Of all claims: who took the one before may have been killed just here.
    earlier = [_read(folder / str(n)) for n in range(1, number + 1)]
    processes.end({was.token for was in earlier if was is not None and not was.released})
    return Claim(path, mine)


def owner_of(folder: pathlib.Path) -> Owner | None:
    """The living owner of the run whose claims are in `folder`, or None."""
    number, owner = _newest(folder)
    return owner if number and _lives(folder, number, owner) else None


def _newest(folder: pathlib.Path) -> tuple[int, Owner | None]:
    """The newest claim's number, 0 without any, and its owner: None if its file is damaged."""
    try:
        numbers = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    except FileNotFoundError:
        numbers = []
    number = max(numbers, default=0)
    return number, _read(folder / str(number)) if number else None


def _read(path: pathlib.Path) -> Owner | None:
    try:
        return Owner(**json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _lives(folder: pathlib.Path, number: int, owner: Owner | None) -> bool:
    if owner is not None and owner.released:
        return False
    if owner is not None and owner.machine == processes.machine():
        return processes.start_time(owner.pid) == owner.started
    return _now(folder) - modified(folder / str(number)) < STALE


def _now(folder: pathlib.Path) -> float:
    """The time of file system or bucket: the clocks of machines differ."""
    clock = folder / "clock"
    try:
        if in_bucket(folder):
            return time.monotonic() + _ahead(clock, int(time.monotonic() / CLOCK))
        clock.touch()
        return clock.stat().st_mtime
    except OSError:  # one who may only look
        return time.time()


@functools.lru_cache(maxsize=1)
def _ahead(clock: pathlib.Path, _) -> float:
    """The bucket's time less this process's; seldom asked: an object may be put once a second."""
    write_whole(clock, b"")
    return modified(clock) - time.monotonic()


def _encode(owner: Owner) -> bytes:
    return json.dumps(dataclasses.asdict(owner), sort_keys=True).encode() + b"\n"

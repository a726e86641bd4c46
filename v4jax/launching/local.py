"""Runs on this machine: a process a slot, cores and GPUs split over the slots.

A worker dies with its launcher: the kernel sends SIGKILL when the thread that started it ends, also
when that was killed itself. Its successor may be on another machine, where nobody could look for a
worker that goes on; and a run resumes from its checkpoint in any case.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

from v4jax.launching import processes
from v4jax.launching.resources import COUNT, check_resources
from v4jax.launching.run_folder import RunFolder

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
LEFT_BEHIND = 5.0
"""Seconds that what a worker started may outlive it."""

_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass
class Handle:
    process: subprocess.Popen
    slot: int
    token: str
    ended: float | None = None
    """When the worker ended, which others of its group may outlive."""

    @property
    def pid(self) -> int:
        return self.process.pid


class Local:
    """`slots` runs at a time on this machine. Raises ValueError, one line, on bad resources."""

    RESOURCES: Mapping[str, str] = {
        "cores": "cores of each run; default: this machine's, split over --parallel",
        "gpus": "GPUs of each run, handed out by CUDA_VISIBLE_DEVICES; default: all see all",
    }

    def __init__(self, resources: Mapping[str, str], slots: int):
        check_resources("local", resources, self.RESOURCES, otherwise=(r"0*[1-9]\d*", COUNT[1]))
        given = {name: int(value) for name, value in resources.items()}
        self._cores = _split(_available_cores(), given.get("cores"), slots, "cores")
        self._gpus: list[list] | None = None
        if "gpus" in given:
            self._gpus = _split(_available_gpus(), given["gpus"], slots, "gpus")
        self._free = list(range(slots))

    def start(self, run, folder: RunFolder) -> Handle:
        """Starts the run in a free slot, its output going to `folder.log`."""
        assert folder.command is not None
        slot = self._free[0]
        environ = os.environ | folder.environment()
        cores = self._cores[slot]
        for name in THREADS:
            environ.setdefault(name, str(len(cores)))
        if self._gpus is not None:
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self._gpus[slot]))
        with open(folder.open_log, "ab") as log:
            process = subprocess.Popen(
                folder.command.argv,
                cwd=folder.command.directory,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_in_child(cores),
            )
        self._free.remove(slot)
        return Handle(process, slot, folder.token)

    def poll(self, handle: Handle) -> int | None:
        """The exit code once nothing of the run lives any more, else None."""
        code = handle.process.poll()
        if code is None:
            return None
        left = processes.marked({handle.token})
        if handle.ended is None:
            handle.ended = time.monotonic()
            processes.send(left, signal.SIGTERM)  # what the worker started, and left behind
            if not processes.VISIBLE:
                self._signal_group(handle, signal.SIGKILL)
        elif time.monotonic() - handle.ended > LEFT_BEHIND:
            processes.send(left, signal.SIGKILL)
        if left:
            return None
        self._free_slot(handle)
        return code

    def stop(self, handle: Handle) -> None:
        """Ends the run and all that it started: SIGTERM, SIGKILL `processes.GRACE` later."""
        if handle.process.poll() is None:
            self._signal_group(handle, signal.SIGTERM)
            try:
                handle.process.wait(processes.GRACE)
            except subprocess.TimeoutExpired:
                self._signal_group(handle, signal.SIGKILL)
                handle.process.wait()
        if not processes.VISIBLE:
            self._signal_group(handle, signal.SIGKILL)
        processes.end({handle.token}, grace=0)
        self._free_slot(handle)

    def _signal_group(self, handle: Handle, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(handle.pid, number)

    def _free_slot(self, handle: Handle) -> None:
        if handle.slot not in self._free:
            self._free.append(handle.slot)


def _split(there: list, each: int | None, slots: int, name: str) -> list[list]:
    """A share of `there` for each slot: of `each`, or of equal size; at least one, then shared."""
    if each is None:
        each = max(1, len(there) // slots)
    elif each * slots > len(there):
        raise ValueError(
            f"--{name}={each}: with --parallel={slots} that is {each * slots}, "
            f"but this machine has {len(there)}"
        )
    return [[there[(slot * each + i) % len(there)] for i in range(each)] for slot in range(slots)]


def _available_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _available_gpus() -> list:
    """What CUDA_VISIBLE_DEVICES names, else the numbers of NVIDIA's devices."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return list(range(len(list(pathlib.Path("/dev").glob("nvidia[0-9]*")))))


def _in_child(cores: list[int]):
    """What a worker does before it becomes the experiment."""
    launcher = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            os.sched_setaffinity(0, cores)
        if os.getppid() != launcher:  # it died before the kernel was told
            os._exit(1)

    return prepare

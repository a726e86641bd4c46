"""Several processes as one run, and an end that loses nothing when a scheduler sends SIGTERM.

`start` is the first thing a program does with JAX. Who is who comes from, in this order:

    flags          coordinator=host:port, num_processes, process_id
    environment    JAX_COORDINATOR_ADDRESS, V4JAX_NUM_PROCESSES, V4JAX_PROCESS_ID, as a JobSet
                   or a shell loop over ranks sets them
    JAX            Slurm (inside srun), Open MPI, TPU slices on GKE; and on other TPU machines
                   where V4JAX_DETECT_PROCESSES=1 says that there are several

Pre-emption goes through JAX's own service, which takes SIGTERM from then on: `preempted` turns True
on all processes at the same step, the run saves and raises `Preempted`, and the exit code is 75. A
process alone has the same where asked (`preemptible`, V4JAX_PREEMPTIBLE=1) and inside srun. Between
trainings there is nothing to save: `end_if_preempted`, called between the phases of an experiment
and in the loops of its evaluation, ends the run with 75 too. In between, while a corpus is read,
a tokenizer is trained or a program is compiled, SIGTERM waits for the next call or step. Who
sends it must be ready to send SIGKILL, which loses what came after the last checkpoint.

A process that dies takes the others with it, at once where it was the first one, else within the
heartbeat (V4JAX_HEARTBEAT_SECONDS, default 30): JAX aborts them, with SIGABRT and a line that says
so. `errors_end_at_once` is for errors that one process alone may have.
"""

import contextlib
import itertools
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from v4jax.exit_codes import AGAIN

MEETING = 24 * 3600
"""Seconds until `meet` fails; a process that dies ends it long before."""

HEARTBEAT = 30
TIMEOUT = 300
"""Seconds to wait for the other processes to start."""


class Preempted(SystemExit):
    """Training ended early with everything saved; the process exits with 75."""

    def __init__(self, message: str):
        super().__init__(AGAIN)
        self.message = message

    def __str__(self) -> str:
        return self.message


def arguments(
    environ: Mapping[str, str],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    preemptible: bool = False,
) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be called with; None: not at all.

    Port 0 in the coordinator's address stands for any free port: the process is alone.

    Raises ValueError, one line, where flags and variables do not fit together.
    """
    heartbeat = _number(environ, "V4JAX_HEARTBEAT_SECONDS", least=1) or HEARTBEAT
    common = {"heartbeat_timeout_seconds": heartbeat, "initialization_timeout": TIMEOUT}
    address = coordinator or environ.get("JAX_COORDINATOR_ADDRESS") or None
    if num_processes is None:
        num_processes = _number(environ, "V4JAX_NUM_PROCESSES", least=1)
    if process_id is None:
        process_id = _number(environ, "V4JAX_PROCESS_ID", least=0)
    if (num_processes is None) != (process_id is None):
        missing = "num_processes" if num_processes is None else "process_id"
        raise ValueError(f"--{missing}: missing, as its partner is given, allowed: both or none")
    if address is not None and not _port(address).isdecimal():
        raise ValueError(f"--coordinator={address}: allowed: host:port of the first process")
    if num_processes is not None and process_id is not None:
        if not 0 <= process_id < num_processes:
            raise ValueError(f"--process_id={process_id}: allowed: 0 to {num_processes - 1}")
        if num_processes > 1:
            if address is None:
                raise ValueError(
                    f"--num_processes={num_processes}: needs --coordinator=host:port (or "
                    "JAX_COORDINATOR_ADDRESS) of the first process"
                )
            return common | _explicit(environ, address, num_processes, process_id)
        return common | _alone()
    detected = _detected(environ)
    if detected is not None:
        if address is not None:
            detected |= {"coordinator_address": address} | _bind(environ, address)
        return common | detected
    if coordinator is not None:
        raise ValueError(
            f"--coordinator={coordinator}: needs --num_processes and --process_id too, as neither "
            "Slurm nor a TPU slice says them here"
        )
    in_srun = "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ
    asked = preemptible or in_srun or environ.get("V4JAX_PREEMPTIBLE", "0") not in ("", "0")
    return common | _alone() if asked else None


def _number(environ: Mapping[str, str], name: str, least: int) -> int | None:
    text = environ.get(name, "")
    if not text:
        return None
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name}={text}: allowed: a whole number from {least} on")
    return int(text)


def _alone() -> dict[str, Any]:
    return {
        "coordinator_address": "127.0.0.1:0",
        "coordinator_bind_address": "127.0.0.1:0",
        "num_processes": 1,
        "process_id": 0,
        "cluster_detection_method": "deactivate",
    }


def _explicit(environ: Mapping[str, str], address: str, count: int, index: int) -> dict[str, Any]:
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    } | _bind(environ, address)


def _bind(environ: Mapping[str, str], address: str) -> dict[str, Any]:
    """JAX listens on all interfaces by default; of a loopback address, on that one alone."""
    host = address.rpartition(":")[0].strip("[]")
    loopback = host == "localhost" or host == "::1" or host.startswith("127.")
    if environ.get("JAX_COORDINATOR_BIND_ADDRESS") or not loopback:
        return {}
    return {"coordinator_bind_address": address.replace("localhost", "127.0.0.1")}


def _detected(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments beside which JAX finds out the rest; None where it would find one process.

    An empty list of local devices is all of them. JAX takes one GPU a task under Slurm unless told
    otherwise, which is wrong where a node has one task.
    """
    tasks = _number(environ, "SLURM_NTASKS", least=1) or 1
    if "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ and tasks > 1:
        nodes = _number(environ, "SLURM_STEP_NUM_NODES", least=1)
        nodes = nodes or _number(environ, "SLURM_NNODES", least=1)
        return {"local_device_ids": []} if nodes == tasks else {}
    if (_number(environ, "OMPI_COMM_WORLD_SIZE", least=1) or 1) > 1:
        return {}
    if "," in environ.get("TPU_WORKER_HOSTNAMES", ""):
        return {}
    slices = _number(environ, "MEGASCALE_NUM_SLICES", least=1) or 1
    if slices > 1 or environ.get("V4JAX_DETECT_PROCESSES", "0") not in ("", "0"):
        return {}
    return None


def start(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    preemptible: bool = False,
) -> None:
    """Joins the other processes, if there are any. Before anything touches a device; once.

    Raises ValueError as `arguments`, and where the coordinator's name is not known.
    """
    found = arguments(
        os.environ,
        coordinator=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        preemptible=preemptible,
    )
    if found is None or jax.distributed.is_initialized():
        return
    address = found.get("coordinator_address")
    if address == "127.0.0.1:0":
        free = f"127.0.0.1:{free_port()}"
        found |= {"coordinator_address": free, "coordinator_bind_address": free}
    elif address is not None:
        await_name(address, TIMEOUT)
    jax.distributed.initialize(**found)


def free_port() -> int:
    """A TCP port of the loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def await_name(address: str, seconds: float) -> None:
    """Waits until the address's host has a number: a pod's name may come later than the pod.

    Raises ValueError, one line: JAX would abort, with a page of C++.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(address.rpartition(":")[0].strip("[]"), int(_port(address)))
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(f"--coordinator={address}: {error.strerror or error}") from error
            time.sleep(1)


def _port(address: str) -> str:
    return address.rpartition(":")[2] if ":" in address else ""


# ---- among the processes ----


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def say(*words: object) -> None:
    """`print`, by the main process alone, at once."""
    if is_main():
        print(*words, flush=True)


def barrier(name: str) -> None:
    """Returns when all processes have called it, with the same name."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def meet(name: str) -> None:
    """Returns when all processes have called it, in the same order, however far apart they are.

    After what takes them unequally long, such as compiling, and before their first collective: its
    partners give up after half a minute. No device takes part, as one does in `barrier`.
    """
    if jax.process_count() > 1:
        from jax._src.distributed import global_state  # it has no public name

        meeting = f"v4jax {next(_meetings)}: {name}"
        global_state.client.wait_at_barrier(meeting, 1000 * MEETING)  # type: ignore[union-attr]


_meetings = itertools.count(1)


def from_main(value: int) -> int:
    """The main process's `value`; all processes must call it."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(jax.numpy.int32(value)))


def agree(value: int, what: str) -> None:
    """Raises ValueError, one line, on every process whose `value` is not the main process's.

    All processes must call it; `what` says what the value is.
    """
    wanted = from_main(value)
    if value != wanted:
        raise ValueError(
            f"{what} is {value} for process {jax.process_index()} and {wanted} for the first one: "
            "is the folder shared by all machines?"
        )


_calls = itertools.count(1)


def preempted() -> bool:
    """Whether to save and end now: a SIGTERM has come, to any process.

    All processes must call it after every step; it turns True on all of them at the same call, and
    at that one alone. JAX compares a count of calls, not the run's step, which starts anew with
    each arm. The count is of the calls of `end_if_preempted` too.
    """
    if not jax.distributed.is_initialized() or not _service_runs():
        return False
    from jax.experimental import multihost_utils

    return bool(multihost_utils.reached_preemption_sync_point(next(_calls)))


def end_if_preempted(what: str) -> None:
    """Raises `Preempted` where a SIGTERM has come and nothing is to be saved.

    what: what is being done, for the message. All processes must call it equally often.
    """
    if preempted():
        raise Preempted(f"SIGTERM, {what}; the same command goes on")


def _service_runs() -> bool:
    return os.environ.get("JAX_ENABLE_PREEMPTION_SERVICE", "1").lower() not in ("0", "false")


@contextlib.contextmanager
def errors_end_at_once() -> Iterator[None]:
    """Ends this process where an error leaves the block, if it is one of several: an orderly end of
    Python waits for the others, and they may be waiting for this one. Exit code 1, or SystemExit's.

    `Preempted` is no error: all processes leave together.
    """
    try:
        yield
    except Preempted as ended:
        if is_main():
            print(ended, file=sys.stderr, flush=True)
        raise
    except BaseException as error:
        if not jax.distributed.is_initialized() or jax.process_count() == 1:
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        code = error.code if isinstance(error, SystemExit) else 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)

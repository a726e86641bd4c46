"""A Slurm cluster of two virtual nodes on this machine, with daemons and files of its own.

Needs Debian's packages slurmctld, slurmd, slurm-client and munge, and root; no systemd, no cgroups,
no database. All listens on the loopback. By hand, until a line end comes:

    python -m tests.launching.slurm_cluster /tmp/cluster
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")

# cred_expire: a job that was put back may start after so many seconds and one; 5 is the least.
# Jobs of the partition high end those of main, which have GraceTime seconds after SIGTERM.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
ReturnToService=2
KillWait=5
MinJobAge=600
SlurmdParameters=config_overrides
JobRequeue=1
NodeName=n[0-1] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{ports[1]},{ports[2]}] \
CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=n[0-1] Default=YES MaxTime=60 PriorityTier=1 GraceTime=10 State=UP
PartitionName=high Nodes=n[0-1] MaxTime=60 PriorityTier=10 PreemptMode=OFF State=UP
"""


class Unavailable(Exception):
    """Why there is no cluster."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """What its commands need in their environment."""
        return {"SLURM_CONF": str(self.root / "slurm.conf")}

    def run(self, *command: str, timeout: float = 20) -> str:
        """Runs one of Slurm's commands; its output."""
        return subprocess.run(
            command,
            env=os.environ | self.environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=timeout,
        ).stdout

    def start_controller(self, *options: str) -> None:
        self.run("slurmctld", *options)

    def stop_controller(self) -> None:
        _end(self.root / "slurmctld.pid")

    def wait_until_idle(self, seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        states: list[str] = []
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.SubprocessError):
                command = ("sinfo", "-h", "-N", "-p", "main", "-o", "%T")
                states = self.run(*command, timeout=5).split()
                if states == ["idle", "idle"]:
                    return
            time.sleep(0.1)
        raise Unavailable(f"two nodes are not idle after {seconds:g} s: {states}; {self.tails()}")

    def tails(self, lines: int = 3) -> str:
        """The ends of the daemons' logs."""
        logs = sorted(self.root.glob("*.log"))
        return "; ".join(
            f"{log.name}: {' / '.join(log.read_text(errors='replace').splitlines()[-lines:])}"
            for log in logs
        )


@contextlib.contextmanager
def cluster(root: Path) -> Iterator[Cluster]:
    """A running cluster whose files are in the folder `root`. Raises `Unavailable`."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise Unavailable(f"not installed: {', '.join(missing)}")
    if os.geteuid() != 0:
        raise Unavailable("its daemons need root")
    (root / "state").mkdir(parents=True)
    root.chmod(0o755)
    (root / "slurm.conf").write_text(CONFIGURATION.format(root=root, ports=_free_ports(3)))
    version = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True).stdout
    # A machine without cgroups: 22.05 starts with v1 all the same, later ones know "disabled".
    old = int(re.findall(r"\d+", version)[0]) < 23
    (root / "cgroup.conf").write_text(f"CgroupPlugin={'cgroup/v1' if old else 'disabled'}\n")
    key = root / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    made = Cluster(root)
    files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid"}
    files |= {"log-file": "munged.log", "seed-file": "munged.seed"}
    try:
        made.run("munged", "--force", *(f"--{name}={root / file}" for name, file in files.items()))
        made.start_controller("-c")
        for node in ("n0", "n1"):
            made.run("slurmd", "-N", node)
        made.wait_until_idle()
        yield made
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", None) or ""
        raise Unavailable(f"{error} {said.strip()}; {made.tails()}") from error
    finally:
        with contextlib.suppress(subprocess.SubprocessError):
            made.run("scancel", "--user=root", timeout=5)
            _wait_for(lambda: not made.run("squeue", "-h", timeout=5).strip(), 8)
        for name in ("n0", "n1", "slurmctld", "munged"):
            _end(root / f"{name}.pid")


def _end(pid_file: Path) -> None:
    """Ends the daemon of that pid file: SIGTERM, SIGKILL after 5 s; returns when it has ended."""
    try:
        pid = int(pid_file.read_text())
    except (OSError, ValueError):
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        if _wait_for(lambda: not _lives(pid), 5):
            return


def _lives(pid: int) -> bool:
    """Whether the process runs; one that nobody has waited for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _wait_for(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return true


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


if __name__ == "__main__":
    with cluster(Path(sys.argv[1])) as running:
        print(*(f"export {name}={value}" for name, value in running.environment.items()))
        sys.stdout.flush()
        input()

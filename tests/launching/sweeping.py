"""Sweeps of the fake experiment, in this process or in a launcher of its own.

As a program: python -m tests.launching.sweeping DIR PARALLEL RETRIES RUNS [FLAG=VALUE ...]
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from v4jax.launching import local, processes
from v4jax.launching.plan import make_plan
from v4jax.launching.run_folder import RunFolder
from v4jax.launching.runner import run_plan

ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).with_name("fake_experiment.py")


def plan_of(folder, runs=3, **flags):
    """`runs` runs over --seed, each with the other flags."""
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    return make_plan(str(FAKE), folder, [{"seed": str(seed)} for seed in range(runs)], arguments)


def launcher(folder, parallel=2, retries=2, runs=3, **flags):
    """A launcher in a process of its own, its standard error piped."""
    line = [sys.executable, "-W", "error", "-m", "tests.launching.sweeping", str(folder)]
    line += map(str, (parallel, retries, runs))
    return subprocess.Popen(
        line + [f"{name}={value}" for name, value in flags.items()],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": "glibc.malloc.check=0"},
        stderr=subprocess.PIPE,
        text=True,
    )


def states(plan):
    return [RunFolder(run.folder).read_state() for run in plan.runs]


def workers(folder):
    """The process ids of all starts of all runs below `folder`, in order."""
    lines = [p.read_text().splitlines() for p in sorted(Path(folder).glob("*/starts"))]
    return [int(line.split()[0]) for each in lines for line in each]


def expected(seed, steps):
    """What a run's result is however often it was interrupted."""
    total = 0
    for step in range(1, steps + 1):
        total = 31 * total + step * (1 + seed)
    return {"sum": total}


def wait_for(condition, seconds=20.0):
    """The condition's value once it is true. Raises AssertionError if it never is."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


def disguised_claim(claims, **fields):
    """Rewrites the newest claim of the folder, and returns its path."""
    path = max((p for p in claims.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return path


def alive(pid):
    return processes.start_time(pid) is not None


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


if __name__ == "__main__":
    folder, parallel, retries, runs, *rest = sys.argv[1:]
    plan = plan_of(folder, int(runs), **dict(one.split("=", 1) for one in rest))
    processes.GRACE, local.LEFT_BEHIND = 1.0, 1.0
    try:
        executor = local.Local({}, int(parallel))
        code = run_plan(plan.write(), executor, parallel=int(parallel), retries=int(retries))
    except ValueError as error:
        print(f"launch: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)

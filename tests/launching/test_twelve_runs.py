"""Twelve trainings from BF16 to FP4 on two cores; their launcher and two workers are killed.

What the sweep reports in the end of the runs that were disturbed, and of each pre-training's last
run, is what they report that were made one by one, where there is no pre-training to copy.
"""

import csv
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.launched import ROOT, launched
from tests.launching.sweeping import alive, kill, states, wait_for
from v4jax.launching import processes
from v4jax.launching.plan import read_plan

TINY = "tests/launching/tiny_switch.py"
SWEEPS = ("seed=0:2", "learning_rate=2e-3,5e-3", "qat_start=4,5,6")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(not processes.VISIBLE, reason="needs /proc to see what lives"),
]


def launcher(folder):
    """The sweep's launcher, in a process group of its own."""
    sweeps = [f"--sweep={spec}" for spec in SWEEPS]
    return subprocess.Popen(
        [sys.executable, "launch.py", f"--experiment={TINY}", f"--workdir={folder}", *sweeps,
         "--parallel=2"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
        env=os.environ | {"GLIBC_TUNABLES": "glibc.malloc.check=0"},
    )  # fmt: skip


def steps_made(run):
    return sum(len(p.read_text().splitlines()) for p in run.folder.glob("*/metrics.jsonl"))


def training(folder):
    """(run, process id) of the runs that make steps just now."""
    if not (folder / "sweep.json").exists():
        return []
    plan = read_plan(folder)
    return [
        (run, state.pid)
        for run, state in zip(plan.runs, states(plan), strict=True)
        if state.state == "running" and state.pid and alive(state.pid) and steps_made(run)
    ]


def test_kills_change_no_number(tmp_path):
    folder = tmp_path / "sweep"
    first = launcher(folder)
    killed = []
    for _ in range(2):
        run, pid = wait_for(
            lambda: next((t for t in training(folder) if t[0].name not in killed), None), 300
        )
        os.kill(pid, signal.SIGKILL)
        killed.append(run.name)
        wait_for(lambda p=pid: not alive(p))
    wait_for(lambda: any(s.state == "done" for s in states(read_plan(folder))), 300)
    (run, pid), *_ = wait_for(lambda: training(folder), 300)
    kill(first)
    wait_for(lambda: not alive(pid))
    disturbed = {*killed, run.name}
    assert {s.state for s in states(read_plan(folder))} >= {"done", "running"}

    second = launcher(folder)
    said, _ = second.communicate(timeout=1200)
    assert second.returncode == 0, said
    plan = read_plan(folder)
    found = states(plan)
    assert [state.state for state in found] == ["done"] * 12
    assert sorted(run.name for run, s in zip(plan.runs, found, strict=True) if s.failures) == (
        sorted(killed)
    )

    reported = subprocess.run(
        [sys.executable, "launch.py", "report", folder], cwd=ROOT, capture_output=True, text=True
    )
    assert reported.returncode == 0, reported.stderr
    with open(folder / "report" / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and (folder / "report" / "index.html").exists()

    def alone(run):
        own = [f"--{flag}={value}" for flag, value in run.settings.items()]
        lonely = tmp_path / run.name / "alone"
        made = launched(TINY, f"--workdir={lonely}", *own)
        assert made.returncode == 0, made.stderr
        return json.loads((lonely / "result.json").read_text())

    # Those that were disturbed, and of each pre-training the run that copied it last.
    last = {(run.settings["seed"], run.settings["learning_rate"]): run.name for run in plan.runs}
    assert len(last) == 4
    chosen = [run for run in plan.runs if run.name in disturbed | {*last.values()}]
    with ThreadPoolExecutor(2) as pool:  # two, as there are two cores; each knows of no other
        expected = dict(zip((run.name for run in chosen), pool.map(alone, chosen), strict=True))
    results = []
    for run, row in zip(plan.runs, rows, strict=True):
        assert {flag: row[flag] for flag in run.settings} == run.settings
        results.append(json.loads((run.folder / "result.json").read_text()))
        assert results[-1] == {name: float(row[name]) for name in results[-1]}
        assert results[-1] == expected.get(run.name, results[-1])
    assert len({json.dumps(numbers) for numbers in results}) == 12

"""Sweeps of real processes, killed: nothing is lost, and no run runs twice at a time."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launching.sweeping import (
    alive,
    expected,
    kill,
    launcher,
    states,
    wait_for,
    workers,
)
from v4jax.launching import processes
from v4jax.launching.local import Local
from v4jax.launching.plan import read_plan
from v4jax.launching.run_folder import RunFolder, State

linux = pytest.mark.skipif(not processes.VISIBLE, reason="needs /proc to see what lives")


def finished(folder, steps):
    """Asserts that every run of the sweep is done, with the result of one made in one go."""
    plan = read_plan(folder)
    for run in plan.runs:
        result = json.loads((run.folder / "result.json").read_text())
        assert result == expected(int(run.settings["seed"]), steps)
        assert not (run.folder / "twice").exists()
    assert {state.state for state in states(plan)} == {"done"}
    assert not any(map(alive, workers(folder)))
    return plan


def steps_made(folder):
    return {p.parent.parent.name: len(p.read_text().splitlines())
            for p in folder.glob("*/train/metrics.jsonl")}  # fmt: skip


@linux
def test_workers_die_with_their_launcher_and_its_successor_finishes(tmp_path):
    first = launcher(tmp_path, runs=4, steps=20, seconds=0.05)
    wait_for(lambda: len(steps_made(tmp_path)) == 2)
    running = workers(tmp_path)
    assert len(running) == 2 and all(map(alive, running))
    kill(first)
    wait_for(lambda: not any(map(alive, running)))
    assert not list(tmp_path.glob("*/result.json"))  # they did not just come to their end
    assert {s.state for s in states(read_plan(tmp_path))} == {"running", "pending"}
    second = launcher(tmp_path, runs=4, steps=20, seconds=0.05)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 0, said
    finished(tmp_path, 20)
    assert sum(steps_made(tmp_path).values()) == 4 * 20  # it went on, and did none again


@linux
def test_a_launcher_says_where_its_runs_are(tmp_path):
    process = launcher(tmp_path, runs=2, steps=20, seconds=0.1)
    wait_for(lambda: len(steps_made(tmp_path)) == 2)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "2 running" in said and said.count("/20") >= 2
    finished(tmp_path, 20)


@linux
def test_killed_workers_are_started_again(tmp_path):
    process = launcher(tmp_path, runs=3, steps=20, seconds=0.08)
    for count in (1, 2):
        victim = wait_for(lambda n=count: len(workers(tmp_path)) >= n and workers(tmp_path)[-1])
        wait_for(lambda: steps_made(tmp_path))
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda v=victim: not alive(v))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert said.count("ended by SIGKILL, trying again") == 2
    plan = finished(tmp_path, 20)
    assert sum(state.failures for state in states(plan)) == 2


@linux
def test_what_a_killed_worker_started_does_not_outlive_it(tmp_path):
    """Its child, in a session of its own, has the run's lock: a second start would meet it."""
    process = launcher(tmp_path, runs=1, steps=40, seconds=0.05, child=1, ignore_term=1)
    (worker,) = wait_for(lambda: steps_made(tmp_path) and workers(tmp_path))
    child = int((tmp_path / "seed=0/child").read_text())
    os.kill(worker, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert len(workers(tmp_path)) == 2
    assert not alive(child)
    finished(tmp_path, 40)


@linux
def test_what_a_killed_launcher_left_is_ended_by_its_successor(tmp_path):
    first = launcher(tmp_path, runs=1, steps=40, seconds=0.05, child=1)
    wait_for(lambda: steps_made(tmp_path))
    child = int((tmp_path / "seed=0/child").read_text())
    kill(first)
    assert alive(child)
    second = launcher(tmp_path, runs=1, steps=40, seconds=0.05, child=1)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 0, said
    assert not alive(child)
    finished(tmp_path, 40)


@linux
def test_two_launchers_share_the_runs_and_the_living_takes_the_dead_ones(tmp_path):
    both = [launcher(tmp_path, runs=6, steps=15, seconds=0.15) for _ in range(2)]
    wait_for(lambda: sum(map(alive, workers(tmp_path))) == 4)
    kill(both[0])
    _, said = both[1].communicate(timeout=60)
    assert both[1].returncode == 0, said
    finished(tmp_path, 15)


@linux
def test_a_second_launcher_with_nothing_to_do_says_who_has_it(tmp_path):
    first = launcher(tmp_path, runs=2, steps=1000)
    wait_for(lambda: len(steps_made(tmp_path)) == 2)
    second = launcher(tmp_path, runs=2, steps=1000)
    _, said = second.communicate(timeout=20)
    assert second.returncode == 2
    assert said.splitlines()[-1].startswith(f"launch: --workdir={tmp_path}: another launcher runs")
    assert f"process {first.pid}" in said
    assert all(s.attempt == 1 for s in states(read_plan(tmp_path)))
    kill(first)


@linux
@pytest.mark.parametrize("ignore", [0, 1])
def test_ctrl_c_ends_all_and_the_same_command_goes_on(tmp_path, ignore):
    """Also workers that do not listen to SIGTERM, and what they started."""
    flags = {"steps": 200, "seconds": 0.02, "child": 1, "ignore_term": ignore}  # 4 s
    process = launcher(tmp_path, runs=2, **flags)
    wait_for(lambda: len(steps_made(tmp_path)) == 2)
    children = [int(p.read_text()) for p in tmp_path.glob("*/child")]
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in said and "SIGINT: ending 2 runs" in said
    assert not any(map(alive, workers(tmp_path) + children))
    ended = states(read_plan(tmp_path))
    assert [s.state for s in ended] == ["preempted", "preempted"]
    assert {s.exit for s in ended} == {-signal.SIGKILL if ignore else -signal.SIGTERM}
    again = launcher(tmp_path, runs=2, **flags)
    _, said = again.communicate(timeout=60)
    assert again.returncode == 0, said
    assert {s.failures for s in states(finished(tmp_path, 200))} == {0}


@linux
def test_a_second_ctrl_c_ends_the_launcher_and_the_kernel_its_workers(tmp_path):
    process = launcher(tmp_path, runs=1, steps=1000, ignore_term=1)
    wait_for(lambda: steps_made(tmp_path))
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None and alive(workers(tmp_path)[0])
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT
    process.communicate()
    wait_for(lambda: not any(map(alive, workers(tmp_path))))


@pytest.mark.slow
@linux
def test_twelve_runs_survive_kills_of_the_launcher_and_of_two_workers(tmp_path):
    flags = {"runs": 12, "steps": 30, "seconds": 0.02}
    for kills in range(3):
        process = launcher(tmp_path, **flags)
        wait_for(lambda n=2 * kills + 2: len(workers(tmp_path)) >= n)
        time.sleep(0.3)
        victims = [pid for pid in workers(tmp_path) if alive(pid)][:2]
        for pid in victims if kills else ():
            os.kill(pid, signal.SIGKILL)
        if kills < 2:
            kill(process)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert len(finished(tmp_path, 30).runs) == 12
    assert sum(steps_made(tmp_path).values()) >= 12 * 30


def full_disk(folder):
    """Mounts a file system of 8 MB there; False where that is not allowed."""
    line = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    return subprocess.run(line, capture_output=True).returncode == 0


@linux
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_fills_up_loses_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if not full_disk(disk):
        pytest.skip("mount is not allowed here")
    try:
        process = launcher(disk, runs=2, steps=30, retries=0, seconds=0.02)
        wait_for(lambda: len(steps_made(disk)) == 2)
        with open(disk / "filler", "wb", buffering=0) as filler:
            for size in (1 << 16, 512):
                with contextlib.suppress(OSError):
                    while filler.write(bytes(size)):
                        pass
        _, said = process.communicate(timeout=20)
        assert process.returncode == 2
        assert "Traceback" not in said.splitlines()[-1]
        assert "No space left on device" in said.splitlines()[-1]
        assert not any(map(alive, workers(disk)))
        (disk / "filler").unlink()
        process = launcher(disk, runs=2, steps=30, retries=0, seconds=0.02)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        finished(disk, 30)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


SMALL = """
import sys
from pathlib import Path
from v4jax.launching.local import Local
from v4jax.launching.run_folder import Command, RunFolder
import time
folder = RunFolder(Path(sys.argv[1]), Command(tuple(sys.argv[2:]), "/", {}), 1, "token")
folder.log.parent.mkdir(parents=True)
local = Local({}, 2)
handle = local.start(None, folder)
while (code := local.poll(handle)) is None:
    time.sleep(0.02)
print(code)
"""


def test_a_worker_gets_its_share_of_cores_and_its_log(tmp_path):
    said = "import os; print(sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'])"
    run = subprocess.run(
        [sys.executable, "-c", SMALL, str(tmp_path), sys.executable, "-c", said],
        env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout == "0\n"
    cores = sorted(os.sched_getaffinity(0))
    share = cores[: max(1, len(cores) // 2)]
    log = (tmp_path / "launch/attempts/1/log.txt").read_text()
    assert log == f"{share} {len(share)}\n"


def shares(local):
    return local._cores, local._gpus


def test_cores_and_gpus_are_split_over_the_slots(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 4, 5, 6}, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,3")
    assert shares(Local({}, 2)) == ([[2, 3], [4, 5]], None)
    assert shares(Local({}, 1)) == ([[2, 3, 4, 5, 6]], None)
    assert shares(Local({}, 7))[0] == [[2], [3], [4], [5], [6], [2], [3]]
    assert shares(Local({"cores": "1", "gpus": "1"}, 3)) == (
        [[2], [3], [4]], [["GPU-a"], ["GPU-b"], ["3"]],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("resources", "slots", "message"),
    [
        ({"cores": "3"}, 2, "--cores=3: with --parallel=2 that is 6, but this machine has 5"),
        ({"gpus": "2"}, 2, "--gpus=2: with --parallel=2 that is 4, but this machine has 3"),
        ({"cores": "0"}, 1, "--cores=0: allowed: a whole number from 1 on"),
        ({"gpus": "all"}, 1, "--gpus=all: allowed: a whole number from 1 on"),
        ({"partition": "x"}, 1, "--partition: --executor=local has no such resource; it has "
                                "--cores (cores of each run"),
    ],
)  # fmt: skip
def test_resources_that_are_not_there_are_one_line(monkeypatch, resources, slots, message):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 4, 5, 6}, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(ValueError) as error:
        Local(resources, slots)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_lost_run_is_told(tmp_path):
    from v4jax.launching.status import inspect

    folder = RunFolder(tmp_path)
    folder.write_state(State("running", attempt=1))
    assert inspect("x", tmp_path).state.state == "lost"

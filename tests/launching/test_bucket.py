"""A sweep in a bucket, against a fake of Google Cloud Storage: claims, runs, status, report.

As a program: the launcher of a sweep, `python -m tests.launching.test_bucket FLAGS`.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import launch
from tests.launching.sweeping import ROOT, alive, expected, wait_for
from v4jax.launching import claim, local, page, status
from v4jax.launching.plan import make_plan, read_plan
from v4jax.launching.run_folder import RunFolder
from v4jax.launching.runner import run_plan
from v4jax.training.files import as_path, write_whole

EXPERIMENT = str(Path(__file__).with_name("bucket_experiment.py"))
CLAIMS = "gs://b/run/launch/claims"


def plan_of(runs=2, **flags):
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    settings = [{"seed": str(seed)} for seed in range(runs)]
    return make_plan(EXPERIMENT, "gs://b/sweep", settings, arguments)


def finish(**flags):
    """Runs the sweep of `plan_of(**flags)`, as a launcher of its own does; what that said."""
    line = [sys.executable, "-m", "tests.launching.test_bucket", json.dumps(flags)]
    run = subprocess.run(line, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stderr


@pytest.fixture(autouse=True)
def new_clock():
    claim._ahead.cache_clear()


# ---- claims ----


def test_of_many_claimers_one_has_the_run(cloud):
    taken, folder, start = [], as_path(CLAIMS), threading.Barrier(8)

    def take():
        start.wait()
        taken.append(claim.take(folder))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (mine,) = filter(None, taken)
    assert claim.owner_of(folder) == mine.owner and mine.beat()
    assert claim.take(folder) is None
    mine.release()
    assert claim.owner_of(folder) is None
    second = claim.take(folder)
    assert second is not None and second.beat() and not mine.beat()
    assert cloud.names().count("run/launch/claims/2") == 1


def test_an_owner_elsewhere_is_dead_by_the_bucket_s_clock_alone(cloud):
    cloud.ahead = 7200.0
    folder = as_path(CLAIMS)
    mine = claim.take(folder)
    write_whole(mine.path, claim._encode(dataclasses.replace(mine.owner, machine="another")))
    assert claim.owner_of(folder) is not None  # this machine's clock says two hours ago
    content, made = cloud.buckets["b"]["run/launch/claims/1"]
    for age, lives in ((claim.STALE - 20, True), (claim.STALE + 5, False)):
        then = time.gmtime(time.time() + cloud.ahead - age)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", then)
        cloud.buckets["b"]["run/launch/claims/1"] = content, made | {"updated": stamp}
        assert (claim.owner_of(folder) is not None) is lives
    assert mine.beat()  # which puts it anew
    assert claim.owner_of(folder) is not None
    assert cloud.log.count("POST run/launch/claims/clock") == 1


# ---- sweeps ----


def test_a_sweep_runs_fails_goes_on_and_is_reported(cloud, capsys):
    plan = plan_of(steps=4)
    assert "seed=0: exit code 1, trying again (1 of 1)" in finish(steps=4)
    for seed, run in enumerate(plan.runs):
        assert json.loads((run.folder / "result.json").read_bytes()) == expected(seed, 4)
        state = RunFolder(run.folder).read_state()
        assert (state.state, state.attempt) == ("done", 2 - seed)
        log = run.folder / "launch" / "attempts" / str(state.attempt) / "log.txt"
        assert log.read_text() == f"start {state.attempt}\n"
        command = json.loads((run.folder / "launch" / "command.json").read_bytes())
        assert command["argv"][-1] == f"--workdir=gs://b/sweep/seed={seed}"
    first = plan.runs[0].folder / "launch" / "attempts" / "1" / "log.txt"
    assert first.read_text() == "start 1\nit fails the first time\n"

    finish(runs=3, steps=4)  # one more; those that are done are kept
    assert [RunFolder(run.folder).read_state().attempt for run in plan.runs] == [2, 1]
    assert [run.name for run in read_plan("gs://b/sweep").runs] == ["seed=0", "seed=1", "seed=2"]

    capsys.readouterr()
    assert status.main("gs://b/sweep", as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["counts"] == {"done": 3}
    assert [(run["phase"], run["step"], run["steps"]) for run in told["runs"]] == [
        ("train", 4, 4)
    ] * 3

    assert str(page.write_report("gs://b/sweep")) == "gs://b/sweep/report/index.html"
    there = {name for name in cloud.names() if name.startswith("sweep/report/")}
    assert {"sweep/report/index.html", "sweep/report/runs.csv", "sweep/report/table.csv"} <= there
    csv = cloud.read("sweep/report/runs.csv").decode().splitlines()
    assert csv[0] == "run,state,seed,sum,error"
    assert csv[1] == f"seed=0,done,0,{float(expected(0, 4)['sum'])},"


@pytest.mark.slow
def test_a_killed_launcher_s_successor_finishes(cloud):
    flags = {"steps": 20, "seconds": 0.1}
    line = [sys.executable, "-m", "tests.launching.test_bucket", json.dumps(flags)]
    launcher = subprocess.Popen(line, cwd=ROOT, start_new_session=True)
    done = "sweep/seed=1/train/metrics.jsonl"
    wait_for(lambda: done in cloud.names() and cloud.read(done).count(b"\n") >= 5, 60)
    pids = [RunFolder(run.folder).read_state().pid for run in plan_of().runs]
    assert status.look(status.find_runs(as_path("gs://b/sweep")))[1].progress.step >= 5
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    wait_for(lambda: not any(map(alive, filter(None, pids))))
    lost = [one.state.state for one in status.look(status.find_runs(as_path("gs://b/sweep")))]
    assert "lost" in lost and "done" not in lost
    finish(**flags)
    for seed, run in enumerate(plan_of().runs):
        assert json.loads((run.folder / "result.json").read_bytes()) == expected(seed, 20)


def test_two_launchers_at_once_both_add_their_runs(cloud):
    plans = [
        make_plan(EXPERIMENT, "gs://b/sweep", [{"seed": str(seed)}, {"seed": "9"}])
        for seed in range(4)
    ]
    cloud.fault = lambda request: time.sleep(0.2 * (request == "POST sweep/sweep.json"))
    threads = [threading.Thread(target=plan.write) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {run.name for run in read_plan("gs://b/sweep").runs} == {
        "seed=0", "seed=1", "seed=2", "seed=3", "seed=9",
    }  # fmt: skip


def test_what_cannot_be_ends_in_one_line(cloud, capfd):
    sweep = ["--experiment=bf16_to_fp4", "--workdir=gs://other/x", "--sweep", "seed=0:2"]
    for words, line in (
        (["status", "gs://b/none"], "status gs://b/none: there is no such folder; give the --wor"),
        (["report", "gs://b/none"], "gs://b/none: holds no sweep"),
        (["status", "s3://b/none"], "--workdir=s3://b/none: allowed: a folder, or gs://BUCKET/P"),
        (
            sweep,
            "--workdir=gs://other/x: cannot be written: gs://other/x/launch/claims/1: there is",
        ),
    ):
        assert launch.main(words) == 2
        said = capfd.readouterr()
        assert said.out == "" and said.err.startswith(f"launch: {line}"), said.err
        assert said.err.count("\n") == 1


if __name__ == "__main__":
    planned = plan_of(**json.loads(sys.argv[1])).write()
    sys.exit(run_plan(planned, local.Local({}, 2), parallel=2, retries=1))

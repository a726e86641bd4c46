"""Sweeps as Slurm jobs: the files that go to sbatch, and a real Slurm that runs them.

The cluster is one of `slurm_cluster`; without its packages these tests are skipped, or fail where
REQUIRE_SLURM=1.
"""

import functools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.launching import counting, slurm_cluster, sweeping
from tests.launching.sweeping import disguised_claim
from v4jax.launching import claim, slurm, slurm_job, slurm_script
from v4jax.launching.plan import make_plan
from v4jax.launching.run_folder import Command, RunFolder

EXPERIMENT = Path(counting.__file__)
TRAINING = EXPERIMENT.with_name("tiny_training.py")  # not imported: its flags would be ours


# ---- the files ----


def folders(*names, sweep="/runs/switch", directory="/home/me", environment=None):
    return [
        RunFolder(
            Path(sweep, name),
            Command(("python", "launch.py", f"--{name}"), directory, environment or {}, "/x.py"),
        )
        for name in names
    ]


def test_the_batch_script_is_this_one():
    resources = {"partition": "gpu", "nodes": "2", "tasks_per_node": "4", "gpus_per_node": "h100:4"}
    resources |= {"time": "4:00:00", "memory": "0", "setup": "module load cuda"}
    resources |= {"sbatch": "--exclude=n7 --mail-type=END"}
    slurm.Slurm(resources, 3)  # takes them
    submission = Path("/runs/switch/slurm/1")
    files = slurm_script.files(resources, 3, submission, folders("seed=0", "seed=1"), retries=2)
    assert files["runs.txt"] == (
        "/runs/switch/seed=0 python launch.py --seed=0\n"
        "/runs/switch/seed=1 python launch.py --seed=1\n"
    )
    name = f"switch.1.{slurm_script.job_name(submission)[-8:]}"
    assert (
        files["runs.sbatch"]
        == f"""\
#!/bin/bash
# Runs of a sweep, one a task of the array: task N is line N of runs.txt. Written by launch.py.
#SBATCH --job-name={name}
#SBATCH --array=1-2%3
#SBATCH --chdir=/home/me
#SBATCH --output=/runs/switch/slurm/1/%A_%a.txt
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=h100:4
#SBATCH --mem=0
#SBATCH --time=4:00:00
#SBATCH --signal=TERM@120
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --exclude=n7
#SBATCH --mail-type=END

trap : TERM  # this shell goes on to the end: whether the job runs again is decided there
module load cuda
eval "set -- $(sed -n "$SLURM_ARRAY_TASK_ID"p /runs/switch/slurm/1/runs.txt)"  # folder, command
folder=$1
shift
PYTHONPATH={slurm.ROOT}${{PYTHONPATH:+:$PYTHONPATH}} \\
    {sys.executable} -P -m v4jax.launching.slurm_job --retries=2 --source=/x.py "$folder" \\
    srun --kill-on-bad-exit=0 --wait=60 --input=none --label -- "$@"
code=$?

# 75: a checkpoint is written. A job that Slurm is ending, cancelled or for another, is not RUNNING.
job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
if [ $code = 75 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt 100 ] &&
    [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ]; then
    scontrol requeue "$job" && sleep 60  # Slurm ends this script meanwhile
fi
exit $code
"""
    )


def test_a_sweep_in_a_bucket_is_refused_in_one_line():
    plan = make_plan("bf16_to_fp4", "gs://b/switch", [{"seed": "0"}])
    for ask in (
        slurm.Slurm({}, 1).preview,
        lambda plan: slurm.submit_plan(plan, slurm.Slurm({}, 1), 0),
    ):
        with pytest.raises(ValueError, match="^--workdir=gs://b/switch: allowed with --exec.*$"):
            ask(plan)


def test_the_preview_is_what_submit_would_write(tmp_path):
    plan = make_plan(str(EXPERIMENT), tmp_path / "sweep", [{"seed": "0"}, {"seed": "1"}])
    shown = slurm.Slurm({"partition": "gpu"}, 2).preview(plan)
    assert "#SBATCH --array=1-2%2\n" in shown and "#SBATCH --partition=gpu\n" in shown
    assert shlex.join(slurm.command(plan, plan.runs[1]).argv) in shown
    assert not plan.workdir.exists()


@hypothesis.given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\n"))))
@hypothesis.settings(max_examples=25)
def test_bash_reads_a_line_of_runs_as_the_command_it_was(words):
    folder = RunFolder(Path("/a b"), Command(tuple(["python", *words]), "/", {"A": "1 2"}))
    program = 'eval "set -- $1"; printf "%s\\0" "$@"'
    line = slurm_script._line(folder).removesuffix("\n")
    read = subprocess.run(["bash", "-c", program, "-", line], capture_output=True).stdout
    assert read.decode().split("\0")[:-1] == ["/a b", "env", "A=1 2", "python", *words]


def test_a_line_end_in_a_value_is_refused():
    with pytest.raises(ValueError, match="line end"):
        slurm_script._line(RunFolder(Path("/r"), Command(("python", "--text=a\nb"), "/", {})))


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"gpu": "1"}, "--gpu: --executor=slurm has no such resource"),
        ({"nodes": "two"}, "--nodes=two: allowed: a whole number"),
        ({"nodes": "0"}, "--nodes=0: allowed: a whole number"),
        ({"time": "4h"}, "--time=4h: allowed: minutes"),
        ({"time": "2"}, "--time=2: allowed: more than --lead=120 seconds"),
        ({"time": "1:30", "lead": "90"}, "--time=1:30: allowed: more than --lead=90"),
        ({"memory": "64GB"}, "--memory=64GB: allowed: a number"),
        ({"partition": "gpu\n#SBATCH --uid=0"}, "allowed: a name"),
        ({"setup": "a\nb"}, "allowed: one line"),
        ({"sbatch": "n7"}, "--sbatch=n7: allowed: options"),
    ],
)
def test_a_wrong_resource_ends_in_one_line(resources, words):
    with pytest.raises(ValueError) as caught:
        slurm.Slurm(resources, 1)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_line_on_an_unknown_resource_lists_those_there_are():
    with pytest.raises(ValueError) as caught:
        slurm.Slurm({"gpu": "1"}, 1)
    assert all(f"--{name} (" in str(caught.value) for name in slurm.Slurm.RESOURCES)


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("5", 300),
        ("1:30", 90),
        ("1:00:01", 3601),
        ("2-00", 172800),
        ("1-1", 90000),
        ("0-0:10", 600),
        ("0-0:0:5", 5),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(limit, seconds):
    assert slurm_script.seconds(limit) == seconds


# ---- Slurm's answers ----


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Makes a shell script of that name be what is found, and nothing else of Slurm."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin-without-slurm")
    (tmp_path / "bin").mkdir()

    def make(name, script):
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return make


def handle_of(folder, **state):
    (folder / "launch").mkdir(parents=True)
    (folder / "launch" / "state.json").write_text(json.dumps(state))
    return slurm.Handle("7_1", folder)


@pytest.mark.parametrize(
    ("scontrol", "sacct", "state", "code"),
    [
        ("JobState=FAILED Reason=x Restarts=0 ExitCode=3:0", None, "running", 3),
        ("JobState=COMPLETED Reason=None ExitCode=0:0", None, "running", 0),
        ("JobState=FAILED Reason=None ExitCode=0:9", None, "running", 137),
        (None, "TIMEOUT|0:0", "running", 124),
        (None, "CANCELLED by 0|0:15", "preempted", 143),
        (None, "NODE_FAIL|1:0", "running", 75),
        (None, "FAILED|1:0", "done", 0),  # the run's own word counts
        (None, None, "preempted", 75),
        (None, None, "running", 1),
        ("JobState=PENDING Reason=None ExitCode=0:0", None, "running", None),  # squeue was older
    ],
)
def test_a_job_out_of_the_queue_has_an_exit_code(programs, tmp_path, scontrol, sacct, state, code):
    programs("squeue", "exit 0")
    programs("scontrol", f"echo '{scontrol}'" if scontrol else "echo Invalid job id >&2; exit 1")
    programs("sacct", f"echo '{sacct}'" if sacct else "echo disabled >&2; exit 1")
    handle = handle_of(tmp_path / "run", state=state, job="7_1", exit=0)
    assert slurm.Slurm({}, 1).poll(handle) == code


def test_what_an_earlier_job_left_says_nothing_of_this_one(programs, tmp_path):
    programs("squeue", "echo '7_1|x'")
    executor = slurm.Slurm({}, 1)
    assert executor.poll(handle_of(tmp_path / "run", state="failed", job="6_1", exit=1)) is None


def test_a_silent_controller_is_told_of_once_and_jobs_go_on(programs, tmp_path, capsys):
    programs("squeue", "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1")
    executor = slurm.Slurm({}, 1)
    handle = handle_of(tmp_path / "run", state="running", job="7_1")
    assert [executor.poll(handle) for _ in range(3)] == [None] * 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "squeue failed: slurm_load_jobs error" in lines[0]
    (tmp_path / "run/launch/state.json").write_text(json.dumps({"state": "done", "job": "7_1"}))
    assert executor.poll(handle) == 0


def test_without_slurm_there_is_one_line(programs, tmp_path):
    plan = make_plan(str(EXPERIMENT), tmp_path / "sweep", [{"seed": "0"}])
    with pytest.raises(ValueError, match="squeue is not on this machine"):
        slurm.submit_plan(plan, slurm.Slurm({}, 1), retries=0)


def test_a_command_that_hangs_is_given_up(programs, monkeypatch):
    programs("sbatch", "exec /bin/sleep 60")
    monkeypatch.setattr(slurm, "TIMEOUT", 0.3)
    with pytest.raises(ValueError, match="sbatch got no answer from Slurm's controller in 0.3 s"):
        slurm._ask(["sbatch"])


# ---- the job ----


def claimed(folder, **fields):
    """A claim of this process, disguised by other fields."""
    folder.claims.mkdir(parents=True)
    taken = claim.take(folder.claims)
    disguised_claim(folder.claims, **fields)
    return taken


def test_a_job_that_was_put_back_waits_until_its_former_life_counts_as_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "STALE", 1.0)
    monkeypatch.setattr(claim, "BEAT", 0.2)
    folder = RunFolder(tmp_path)
    claimed(folder, machine="another")
    assert slurm_job._take(folder) is None  # a new job does not wait: somebody may well run it
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert slurm_job._take(folder).owner.machine != "another"


def test_a_job_that_lost_its_claim_ends_its_tasks_and_leaves_the_state_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "STALE", 0.0)
    monkeypatch.setattr(claim, "BEAT", 0.1)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    folder = RunFolder(tmp_path)
    mine = claimed(folder, machine="another")
    theirs = claim.take(folder.claims)
    written = []
    monkeypatch.setattr(RunFolder, "write_state", lambda self, state: written.append(state.state))
    assert slurm_job._attempts(folder, mine, ["sleep", "60"], 0, []) == 1
    assert written == ["running"]
    assert theirs.beat()


# ---- a real Slurm ----


@pytest.fixture(scope="session")
def real_cluster(tmp_path_factory):
    try:
        with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as cluster:
            yield cluster
    except slurm_cluster.Unavailable as error:
        if os.environ.get("REQUIRE_SLURM") == "1":
            raise
        pytest.skip(f"no Slurm here: {error}")


@pytest.fixture
def cluster(real_cluster, monkeypatch):
    """The cluster, idle, that this process's Slurm commands talk to."""
    for name, value in real_cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    monkeypatch.setattr(slurm, "FRESH", 0.2)
    real_cluster.run("scancel", "--user=root")
    wait_for(lambda: not real_cluster.run("squeue", "-h").strip())
    real_cluster.wait_until_idle()
    return real_cluster


wait_for = functools.partial(sweeping.wait_for, seconds=30.0)


def sweep(folder, runs=1, **flags):
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    return make_plan(
        str(EXPERIMENT), folder, [{"seed": str(seed)} for seed in range(runs)], arguments
    )


def submitted(plan, executor, retries=0):
    said = slurm.submit_plan(plan, executor, retries)
    jobs = executor.queued(plan.workdir)
    return said, [slurm.Handle(jobs[run.folder], run.folder) for run in plan.runs]


def end(executor, handles, seconds=40.0):
    """The exit codes, once all have one."""
    wait_for(lambda: all(executor.poll(handle) is not None for handle in handles), seconds=seconds)
    return [executor.poll(handle) for handle in handles]


def states(plan):
    return [RunFolder(run.folder).read_state() for run in plan.runs]


def events(run):
    """(event, step, time), in order, of a run."""
    lines = (run.folder / "events.txt").read_text().split("\n")[:-1]
    return [(name, int(step), float(at)) for name, step, at in map(str.split, lines)]


def value(run):
    return json.loads((run.folder / "result.json").read_text())["value"]


def begun(plan):
    """Waits until all runs count."""
    wait_for(lambda: all((run.folder / "checkpoint.json").exists() for run in plan.runs))


def preempt(cluster):
    """A job of a higher partition that needs both nodes; returns when it has ended."""
    high = ("srun", "-p", "high", "-N2", "--exclusive", "--immediate=40", "true")
    cluster.run(*high, timeout=60)


def test_a_sweep_is_one_array_of_so_many_jobs_at_a_time(cluster, tmp_path):
    plan = sweep(tmp_path / "a sweep", runs=4, steps=20, pause=0.05, text="it's $HOME, *")
    executor = slurm.Slurm({"time": "5"}, 2)
    said, handles = submitted(plan, executor)
    array = handles[0].job.partition("_")[0]
    assert said == f"submitted 4 of 4 runs as job {array}"
    assert [handle.job for handle in handles] == [f"{array}_{n}" for n in range(1, 5)]
    assert end(executor, handles) == [0] * 4
    assert [value(run) for run in plan.runs] == [counting.result(20, seed) for seed in range(4)]
    for state, handle in zip(states(plan), handles, strict=True):
        assert (state.state, state.attempt, state.exit) == ("done", 1, 0)
        assert (state.executor, state.job) == ("slurm", handle.job)
    spans = [(events(run)[0][2], events(run)[-1][2]) for run in plan.runs]
    assert max(sum(a <= at <= b for a, b in spans) for at, _ in spans) == 2
    log = (plan.runs[0].folder / "launch/attempts/1/log.txt").read_text()
    assert log.splitlines()[-1] == """process 0 of 1, "it's $HOME, *\""""
    record = json.loads((plan.runs[3].folder / "launch/command.json").read_text())
    assert record["argv"] == list(slurm.command(plan, plan.runs[3]).argv)
    assert (plan.runs[3].folder / "launch/experiment.py").read_text() == EXPERIMENT.read_text()
    assert slurm.submit_plan(plan, executor, 0) == "submitted 0 of 4 runs; 4 are done"


def test_the_script_can_be_submitted_again_by_hand(cluster, tmp_path):
    plan = sweep(tmp_path / "sweep", runs=2)
    executor = slurm.Slurm({}, 2)
    end(executor, submitted(plan, executor)[1])
    for run in plan.runs:
        (run.folder / "launch/state.json").unlink()
        (run.folder / "result.json").unlink()
    script = str(plan.workdir / "slurm/1/runs.sbatch")
    job = cluster.run("sbatch", "--parsable", "--array=2", script).strip()
    handle = slurm.Handle(f"{job}_2", plan.runs[1].folder)
    assert end(executor, [handle]) == [0]
    assert value(plan.runs[1]) == counting.result(10, 1)
    assert not (plan.runs[0].folder / "result.json").exists()


def test_several_tasks_a_job(cluster, tmp_path):
    plan = sweep(tmp_path / "sweep")
    executor = slurm.Slurm({"nodes": "2", "tasks_per_node": "2", "cpus_per_task": "1"}, 1)
    assert end(executor, submitted(plan, executor)[1]) == [0]
    log = (plan.runs[0].folder / "launch/attempts/1/log.txt").read_text().splitlines()
    ours = sorted(line for line in log if ": process " in line)
    assert ours == [f"{n}: process {n} of 4, ''" for n in range(4)]


def test_a_dead_task_ends_the_job_although_the_others_hang(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm_script, "PEERS", 2)
    plan = sweep(tmp_path / "sweep", steps=10000, pause=0.05, dies=1, ignore_term="yes")
    executor = slurm.Slurm({"nodes": "2"}, 1)
    _, (handle,) = submitted(plan, executor)
    assert end(executor, [handle], 25) == [137]
    state = states(plan)[0]
    assert (state.state, state.failures) == ("failed", 1)
    assert "task 1: Exited with exit code 1" in state.error


def test_a_failed_run_is_tried_again_and_bad_input_is_not(cluster, tmp_path):
    failing, refused = sweep(tmp_path / "1", exit=3), sweep(tmp_path / "2", exit=2)
    executor = slurm.Slurm({}, 2)
    handles = [submitted(plan, executor, retries=2)[1][0] for plan in (failing, refused)]
    assert end(executor, handles) == [3, 2]
    (one,), (two,) = states(failing), states(refused)
    assert (one.state, one.attempt, one.failures, one.exit) == ("failed", 3, 3, 3)
    assert "leaving with 3" in one.error.splitlines()
    assert (two.state, two.attempt, two.failures, two.exit) == ("failed", 1, 1, 2)
    # Another start of the sweep tries again, from the start of its tries.
    assert end(executor, submitted(failing, executor, retries=1)[1]) == [3]
    assert (states(failing)[0].attempt, states(failing)[0].failures) == (5, 2)


def test_a_cancelled_run_stays_so_and_goes_on_when_submitted_again(cluster, tmp_path):
    plan = sweep(tmp_path / "sweep", steps=60, pause=0.05)
    executor = slurm.Slurm({}, 1)
    _, (handle,) = submitted(plan, executor)
    begun(plan)
    executor.stop(handle)
    assert end(executor, [handle]) == [143]
    assert states(plan)[0].state == "preempted"
    time.sleep(1)
    assert cluster.run("squeue", "-h") == ""  # it was not put back
    said, handles = submitted(plan, executor)
    assert said.startswith("submitted 1 of 1 runs")
    assert end(executor, handles) == [0]
    assert value(plan.runs[0]) == counting.result(60)
    assert [name for name, *_ in events(plan.runs[0])] == ["begin", "saved", "begin", "end"]


def test_a_waiting_run_can_be_cancelled(cluster, tmp_path):
    plan = sweep(tmp_path / "sweep", runs=2, steps=40, pause=0.05)
    executor = slurm.Slurm({}, 1)
    _, handles = submitted(plan, executor)
    begun_first = plan.runs[0].folder / "checkpoint.json"
    wait_for(begun_first.exists)
    executor.stop(handles[1])
    assert end(executor, handles) == [0, 143]
    assert states(plan)[1].attempt == 0


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [1, 2])
def test_a_preempted_run_goes_on_exactly_where_it_was(cluster, tmp_path, tasks):
    plan = sweep(tmp_path / "sweep", steps=60, pause=0.05)
    executor = slurm.Slurm({"nodes": str(tasks)}, 1)
    _, (handle,) = submitted(plan, executor)
    begun(plan)
    preempt(cluster)
    assert executor.poll(handle) is None  # the job is in the queue, under its id
    assert states(plan)[0].state == "preempted"
    assert end(executor, [handle]) == [0]
    assert value(plan.runs[0]) == counting.result(60)
    (_, first, _), (_, saved, _), (_, again, _), (_, last, _) = events(plan.runs[0])
    assert (first, again, last) == (0, saved, 60) and 0 < saved < 60
    state = states(plan)[0]
    assert (state.state, state.attempt, state.failures) == ("done", 2, 0)
    assert state.job == handle.job


@pytest.mark.slow
def test_a_run_that_does_not_obey_is_killed_and_goes_on_from_its_checkpoint(cluster, tmp_path):
    plan = sweep(tmp_path / "sweep", steps=500, pause=0.05, ignore_term="yes")
    executor = slurm.Slurm({}, 1)
    _, (handle,) = submitted(plan, executor)
    begun(plan)
    preempt(cluster)
    assert executor.poll(handle) is None
    cluster.run("scontrol", "update", "job=" + handle.job, "StartTime=now")
    assert end(executor, [handle], 60) == [0]
    assert value(plan.runs[0]) == counting.result(500)
    assert states(plan)[0].attempt == 2


@pytest.mark.slow
def test_a_run_longer_than_the_time_limit_is_several_lives_of_one_job(cluster, tmp_path):
    plan = sweep(tmp_path / "sweep", steps=500, pause=0.05)
    executor = slurm.Slurm({"time": "1", "lead": "45"}, 1)
    _, (handle,) = submitted(plan, executor)
    assert end(executor, [handle], 120) == [0]
    assert value(plan.runs[0]) == counting.result(500)
    assert states(plan)[0].attempt >= 2


def test_the_job_goes_on_without_its_launcher_and_is_found_again(cluster, tmp_path):
    plan = sweep(tmp_path / "sweep", runs=2, steps=60, pause=0.05)
    program = f"""
import os, signal
from tests.launching import test_slurm as here
from v4jax.launching import slurm
from pathlib import Path
plan = here.sweep(Path({str(plan.workdir)!r}), runs=2, steps=60, pause=0.05)
ask = slurm._ask
def killed(words):
    answer = ask(words)
    if words[0] == "sbatch":
        os.kill(os.getpid(), signal.SIGKILL)
    return answer
slurm._ask = killed
slurm.submit_plan(plan, slurm.Slurm({{}}, 2), 0)
"""
    died = subprocess.run([sys.executable, "-c", program], cwd=slurm.ROOT).returncode
    assert died == -signal.SIGKILL
    executor = slurm.Slurm({}, 2)
    said, handles = submitted(plan, executor)
    assert said == "submitted 0 of 2 runs; 2 wait or run already"
    assert end(executor, handles) == [0, 0]
    assert [value(run) for run in plan.runs] == [counting.result(60, seed) for seed in (0, 1)]
    assert [state.attempt for state in states(plan)] == [1, 1]


def test_a_run_that_somebody_runs_is_left_alone(cluster, tmp_path):
    plan = sweep(tmp_path / "sweep", steps=60, pause=0.05)
    executor = slurm.Slurm({}, 1)
    _, (handle,) = submitted(plan, executor)
    begun(plan)
    script = str(plan.workdir / "slurm/1/runs.sbatch")
    job = cluster.run("sbatch", "--parsable", script).strip()
    second = slurm.Handle(f"{job}_1", handle.folder)
    assert end(executor, [second, handle])[1] == 0
    text = (plan.workdir / "slurm/1" / f"{second.job}.txt").read_text()
    assert "runs it" in text
    assert (states(plan)[0].attempt, states(plan)[0].job) == (1, handle.job)
    assert value(plan.runs[0]) == counting.result(60)


@pytest.mark.slow
def test_a_controller_that_is_down_ends_in_one_line(cluster, tmp_path, monkeypatch):
    plan = sweep(tmp_path / "sweep", steps=40, pause=0.05)
    executor = slurm.Slurm({}, 1)
    _, (handle,) = submitted(plan, executor)
    begun(plan)
    cluster.stop_controller()
    try:
        monkeypatch.setattr(slurm, "TIMEOUT", 2.0)
        for act in (
            lambda: slurm.Slurm({}, 1).submit([RunFolder(tmp_path / "r", slurm_command())], 0),
            lambda: slurm.submit_plan(plan, slurm.Slurm({}, 1), 0),
            lambda: executor.stop(handle),
        ):
            with pytest.raises(ValueError, match="no answer from Slurm's controller in 2 s") as e:
                act()
            assert "\n" not in str(e.value)
        assert wait_for(lambda: executor.poll(handle) is not None)  # the run says so itself
        assert value(plan.runs[0]) == counting.result(40)
    finally:
        cluster.start_controller()
        cluster.wait_until_idle(60)
    assert executor.poll(handle) == 0


def slurm_command():
    return Command((sys.executable, "-c", "pass"), "/", {})


def test_slurm_s_own_reason_for_a_refusal_is_shown(cluster, tmp_path):
    plan = sweep(tmp_path / "sweep")
    with pytest.raises(ValueError, match=r"sbatch failed: .*(?i:invalid partition)"):
        slurm.submit_plan(plan, slurm.Slurm({"partition": "none"}, 1), 0)
    shlex.split((plan.workdir / "slurm/1/runs.txt").read_text())  # the files stay, to be looked at


@pytest.mark.slow
def test_two_tasks_train_together_and_after_a_preemption_end_with_the_same_bits(
    cluster, tmp_path, monkeypatch
):
    """JAX finds the tasks by Slurm's environment; the address, as virtual nodes have no names."""
    steps, saved = 16, []
    executor = slurm.Slurm({"nodes": "2", "tasks_per_node": "1"}, 1)
    for name, pause in (("whole", 0.0), ("preempted", 0.5)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
        flags = [f"--steps={steps}", f"--pause={pause}"]
        plan = make_plan(str(TRAINING), tmp_path / name, [{}], flags)
        _, handles = submitted(plan, executor)
        train = plan.runs[0].folder / "train"
        if name == "preempted":
            wait_for(lambda: (train / "checkpoints/4").exists(), seconds=120)  # noqa: B023
            preempt(cluster)
        assert end(executor, handles, 240) == [0]
        record = json.loads((train / f"checkpoints/{steps}/record.json").read_text())
        saved.append({path: leaf["crc32"] for path, leaf in record["leaves"].items()})
        assert states(plan)[0].attempt == 1 + (name == "preempted")
    assert saved[0] == saved[1]
    lines = [json.loads(line) for line in (train / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))

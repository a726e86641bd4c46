"""launch.py: what it lists, refuses, sets and passes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from v4jax.launching import experiments
from v4jax.launching import sweep as sweeps

ROOT = Path(__file__).resolve().parents[1]


def run_launch(*arguments, **options):
    environ = {"JAX_PLATFORMS": "cpu"} | options.pop("environ", {})
    keep = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *map(str, arguments)],
        env=keep | environ, capture_output=True, text=True, timeout=60, **options,
    )  # fmt: skip


@pytest.fixture
def probe(tmp_path):
    """An experiment that reports what it was given, and exits with 7."""
    path = tmp_path / "probe.py"
    path.write_text(
        "import json, os, sys, v4jax\n"
        "print(json.dumps({'argv': sys.argv[1:], 'tunables': os.environ.get('GLIBC_TUNABLES')}))\n"
        "sys.exit(7)\n"
    )
    return path


def test_help_names_the_experiments():
    run = run_launch("--help")
    assert run.returncode == 0
    assert "--experiment=NAME" in run.stdout
    for path in (ROOT / "experiments").glob("[!_]*.py"):
        assert path.stem in run.stdout


def test_the_sweeps_that_help_shows_are_what_it_says():
    shown = run_launch("--help").stdout
    specs = re.findall(r'--sweep "([^"()]+)"', shown)
    assert [len(sweeps.expand([spec])) for spec in specs] == [2, 3, 2, 3]
    assert sweeps.expand([specs[-1]]) == [{"scopes": text} for text in ("a,b", "a", "")]
    assert "Exit codes: 0, all" in shown


def test_a_missing_experiment_lists_those_there_are():
    run = run_launch("--workdir=runs/x")
    assert run.returncode == 2
    assert "--experiment=NAME is missing" in run.stderr
    assert "bf16_to_fp4" in run.stderr


def test_a_misspelt_experiment_gets_a_suggestion_in_one_line():
    run = run_launch("--experiment=bf16_to_f4")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.count("\n") == 1
    assert "did you mean bf16_to_fp4?" in run.stderr


def test_a_missing_file_is_refused_in_one_line(tmp_path):
    run = run_launch(f"--experiment={tmp_path}/none.py")
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "none.py" in run.stderr


def test_flags_pass_unchanged_and_the_exit_code_comes_back(probe, tmp_path):
    run = run_launch(
        "--workdir", "a b", "--experiment", probe, "--noqat", "-1", "--x=", cwd=tmp_path
    )
    assert run.returncode == 7, run.stderr
    assert json.loads(run.stdout)["argv"] == ["--workdir", "a b", "--noqat", "-1", "--x="]


def test_help_of_an_experiment_is_the_experiments_own(probe):
    run = run_launch(f"--experiment={probe}", "--help")
    assert json.loads(run.stdout)["argv"] == ["--help"]


def test_an_experiment_by_name_runs_as_a_module_of_ours():
    assert experiments.command_line("bf16_to_fp4", ["--quick"])[1:] == [
        "-P",
        "-m",
        "experiments.bf16_to_fp4",
        "--quick",
    ]


def test_a_signal_reaches_the_experiment(tmp_path):
    """The launcher's process becomes the experiment's: killing the one cannot orphan the other."""
    path = tmp_path / "sleeper.py"
    path.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    with subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), f"--experiment={path}"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == process.pid
        process.terminate()
        assert process.wait(timeout=30) == -signal.SIGTERM


GLIBC = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {}) and experiments.huge_pages(
    {"JAX_PLATFORMS": "cpu"}
)


@pytest.mark.skipif(not GLIBC, reason="huge pages are set with glibc 2.35 or newer only")
def test_huge_pages_are_set_and_said(probe):
    run = run_launch(f"--experiment={probe}")
    assert json.loads(run.stdout)["tunables"] == "glibc.malloc.hugetlb=1"
    assert "glibc.malloc.hugetlb=1" in run.stderr


@pytest.mark.parametrize(
    "environ", [{"GLIBC_TUNABLES": "glibc.malloc.perturb=1"}, {"JAX_PLATFORMS": "cuda"}]
)
def test_huge_pages_leave_a_users_setting_and_accelerators_alone(probe, environ):
    run = run_launch(f"--experiment={probe}", environ=environ)
    assert json.loads(run.stdout)["tunables"] == environ.get("GLIBC_TUNABLES")
    assert run.stderr == ""


SWEPT = """
import json, pathlib
from absl import app, flags
WORKDIR = flags.DEFINE_string("workdir", None, "", required=True)
SEED = flags.DEFINE_integer("seed", 0, "")
RATE = flags.DEFINE_float("learning_rate", 0.1, "", 0)
WORD = flags.DEFINE_string("word", "", "")

def describe():
    return {"parameters": 1000 * (1 + SEED.value)}

def pairs():
    return [{"seed": 5, "learning_rate": 0.5}, {"seed": 6}]

def main(argv):
    folder = pathlib.Path(WORKDIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps({"loss": SEED.value + RATE.value}))
    with open(folder / "starts", "a") as file:
        file.write("started")

if __name__ == "__main__":
    app.run(main)
"""


@pytest.fixture
def sweep(tmp_path):
    """Starts a sweep of a small experiment in tmp_path / "runs"."""
    (tmp_path / "swept.py").write_text(SWEPT)

    def start(*arguments, workdir="runs"):
        environ = {"GLIBC_TUNABLES": "glibc.malloc.check=0"}
        known = [f"--experiment={tmp_path}/swept.py", f"--workdir={tmp_path / workdir}"]
        return run_launch(*known, *arguments, environ=environ, cwd=tmp_path)

    return start


STUDY = SWEPT.replace(
    "def pairs",
    """def runs():
    return [{"seed": seed} for seed in range(2 if RATE.value == 0.5 else 3)]

def report(workdir):
    found = sorted(path.parent.name for path in workdir.glob("*/result.json"))
    print("reported", *found)
    if WORD.default == "bad":
        raise ValueError("no losses")

SWEEP = "runs()"

def pairs""",
)


@pytest.fixture
def study(tmp_path):
    """Starts a study, an experiment with a sweep and a report of its own; text -> other text."""

    def start(*arguments, changed=("", ""), workdir="runs", **options):
        (tmp_path / "own.py").write_text(STUDY.replace(*changed))
        environ = {"GLIBC_TUNABLES": "glibc.malloc.check=0"}
        known = [f"--experiment={tmp_path}/own.py", f"--workdir={tmp_path / workdir}"]
        return run_launch(*known, *arguments, environ=environ, cwd=tmp_path, **options)

    return start


def test_a_study_runs_its_own_sweep_resumes_it_and_reports_when_all_are_done(study, tmp_path):
    run = study(
        "--parallel=2", "--retries=0", changed=("SEED.value + RATE.value", "1 / (SEED.value - 1)")
    )
    assert run.returncode == 1, run.stderr  # seed 1 fails: no report
    assert "reported" not in run.stdout and len(results(tmp_path / "runs")) == 2
    run = study()
    assert (run.returncode, run.stdout) == (0, "reported seed=0 seed=1 seed=2\n"), run.stderr
    assert (tmp_path / "runs" / "seed=0" / "starts").read_text() == "started"
    run = run_launch("report", tmp_path / "runs")
    assert run.returncode == 0 and run.stdout.endswith(
        "index.html\nreported seed=0 seed=1 seed=2\n"
    )
    (tmp_path / "own.py").unlink()
    assert run_launch("report", tmp_path / "runs").returncode == 0


def test_the_sweep_of_a_study_depends_on_its_flags_and_another_may_be_asked_for(study, tmp_path):
    run = study("--learning_rate=0.5", "--dry_run")
    assert run.returncode == 0 and run.stdout.startswith("2 runs of ") and "seed=1" in run.stdout
    assert not (tmp_path / "runs").exists()
    run = study("--sweep=seed=4", "--executor=in_process")
    assert (run.returncode, run.stdout) == (0, "reported seed=4\n"), run.stderr
    run = study("--single", "--seed=7", workdir="one")
    assert (run.returncode, run.stdout) == (0, "")
    assert json.loads((tmp_path / "one" / "result.json").read_text()) == {"loss": 7.1}
    assert "--workdir" in study("--help").stdout


def test_a_finished_study_takes_more_runs_by_a_flag_that_grows_it(study, tmp_path):
    grows = {"changed": ('SWEEP = "runs()"', 'SWEEP = "runs()"\nGROWING = ("learning_rate",)')}
    kept = lambda: json.loads((tmp_path / "runs" / "sweep.json").read_text())["fixed"]  # noqa: E731
    assert study("--learning_rate=0.5", **grows).stdout == "reported seed=0 seed=1\n"
    run = study("--learning_rate=0.25", **grows)
    assert run.stdout == "reported seed=0 seed=1 seed=2\n", run.stderr
    assert (tmp_path / "runs" / "seed=0" / "starts").read_text() == "started"
    assert kept() == ["--learning_rate=0.25"]  # the command that makes all of it
    assert study("--learning_rate=0.5", **grows).returncode == 0
    assert kept() == ["--learning_rate=0.25"]
    refused = study("--learning_rate=0.25", "--word=x", **grows)
    assert refused.returncode == 2 and "--word=x; give the same flags" in refused.stderr
    assert "learning_rate" not in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "changed", "code", "what"),
    [
        (["--seed=3"], ("", ""), 2, "launch: --seed: is in a --sweep too; give it once; --single"),
        ([], ('"runs()"', "runs()"), 2, "SWEEP is runs(); allowed: the text of a --sweep, such"),
        ([], ('"word", ""', '"word", "bad"'), 1, "own: report: no losses"),
        ([], ('"runs()"', '"other()"'), 2, "has no function other"),
        (["--sead=3"], ("", ""), 2, "did you mean seed?"),
        (["--learning_rate=-1"], ("", ""), 2, "launch: flag --learning_rate=-1: -1.0 is not a"),
    ],
)
def test_mistakes_in_a_study_end_in_one_line(study, arguments, changed, code, what):
    run = study(*arguments, "--executor=in_process", changed=changed)
    assert run.returncode == code and what in run.stderr.splitlines()[-1], run.stderr


def results(folder):
    return {
        path.parent.name: json.loads(path.read_text())["loss"]
        for path in folder.glob("*/result.json")
    }


def test_a_sweep_runs_each_setting_in_a_folder_of_its_own(sweep, tmp_path):
    run = sweep("--sweep", "seed=0:3", "--parallel=2", "--sweep=learning_rate=0.5,0.25")
    assert run.returncode == 0, run.stderr
    expected = {
        f"seed={seed},learning_rate={rate}": seed + rate
        for seed in range(3)
        for rate in (0.5, 0.25)
    }
    assert results(tmp_path / "runs") == expected
    assert json.loads((tmp_path / "runs" / "sweep.json").read_text())["format"] == 1


def test_a_second_start_adds_its_runs_and_keeps_those_that_are_done(sweep, tmp_path):
    assert sweep("--sweep=seed=0,1", "--learning_rate=0.5", "--executor=in_process").returncode == 0
    run = sweep("--sweep=seed=1,2", "--learning_rate", "0.50", "--executor=in_process")
    assert run.returncode == 0, run.stderr
    assert results(tmp_path / "runs") == {"seed=0": 0.5, "seed=1": 1.5, "seed=2": 2.5}
    assert (tmp_path / "runs" / "seed=1" / "starts").read_text() == "started"
    run = sweep("--sweep=seed=3", "--learning_rate=0.7")
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert "has --learning_rate=0.5, this one --learning_rate=0.7" in run.stderr


def test_a_value_in_two_spellings_is_one_run(sweep, tmp_path):
    assert sweep("--sweep=learning_rate=0.5,5e-1", "--executor=in_process").returncode == 0
    run = sweep("--sweep=learning_rate=.5,1e0", "--executor=in_process")
    assert run.returncode == 0, run.stderr
    assert results(tmp_path / "runs") == {"learning_rate=0.5": 0.5, "learning_rate=1e0": 1.0}
    assert (tmp_path / "runs" / "learning_rate=0.5" / "starts").read_text() == "started"


def test_a_function_of_the_experiment_and_max_runs(sweep, tmp_path):
    run = sweep("--sweep=pairs()", "--max_runs=1", "--executor=in_process")
    assert run.returncode == 0, run.stderr
    assert results(tmp_path / "runs") == {"seed=5,learning_rate=0.5": 5.5}


def test_a_dry_plan_is_printed_and_leaves_nothing(sweep, tmp_path):
    run = sweep("--sweep=seed=0:2", "--sweep=learning_rate=uniform(0,1)", "--draws=2", "--dry_run")
    assert run.returncode == 0, run.stderr
    first, head, *rows = run.stdout.splitlines()
    assert first.startswith("4 runs of ")
    assert head.split() == ["run", "parameters"]
    assert [row.split()[1] for row in rows] == ["1,000", "1,000", "2,000", "2,000"]
    assert all(re.match(r"seed=\d,learning_rate=0\.\d+ ", row) for row in rows)
    assert not (tmp_path / "runs").exists()
    seeded = [sweep("--sweep=seed=intuniform(0,1000000)", "--dry_run", *more) for more in (
        [], ["--sweep_seed=0"], ["--sweep_seed=1"],
    )]  # fmt: skip
    assert seeded[0].stdout == seeded[1].stdout != seeded[2].stdout


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--sweep=sead=1,2"], "--sweep: swept has no flag sead; did you mean seed?"),
        (["--sweep=seed=0,1", "--learnin_rate=1"], "did you mean learning_rate?"),
        (["--sweep=seed=0,1", "--paralel=2"], "did you mean parallel?"),
        (["--sweep=seed=0,x"], "--seed=x"),
        (["--sweep=seed=0,1", "--learning_rate=-1"], "-1.0 is not a non-negative number"),
        (["--sweep=seed=0,1", "--seed=3"], "--seed: is in a --sweep too"),
        (["--sweep=seed=1:1"], "--sweep 'seed=1:1': '1:1': the range is empty"),
        (["--sweep=seeds()"], "has no function seeds"),
        (["--sweep=seed=0,1", "--executor=locl"], "allowed: in_process, local, slurm, k8s, tpu"),
        (["--sweep=seed=0,1", "--nodes=2"], "retries, draws, sweep_seed, max_runs, dry_run, cores"),
        (["--sweep=seed=0,1", "--cores=x"], "--cores=x"),
        (["--sweep=seed=0,1", "--parallel=0"], "--parallel=0: allowed: 1 or more"),
        (["--sweep=seed=0,1", "--retries=-1"], "--retries=-1: allowed: 0 or more"),
        (["--sweep=seed=0,1", "--max_runs=x"], "--max_runs: 'x': allowed: a whole number"),
        (["--sweep=seed=0,1", "--dry_run=true"], "--dry_run: takes no value, not 'true'"),
        (["--sweep=learning_rate=1", "--executor=slurm", "--word=a\nb"], "has a line end"),
        (["--sweep=seed=0,1", "--draws=3"], "no --sweep draws"),
        (["--sweep=seed=0,1", "stray"], "stray: not a flag"),
        (["--sweep"], "--sweep: expected one argument"),
    ],
)
def test_mistakes_in_a_sweep_end_in_one_line_before_anything_starts(
    sweep, tmp_path, arguments, what
):
    run = sweep(*arguments)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1), run.stderr
    assert what in run.stderr
    assert not (tmp_path / "runs").exists()


def test_a_sweep_wants_an_experiment_a_folder_and_one_that_can_be_written(sweep, tmp_path):
    run = run_launch("--experiment=bf16_to_f4", "--sweep=seed=0,1", "--workdir=x", cwd=tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "did you mean bf16_to_fp4?" in run.stderr
    run = run_launch("--experiment=bf16_to_fp4", "--sweep=seed=0,1")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "--workdir=DIR is missing" in run.stderr
    run = run_launch("--experiment=bf16_to_fp4", "--sweep=seed=0,1", "--workdir=", cwd=tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "--workdir=DIR is missing" in run.stderr
    (tmp_path / "file").write_text("")
    run = sweep("--sweep=seed=0,1", workdir="file/runs")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "file/runs: cannot be written" in run.stderr


def test_scripts_are_printed_and_nothing_is_started(sweep, tmp_path):
    run = sweep("--sweep=seed=0,1", "--executor=slurm", "--dry_run", "--time=30")
    assert (run.returncode, run.stderr) == (0, "")
    assert all(text in run.stdout for text in ("2 runs of ", "#!/bin/bash", "seed=1"))
    slice_ = ["--accelerator_type=v6e-16", "--runtime_version=v2", "--zone=z", "--bucket=gs://b/x"]
    run = run_launch(
        *("--experiment=bf16_to_fp4", "--sweep=seed=0,1", "--workdir=runs"),
        *("--executor=tpu", *slice_),
        cwd=tmp_path,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.count("gcloud compute tpus queued-resources create") == 2
    assert not (tmp_path / "runs").exists()


def test_a_cluster_that_is_not_there_is_refused_in_one_line(sweep, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    run = sweep("--sweep=seed=0,1", "--executor=slurm")
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1), run.stderr


def test_help_of_a_sweep_lists_the_executors_options(sweep):
    run = sweep("--sweep=x", "--help")
    assert run.returncode == 0
    assert "--parallel=N" in run.stdout
    assert "Options of --executor=local:\n  --cores" in run.stdout


def test_the_options_of_an_executor_are_listed_as_help_and_readme_say():
    run = run_launch("--sweep", "x", "--executor=slurm", "--help")
    assert (run.returncode, run.stderr) == (0, "")
    assert "Options of --executor=slurm:\n  --partition" in run.stdout


def test_status_and_report_name_the_folder_they_were_given(sweep, tmp_path):
    assert sweep("--sweep=seed=0,1", "--executor=in_process").returncode == 0
    run = run_launch("status", tmp_path / "runs", "--json")
    assert (run.returncode, run.stderr) == (0, "")
    assert json.loads(run.stdout)["counts"] == {"done": 2}
    run = run_launch("report", tmp_path / "runs")
    assert (run.returncode, run.stderr) == (0, "")
    page = Path(run.stdout.strip())
    assert page.is_relative_to(tmp_path / "runs")
    assert "seed=1" in page.read_text()


@pytest.mark.parametrize("command", ["status", "report"])
def test_status_and_report_refuse_in_one_line(command, tmp_path):
    for arguments in ([], [tmp_path / "none"], [tmp_path, "--colour=red"]):
        run = run_launch(command, *arguments)
        assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1), run.stderr
        assert run.stderr.startswith("launch: ")
        if arguments != [tmp_path / "none"]:
            assert f"; allowed: python launch.py {command} DIR [--" in run.stderr
    run = run_launch(command, "--help")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith(f"python launch.py {command} DIR [--")


def test_a_word_that_is_no_command_is_said_to_be_none():
    run = run_launch("stats", "runs")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert run.stderr == "launch: 'stats': allowed first: status, report, or a --flag\n"


def test_a_report_that_cannot_be_written_names_its_folder(sweep, tmp_path):
    assert sweep("--sweep=seed=0", "--executor=in_process").returncode == 0
    (tmp_path / "runs" / "report").write_text("a file where the folder should be")
    run = run_launch("report", tmp_path / "runs")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert run.stderr.startswith(f"launch: report {tmp_path}/runs: cannot be written: ")


def test_a_reader_that_has_seen_enough_is_no_error(sweep, tmp_path):
    assert sweep("--sweep=seed=0", "--executor=in_process").returncode == 0
    read, write = os.pipe()
    os.close(read)
    line = [sys.executable, str(ROOT / "launch.py"), "status", str(tmp_path / "runs")]
    with os.fdopen(write) as stdout:
        run = subprocess.run(line, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.alone
def test_help_is_quick():
    def seconds():
        start = time.perf_counter()
        run_launch("--help")
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.3  # 0.03 to 0.1 s on an idle machine


@pytest.mark.alone
def test_import_v4jax_is_quick():
    program = "import time; t = time.perf_counter(); import v4jax; print(time.perf_counter() - t)"
    seconds = [
        float(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT)) for _ in range(3)
    ]
    assert min(seconds) < 0.3

"""launch.py: what it lists, refuses, sets and passes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import launch

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
    assert launch.command("bf16_to_fp4", ["--quick"])[1:] == [
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


GLIBC = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {}) and launch.huge_pages(
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

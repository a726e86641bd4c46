"""The command that benchmarks kernels, on tiny shapes: what it prints, writes and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def launch(*arguments, code: str = "pass") -> subprocess.CompletedProcess:
    """The experiment in a process of its own; `code` runs before it."""
    start = f"import sys, runpy; sys.argv[0] = 'benchmark_kernels'; {code}; "
    run = "runpy.run_module('experiments.benchmark_kernels', run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", start + run, "--quick", *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )


@pytest.mark.slow
def test_quick(tmp_path):
    run = launch(f"--output={tmp_path}")
    assert run.returncode == 0, run.stderr
    for text in ("ceiling", "of roofline", "CPU s / s", "resident bytes", "not run: no GPU", "jax"):
        assert text in run.stdout, text
    (page,) = tmp_path.glob("*.md")
    assert f"wrote {page}" in run.stdout
    report = json.loads(page.with_suffix(".json").read_text())
    assert report["what"]["device"] and report["what"]["date"] and report["what"]["versions"]["jax"]
    for case in report["cases"]:
        for row in case["rows"]:
            assert 0 < row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
            assert row["ratio"]["median"] <= row["ceiling"] and row["bytes"] > 0 < row["flops"]


def test_a_ratio_above_its_ceiling_fails_the_run(tmp_path):
    """Planted: peaks of a device a thousand times too slow."""
    slow = (
        "import v4jax.analysis.roofline as r; "
        "r.peaks = lambda quick: r.Peaks({'float32': 1e6}, {0: 1e6}, 'planted')"
    )
    run = launch(f"--output={tmp_path}", "--only=forward, T", code=slow)
    assert run.returncode == 1 and run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith("benchmark_kernels: expert matmul, forward (T 96")
    assert "above the ceiling of" in run.stderr
    assert not list(tmp_path.iterdir())


def test_no_such_case():
    run = launch("--only=quantum")
    assert run.returncode == 2
    assert run.stderr == "benchmark_kernels: --only=quantum: no case of a CPU has it in its name\n"

"""The sweeps that README.md shows: each is planned and checked, as its --dry_run does."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text("utf-8")
SWEEPS = re.findall(r"^ {4}python (launch\.py .*--sweep .*?)(?: +#.*)?$", TEXT, re.MULTILINE)
EXECUTORS = ("slurm", "k8s", "tpu")


def test_each_executor_is_shown():
    assert len(SWEEPS) == 1 + len(EXECUTORS)
    for name in EXECUTORS:
        assert any(f"--executor={name}" in line for line in SWEEPS)


@pytest.mark.parametrize("line", SWEEPS)
def test_a_sweep_is_planned(line, tmp_path):
    folder = "/shared/w" if "k8s" in line else f"{tmp_path}/w"  # there it lies in the volume
    words = [re.sub(r"^--workdir=.*", f"--workdir={folder}", word) for word in shlex.split(line)]
    run = subprocess.run(
        [sys.executable, *words, "--dry_run"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stderr) == (0, "")
    count = 18 if "qat_start" in line else 3
    assert run.stdout.startswith(f"{count} runs of bf16_to_fp4, in {folder}\n")
    assert len(re.findall(r" 2,072,236 ", run.stdout)) == count
    assert not Path(folder).exists()

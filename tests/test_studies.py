"""The studies as a user starts them, each with --quick: one sweep, its runs, its report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.launched import launched, write_corpus

STUDIES = {
    "quantize_what": {"qat both.mxfp4 - control", "qat both.mxfp4 - ptq both.mxfp4"},
    "gap": {"tiny:8 qat paper - tiny:8 ptq paper"},
    "qat_schedule": {"qat 28% - ptq", "early qat - control", "fp4 first - control"},
    "optimizer": {"adamw 0.0025 - muon_5 0.0025"},
    "stability": {"plain - undisturbed", "anticipate - plain"},
    "sparse_warmup": {"task warm-up - task dense"},
    "oscillation": {"plain - ptq", "frozen - plain"},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_quickly_and_reports(name, corpus, tmp_path):
    flags = ["--quick", f"--data={corpus}", "--tokenizer=bytes"]
    run = launched(name, *flags, f"--workdir={tmp_path}", timeout=900)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "report" / f"{name}.json").read_text())
    found = {f"{r['arm']} - {r['reference']}" for s in report["sections"].values() for r in s}
    assert found >= STUDIES[name], found
    assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report" / f"{name}.md").read_text()
    assert f"--experiment={name} " in page and "--quick" in page and "jax" in page
    assert all(claim["sentence"] in run.stdout for claim in report["claims"])
    assert report["what"]["missing"] == 0 and report["what"]["seeds"] == [0]
    # The table's losses are those that the runs measured.
    for path in tmp_path.glob("*/losses.npz"):
        with np.load(path) as kept:
            tokens = kept["tokens"].sum()
            measured = {key: kept[key].sum() / tokens for key in kept if key.startswith("arm ")}
        for arm in report["arms"]:
            short = [k for k in measured if arm["arm"].endswith(k.removeprefix("arm "))]
            assert not short or any(np.isclose(measured[k], arm["mean"]) for k in short)


@pytest.mark.parametrize("name", STUDIES)
def test_the_plan_of_a_study_is_whole(name, tmp_path):
    run = launched(name, "--dry_run", f"--workdir={tmp_path / 'x'}", "--seeds=2")
    assert run.returncode == 0, run.stderr
    rows = run.stdout.splitlines()[2:]
    assert len(rows) == len(set(rows)) and sum("seed=1" in row for row in rows) * 2 == len(rows)
    assert launched(name, "--dry_run", "--quick", f"--workdir={tmp_path / 'x'}").stdout.startswith(
        ("1 run of", "2 runs of")
    )


@pytest.mark.slow
def test_wrong_arms_end_in_one_line(tmp_path):
    for name, flag, what in (
        ("quantize_what", "--rounded=all.mxfp4", "--rounded: 'all.mxfp4': unknown scope, allowed:"),
        ("stability", "--arms=pray", "--arms: 'pray', allowed: undisturbed, plain, no clamp,"),
        ("oscillation", "--arms=pray", "--arms: 'pray', allowed: plain, dampened, frozen,"),
        ("gap", "--scopes=all", "--scopes: unknown scope 'all', allowed: paper, all_linears"),
    ):
        run = launched(name, "--single", flag, f"--workdir={tmp_path}")
        assert run.returncode == 2 and run.stderr.count("\n") == 1 and what in run.stderr

"""The study of the indexer's recall as a user meets it: on runs of a folder, and without any."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import numpy as np
import pytest

from tests.launched import launched
from tests.training import tiny
from v4jax.analysis import recall, recall_report, recall_study, synthetic
from v4jax.analysis.evaluation import Choices
from v4jax.analysis.paired import Paired
from v4jax.analysis.recall import Kept
from v4jax.quantization import PAPER
from v4jax.training.corpus import load_corpus, split
from v4jax.training.data import Dataset, EvalWindows
from v4jax.training.observe import Pace
from v4jax.training.switch import run_arms
from v4jax.training.tokenizer import get_tokenizer

STEPS = 4


launch = functools.partial(launched, "indexer_recall", "--quick")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(text, folder of runs): four steps of the smallest model, switched at the second."""
    text = tmp_path_factory.mktemp("text")
    for name, document in tiny.corpus().documents:
        (text / name).write_text(document * 4)
    train, _ = split(load_corpus(str(text)))
    tokenizer = get_tokenizer("bytes", train)
    dataset = Dataset.build(train.documents, tokenizer)
    config = dataclasses.replace(tiny.config(dataset.hash), schedule=tiny.schedule(STEPS))
    batches = dataset.batches(config.sequence_length, config.batch_size, 0)
    trainer = tiny.QuickTrainer(config, batches.rows, dataset.token_counts(), tokenizer)
    folder = tmp_path_factory.mktemp("runs")
    run_arms(trainer, folder, switch_step=2, scopes={"paper": PAPER}, pace=Pace(save_every=2))
    return text, folder


@pytest.mark.slow
def test_the_whole_story(runs):
    text, folder = runs
    where = f"--workdir={folder}", f"--data={text}"
    run = launch(*where, "--lengths=64", "--top_k=2", "--synthetic=gaussian,outliers")
    assert run.returncode == 0, run.stderr
    assert (folder / "indexer_recall.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / "indexer_recall.json").read_text())
    assert report["what"]["jax"] and report["what"]["device"] and report["what"]["steps"] == STEPS
    own = tiny.model().index_topk
    assert tuple(report["arms"]) == ("control", "ptq", "qat")
    for lengths in report["arms"].values():
        assert list(lengths) == ["64"]
        for found in lengths.values():
            assert list(found["recall"]) == ["2", str(own)]
            for tables in found["recall"].values():
                assert set(tables) == set(recall_report.COMPARED)
                for one in tables.values():
                    assert 0 <= one["min"] <= one["p5"] and one["min"] <= one["mean"] <= 1
                    assert 0 < one["mass"]["min"] <= one["mass"]["mean"] <= 1 + 1e-6
            loss = found["loss"]
            assert math.isfinite(loss["exact"])
            for change in recall_report.CHANGES:
                assert loss[change]["low"] <= loss[change]["mean"] <= loss[change]["high"]
    assert set(report["paired"]["64"][str(own)]) == {"qk", "score", "both"}
    difference = report["paired"]["64"][str(own)]["qk"]["mean"]
    means = [report["arms"][a]["64"]["recall"][str(own)]["qk"]["mean"] for a in ("qat", "ptq")]
    assert math.isclose(difference, means[0] - means[1], abs_tol=1e-6)
    assert set(report["synthetic"]) == {"gaussian", "outliers"}
    page = (folder / "indexer_recall.md").read_text()
    for words in ("R_qk", "R_score", "no Hadamard", "millinats", "softmax"):
        assert words in page, words
    assert "| PTQ " in run.stdout and "0.997" in run.stdout
    assert "WARNING" not in run.stderr and "Warning" not in run.stderr


@pytest.mark.slow
def test_synthetic_data_alone(tmp_path):
    run = launch(f"--workdir={tmp_path}", "--arms=", "--synthetic=clustered,near_duplicates")
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "indexer_recall.json").read_text())
    assert report["arms"] == {} and set(report["synthetic"]) == {"clustered", "near_duplicates"}
    assert (tmp_path / "indexer_recall.png").read_bytes().startswith(b"\x89PNG")


WRONG = {
    "--arms=control,qat": "--arms: {folder}/control holds no run; `python launch.py --experiment=",
    "--synthetic=uniform": "synthetic data: unknown kind 'uniform', allowed: gaussian, positive",
    "--lengths=none": "--lengths=none: allowed: numbers above 0, commas",
    "--entries=0": "--entries=0: allowed: numbers above 0, commas",
}


@pytest.mark.parametrize("flag", WRONG)
def test_wrong_input_is_one_line(tmp_path, flag):
    arms = "--arms=control,qat" if "arms" in flag else "--arms="
    run = launch(f"--workdir={tmp_path}", arms, flag)
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert WRONG[flag].format(folder=tmp_path) in run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_other_text_and_unfinished_runs_are_refused(runs, tmp_path):
    text, folder = runs
    for i in range(60):
        (tmp_path / f"{i}.py").write_text(f"x = {i}\n" * 99)
    (arm,) = recall_study.load_arms(folder, ["ptq"])
    assert arm.quantization == PAPER and arm.run.config.quantization.rules == ()
    with pytest.raises(ValueError, match="--data: these are not the documents that the run was"):
        recall_study.held_out(arm.run, str(tmp_path))
    assert recall_study.held_out(arm.run, str(text))[1]
    with pytest.raises(ValueError, match="pretrain is at step 2 of 4"):
        recall_study.load_arms(folder, ["pretrain"])


# ---- the parts ----


def test_what_is_not_defined_is_said(tmp_path):
    """No query sees more than k entries; no k is below the number of entries."""
    tables = dict.fromkeys(recall_report.COMPARED)
    interval = {"mean": 0.001, "low": -0.001, "high": 0.002}
    loss = {"exact": 3.0} | dict.fromkeys(recall_report.CHANGES, interval)
    report = {
        "what": {"sequence_length": 32, "index_topk": 16, "steps": 3, "versions": {}},
        "arms": {"ptq": {"32": {"recall": {"16": tables}, "loss": loss}}},
        "paired": {"32": {"16": dict.fromkeys(("qk", "score", "both"))}},
        "synthetic": {"gaussian": {"64": {}}},
    }
    text = recall_report.summary(report)
    assert "PTQ, length 32: recall is not defined, no query sees more than 16 entries." in text
    assert "+1.00 [-1.00, +2.00]" in text and "which holds 0" in text
    recall_report.write_report(tmp_path, report)
    assert (tmp_path / "indexer_recall.png").stat().st_size > 1000


def test_the_paired_difference_is_of_queries_and_resamples_documents():
    rng = np.random.default_rng(0)
    windows, length = 30, 8
    mask = rng.random((windows, length)) < 0.8
    document = np.repeat(np.arange(10), 3)
    held_out = EvalWindows(np.zeros((40, 9), int), np.ones((40, 8), bool),
                           np.arange(40), np.ones(40))  # fmt: skip
    held_out.document[:windows] = document

    def choices(seed) -> Choices:
        values = np.random.default_rng(seed).random((2, windows, length))
        values[:, :, :2] = np.nan
        return Choices([{4: {"qk": Kept(v, v)}} for v in values], [], mask)

    a, b = choices(1), choices(2)
    found = recall_study.recall_difference(held_out, a, b, 4, "qk")
    each = [np.mean([layer[4]["qk"].recall for layer in c.keeps], axis=0) for c in (a, b)]
    counted = mask & np.isfinite(each[0])
    assert math.isclose(found["mean"], (each[0] - each[1])[counted].mean())
    sums = [np.where(counted, x, 0).sum(1) for x in each]
    same = EvalWindows(held_out.tokens[:windows], counted, document, held_out.num_bytes[:windows])
    assert found == dataclasses.asdict(Paired(same).difference(*sums))
    a.keeps[0][4]["qk"].recall[:] = np.nan
    assert recall_study.recall_difference(held_out, a, b, 4, "qk") is None


def test_random_data_give_what_they_are_known_to_give():
    """kernels.md's table: FP4 QK 0.82 on Gaussian data, 0.77 with outliers, 0.94 once rotated."""
    compared = recall.all_comparisons()

    def found(kind):
        keeps = recall.keeps(synthetic.operands(kind, 48, 4096), 1, (64,), compared, 4096)[64]
        return {name: float(np.mean(kept.recall)) for name, kept in keeps.items()}

    gaussian, outliers = found("gaussian"), found("outliers")
    assert abs(gaussian["qk"] - 0.81) < 0.02 and abs(gaussian["qk_unrotated"] - 0.82) < 0.02
    assert abs(gaussian["score"] - 0.994) < 0.003 and gaussian["qk_bf16"] > 0.99
    assert abs(outliers["qk"] - 0.945) < 0.02 and abs(outliers["qk_unrotated"] - 0.78) < 0.03


@pytest.mark.parametrize("kind", synthetic.KINDS)
def test_synthetic_data(kind):
    q, k, w = synthetic.operands(kind, 5, 64, heads=3, width=32)
    assert (q.shape, k.shape, w.shape) == ((1, 5, 3, 32), (1, 64, 32), (1, 5, 3))
    assert {x.dtype for x in (q, k, w)} == {np.dtype(np.float32)}
    again = synthetic.operands(kind, 5, 64, heads=3, width=32)
    assert all(np.array_equal(a, b) for a, b in zip((q, k, w), again, strict=True))
    assert not np.array_equal(q, synthetic.operands(kind, 5, 64, 3, 32, seed=1)[0])
    assert (w > 0).all() == (kind == "positive")
    if kind == "near_duplicates":  # every key has seven very near ones
        distance = np.linalg.norm(k[0, :, None] - k[0], axis=-1)
        assert ((distance < 1).sum(axis=1) == 8).all()

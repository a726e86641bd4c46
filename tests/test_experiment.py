"""The experiment as a user meets it: from the command line to report.json, and wrong input."""

from __future__ import annotations

import functools
import json
import math
import time
from pathlib import Path

import pytest
from absl import flags

from tests.launched import launched, write_corpus
from v4jax.training.metrics import read_metrics
from v4jax.training.run import load_run

SWITCH, STEPS = 4, 6
RUNS = {"pretrain": (1, SWITCH), "control": (5, STEPS), "qat": (5, STEPS)}
RUNS["qat_all_linears"] = RUNS["qat"]


launch = functools.partial(launched, "bf16_to_fp4")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def command(corpus, tmp_path_factory) -> list[str]:
    workdir = tmp_path_factory.mktemp("runs") / "demo"
    sizes = [f"--steps={STEPS}", "--eval_windows=8", "--batch_size=2", "--sequence_length=64"]
    return [f"--workdir={workdir}", "--quick", f"--data={corpus}", "--tokenizer=bytes", *sizes]


@pytest.fixture(scope="module")
def done(command):
    """The finished command and its folder."""
    run = launch(*command)
    assert run.returncode == 0, run.stderr
    return run, Path(command[0].partition("=")[2])


def at(report, path: str):
    for key in path.split("."):
        report = report[key]
    return report


# ---- the whole story ----

DIFFERENCES = ("qat_minus_ptq", "ptq_minus_control")
NUMBERS = [
    f"{kind}.{arm}" for kind in ("loss", "bits_per_byte") for arm in ("control", "ptq", "qat")
]
NUMBERS += [f"{difference}.{key}" for difference in DIFFERENCES for key in ("mean", "low", "high")]


@pytest.mark.slow
def test_the_report_keeps_its_contract(done):
    _, workdir = done
    report = json.loads((workdir / "report.json").read_text())
    for prefix in ("", "all_linears."):
        for path in NUMBERS:
            assert math.isfinite(at(report, prefix + path)), prefix + path
        closed = at(report, prefix + "ptq_gap_closed")
        gap = at(report, prefix + "ptq_minus_control")
        assert (closed is None) == (gap["low"] <= 0 <= gap["high"])
        for difference in DIFFERENCES:
            interval = at(report, prefix + difference)
            assert interval["low"] <= interval["mean"] <= interval["high"]
            a, b = difference.split("_minus_")
            loss = at(report, prefix + "loss")
            assert math.isclose(interval["mean"], loss[a] - loss[b], abs_tol=1e-9)
        bits, loss = at(report, prefix + "bits_per_byte"), at(report, prefix + "loss")
        for arm in ("control", "ptq", "qat"):  # a token is a byte here
            assert math.isclose(bits[arm], loss[arm] / math.log(2), rel_tol=1e-9)
    assert report["all_linears"]["loss"]["control"] == report["loss"]["control"]
    assert report["all_linears"]["loss"]["ptq"] != report["loss"]["ptq"]
    orders = [report["bits_per_byte"][f"order{n}"] for n in (1, 2, 3)]
    assert report["bits_per_byte"]["unigram"] > orders[0] > orders[1] > 0 and orders[2] > 0
    assert 0 < report["recall"]["qk"] <= 1 and 0 < report["recall"]["score"] <= 1
    experts = report["expert_bytes"]
    assert experts["ratio"] == experts["bf16"] / experts["fp4"] == 64 / 17
    assert set(report["seconds_per_step"]) >= {"bf16", "qat"}
    assert report["seconds_per_step"]["bf16"] > 0 and report["seconds_per_step"]["qat"] > 0
    continuation = report["continuation"]
    assert set(continuation) >= {"prompt", "control", "qat"} and continuation["prompt"]
    assert all(0 < len(continuation[arm].encode()) <= 600 for arm in ("control", "qat"))
    assert report["what"]["switch_step"] == SWITCH and report["what"]["steps"] == STEPS
    assert report["what"]["compute_dtype"] == "float32"


@pytest.mark.slow
def test_metrics_of_every_run(done):
    _, workdir = done
    for name, (first, last) in RUNS.items():
        lines = [json.loads(x) for x in (workdir / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(first, last + 1))
        assert all(math.isfinite(line["loss"]) for line in lines)
        assert list((workdir / name / "tensorboard").iterdir())
        machine = json.loads((workdir / name / "machine.json").read_text())
        assert machine["devices"] == machine["processes"] == 1 and machine["versions"]["jax"]
    assert "fp8_lossless_share" in read_metrics(workdir / "qat")[-1]


@pytest.mark.slow
def test_what_is_said_and_drawn(done):
    run, workdir = done
    assert (workdir / "report.md").read_text().startswith("# ")
    assert (workdir / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "sha256" in run.stdout and "Python" in run.stdout  # corpus hash and interpreter
    assert "quantized from here on" in run.stdout and "units" not in run.stdout
    assert run.stdout.count("| sum ") == 1 + 2  # the state by part, and what each arm rounds
    assert "QAT, all linears" in run.stdout
    for name in RUNS:
        assert f"{name} " in run.stderr and "took" in run.stderr
    assert "WARNING" not in run.stderr and "Warning" not in run.stderr


@pytest.mark.slow
def test_a_run_is_loaded_for_a_notebook(done):
    _, workdir = done
    run = load_run(workdir / "qat")
    assert run.step == STEPS and run.metrics[-1]["step"] == STEPS
    assert run.config.model.vocab_size == run.tokenizer.vocab_size == 257
    assert load_run(workdir / "pretrain").step == SWITCH
    with pytest.raises(ValueError, match="no checkpoint of step 1 in .*; there: 6"):
        load_run(workdir / "qat", 1)
    with pytest.raises(ValueError, match="holds no run"):
        load_run(workdir)


@pytest.mark.slow
def test_the_same_command_again_trains_nothing_and_reports_the_same(done, command):
    _, workdir = done

    def trained():
        paths = [
            p for name in RUNS for p in (workdir / name).rglob("*") if "tensorboard" not in str(p)
        ]
        return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}

    before, report = trained(), json.loads((workdir / "report.json").read_text())
    run = launch(*command)
    assert run.returncode == 0 and run.stderr == ""
    assert trained() == before
    again = json.loads((workdir / "report.json").read_text())
    for timed in ("seconds_per_step", "what"):
        del report[timed], again[timed]
    assert again == report


@pytest.mark.slow
def test_seeds_are_repeated_and_summed_up(done, tmp_path, monkeypatch, capsys):
    """main() alone: one report a seed, in folders of their own."""
    from experiments import bf16_to_fp4

    report = json.loads((done[1] / "report.json").read_text())
    called = []

    def experiment(seed, workdir):
        called.append((seed, workdir))
        loss = report["loss"] | {"qat": float(seed)}
        return report | {"loss": loss, "what": report["what"] | {"seed": seed}}, {}

    monkeypatch.setattr(bf16_to_fp4, "experiment", experiment)
    flags.FLAGS(["experiment", f"--workdir={tmp_path}", "--seed=3", "--seeds=3"])
    bf16_to_fp4.main()
    assert called == [(3, tmp_path), (4, tmp_path / "seed_4"), (5, tmp_path / "seed_5")]
    seeds = json.loads((tmp_path / "report.json").read_text())["seeds"]
    assert seeds["seeds"] == [3, 4, 5]
    assert seeds["metrics"]["loss.qat"] == {"values": [3.0, 4.0, 5.0], "mean": 4.0, "std": 1.0}
    assert "seeds" in capsys.readouterr().out


# ---- help and wrong input ----


def test_help_lists_every_flag_with_its_group():
    start = time.perf_counter()
    run = launch("--help")
    assert run.returncode == 0 and time.perf_counter() - start < 10
    names = ("workdir", "steps", "qat_start", "from_checkpoint", "seeds", "tokenizer", "data")
    for name in (*names, "compute_dtype", "scopes", "learning_rate"):
        assert f"--{name}: " in run.stdout, name
    for group in ("[run]", "[data]", "[model]", "[training]", "[fp4]"):
        assert group in run.stdout
    assert "--[no]quick" in run.stdout


WRONG = {
    "--steps=0": "--steps=0",
    "--stepz=3": "stepz",
    "left over": "left over: not a flag",
    "--preset=huge": "nano|micro|mini|small",
    "--data=/no/such/text": "data: no such file or folder: /no/such/text",
    "--tokenizer=none": "tokenizer: 'none' is not bpe, bytes or the path of a tokenizer.json",
    "--from_checkpoint=/no@3": "--from_checkpoint=/no@3: no such checkpoint; /no has: none",
    "--qat_start=0": "--qat_start: step 0 is not within 1..5",
    "--qat_start=1.5": "--qat_start=1.5: allowed: a fraction in [0, 1], or whole steps",
    "--scopes=paper,all": "--scopes: unknown scope 'all', allowed: paper, all_linears",
    "--warmup=0.9": "(--warmup): got 0.9, allowed: <= decay_start (0.7)",
    "--balance_weight=nan": "Objective.balance: got nan, allowed: a number >= 0",
    "--workdir=/dev/null/x": "Not a directory",
}


@pytest.mark.slow
@pytest.mark.parametrize("flag", WRONG)
def test_wrong_input_is_one_line(command, tmp_path, flag):
    run = launch(*command, f"--workdir={tmp_path / 'x'}", flag)
    assert run.returncode not in (0, 1), run.stderr
    assert run.stderr.count("\n") == 1 and WRONG[flag] in run.stderr, run.stderr
    assert run.stderr.startswith("bf16_to_fp4: ")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_folder_of_another_run_is_one_line(done, command):
    run = launch(*command, "--learning_rate=0.001")
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert "pretrain holds a run of another configuration; choose another folder" in run.stderr
    assert ": optimizer.learning_rate is " in run.stderr
    assert "0.0025 there, 0.001 here" in run.stderr

"""What the report says follows from its numbers, whatever those are; JSON and PNG are sound."""

import copy
import json
import math
import re

import numpy as np
import pytest

from v4jax.analysis import findings, plots
from v4jax.analysis.report import attach_seeds, jsonable, markdown, summary, write_report
from v4jax.training.metrics import MetricsWriter


def interval(mean, low, high):
    return {"mean": mean, "low": low, "high": high}


def recall(mean, per_layer):
    return {"mean": mean, "min": 0.5, "p5": 0.8125, "per_layer": per_layer, "queries": 45312}


def example():
    """A report such as the demo's, in numbers near those of the prototype; nothing was measured."""
    scope = {
        "loss": {"control": 3.3860, "ptq": 3.3874, "qat": 3.3877},
        "bits_per_byte": {"control": 1.6521, "ptq": 1.6528, "qat": 1.6529},
        "ptq_gap_closed": -0.21,
        "ptq_gap_closed_interval": interval(-0.21, -0.62, 0.15),
        "ptq_minus_control": interval(0.0014, 0.0011, 0.0017),
        "qat_minus_ptq": interval(0.0003, -0.0002, 0.0008),
        "qat_minus_control": interval(0.0017, 0.0012, 0.0021),
        "gap_by_part": {
            "routed experts": interval(0.0015, 0.0010, 0.0019),
            "index query, key": interval(-0.0001, -0.0002, 0.0001),
        },
    }
    linears = {
        "loss": {"control": 3.3860, "ptq": 3.4005, "qat": 3.3975},
        "bits_per_byte": {"control": 1.6521, "ptq": 1.6592, "qat": 1.6577},
        "ptq_gap_closed": 0.21,
        "ptq_gap_closed_interval": interval(0.21, 0.13, 0.29),
        "ptq_minus_control": interval(0.0145, 0.0136, 0.0155),
        "qat_minus_ptq": interval(-0.0031, -0.0043, -0.0018),
        "qat_minus_control": interval(0.0115, 0.0105, 0.0125),
        "gap_by_part": {"attention": interval(0.0141, 0.0130, 0.0153)},
    }
    what = {
        "experiment": "bf16_to_fp4",
        "command": "python launch.py --experiment=bf16_to_fp4 --workdir=runs/demo",
        "preset": "nano",
        "parameters": 2041856,
        "steps": 800,
        "switch_step": 560,
        "tokens": 1638400,
        "batch_size": 8,
        "sequence_length": 256,
        "learning_rate": 0.0025,
        "seed": 0,
        "compute_dtype": "float32",
        "device": "cpu",
        "cores": 2,
        "python": "3.13.0",
        "jax": "0.10.2",
        "flax": "0.12.8",
        "versions": {"optax": "0.2.8"},
        "date": "2026-12-01",
        "corpus": "the standard library of Python 3.13.0",
        "corpus_hash": "0123456789ab",
        "tokenizer": "byte-level BPE",
        "vocab_size": 2048,
        "bytes_per_token": 2.94,
        "eval_windows": 1600,
        "eval_documents": 137,
        "eval_tokens": 398211,
        "eval_bytes": 1170740,
        "part_windows": 400,
        "seconds": {"total": 561.2, "pretrain": 231.0, "control": 98.5},
    }
    return {
        "what": what,
        **scope,
        "bits_per_byte": {
            **scope["bits_per_byte"],
            **{"unigram": 4.7312, "order1": 3.5207, "order2": 2.6513, "order3": 2.1304},
        },
        "all_linears": linears,
        "recall": {
            "qk": 0.943,
            "score": 0.981,
            "detail": {
                "qk": recall(0.943, [0.951, 0.935]),
                "score": recall(0.981, [0.985, 0.977]),
                "control_qk": recall(0.939, [0.944, 0.934]),
            },
        },
        "router_agreement": {
            "control_qat": {"mean": 0.912, "per_layer": [0.93, 0.91, 0.89]},
            "control_ptq": {"mean": 0.981, "per_layer": [0.99, 0.98, 0.97]},
        },
        "expert_bytes": {"bf16": 1966080, "fp4": 522240, "ratio": 3.7647},
        "seconds_per_step": {
            **{"bf16": 0.402, "qat": 0.415, "ratio": 1.032},
            **{"ratio_low": 1.017, "ratio_high": 1.049, "pairs": 30},
        },
        "fp8_lossless_share": 1.0,
        "continuation": {
            "prompt": "def read(path):\n",
            "control": '    with open(path) as file:\n        """```"""\n',
            "qat": "    return path\x00\n",
        },
        "seeds": None,
    }


def write_runs(folder):
    """Writes metrics.jsonl of the demo's runs: losses that fall as a small model's do."""
    noise = np.random.default_rng(0).normal(size=801)
    runs = {}
    for name, first, last, cost in (
        ("pretrain", 0, 560, 0.0),
        ("control", 560, 800, 0.0),
        ("qat", 560, 800, 0.002),
        ("qat_all_linears", 560, 800, 0.012),
    ):
        runs[name] = folder / name
        own = np.random.default_rng(len(name)).normal(size=801)
        with MetricsWriter(runs[name]) as writer:
            for step in (s for s in range(first + 1, last + 1) if s % 10 == 0 or s == first + 1):
                decay = 0.15 * max(0, step - 560) / 240
                loss = 3.42 + 4.2 / (1 + step / 30) - decay + 0.09 * noise[step]
                arm = cost * (1 + math.exp(-(step - first) / 40)) + 0.004 * own[step] * (cost > 0)
                writer.write(step, {"loss": loss + arm, "seconds_per_step": 0.4})
    return runs


def walk(tree, path):
    for key in path.split("."):
        tree = tree[key]
    return tree


def pixels(path):
    from matplotlib.image import imread

    return imread(path)[..., :3]


# ---- the files ----


def test_the_three_files_and_the_contract_of_report_json(tmp_path):
    write_report(tmp_path, example(), write_runs(tmp_path))
    stored = json.loads((tmp_path / "report.json").read_text())
    of_a_scope = [f"loss.{arm}" for arm in ("control", "ptq", "qat")]
    of_a_scope += [f"bits_per_byte.{arm}" for arm in ("control", "ptq", "qat")]
    of_a_scope += [
        f"{name}.{key}"
        for name in ("qat_minus_ptq", "ptq_minus_control")
        for key in ("mean", "low", "high")
    ]
    paths = [*of_a_scope, "ptq_gap_closed", *(f"all_linears.{path}" for path in of_a_scope)]
    paths += [f"bits_per_byte.{name}" for name in ("unigram", "order1", "order2", "order3")]
    paths += ["all_linears.ptq_gap_closed", "recall.qk", "recall.score", "expert_bytes.bf16"]
    paths += ["expert_bytes.fp4", "expert_bytes.ratio", "seconds_per_step.bf16"]
    for path in [*paths, "seconds_per_step.qat"]:
        assert walk(stored, path) == walk(example(), path), path
    assert not list(tmp_path.glob("*.tmp"))

    image = pixels(tmp_path / "report.png")
    height, width, _ = image.shape
    assert height > 1000 and width > 1300
    for rows in (slice(0, height // 2), slice(height // 2, None)):
        for columns in (slice(0, width // 2), slice(width // 2, None)):
            panel = image[rows, columns][::4, ::4].reshape(-1, 3)
            assert 0.02 < np.mean(panel.min(axis=1) < 0.9) < 0.6  # drawn, and not all over
            assert len(np.unique((panel * 15).round(), axis=0)) > 20


def test_not_finite_numbers_and_other_types_are_valid_json(tmp_path):
    report = example()
    report["ptq_gap_closed"] = math.nan
    report["qat_minus_ptq"] = interval(np.float32(math.inf), -math.inf, 0.0)
    report["recall"]["detail"]["qk"]["per_layer"] = np.array([0.5, math.nan])
    write_report(tmp_path, report, {})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    stored = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert stored["ptq_gap_closed"] is None
    assert stored["qat_minus_ptq"] == interval(None, None, 0.0)
    assert stored["recall"]["detail"]["qk"]["per_layer"] == [0.5, None]
    assert "QAT - PTQ is not defined." in summary(report)


def test_dataclasses_are_objects():
    paired = pytest.importorskip("v4jax.analysis.paired")
    assert jsonable(paired.Interval(1.0, math.nan, 2)) == interval(1.0, None, 2)


def test_the_picture_of_little(tmp_path):
    """Without runs, without the second scope, without recall."""
    report = example() | {"all_linears": None}
    report["recall"] = {"qk": None, "score": None, "detail": {"qk": None, "score": None}}
    write_report(tmp_path, report, {"qat": tmp_path / "nothing"})
    assert np.mean(pixels(tmp_path / "report.png") < 0.9) > 0.01


def test_one_logged_step_a_run_and_losses_that_are_not_finite():
    rows = [{"step": 3, "loss": 2.0}]
    histories = {"pretrain": [*rows, {"step": 4, "loss": math.nan}], "control": [], "qat": rows}
    figure = plots.draw(example(), histories)
    assert len(figure.axes) == 5


def test_drawing_leaves_the_style_of_a_notebook_alone(tmp_path):
    import matplotlib

    before = copy.deepcopy(matplotlib.rcParams)
    plots.save(tmp_path / "report.png", example(), {})
    assert matplotlib.rcParams == before


def test_smoothing_keeps_a_straight_line_but_at_its_end():
    line = np.arange(8.0)
    assert plots._smooth(line, 0) == pytest.approx(line)
    assert plots._smooth(line, 2) == pytest.approx([0, 1, 2, 3, 4, 5, 5.5, 6])
    assert plots._smooth(np.ones(1), 5) == pytest.approx(1)


def test_distance_is_paired_by_step():
    arm = np.array([[10, 2.0], [20, 1.5], [30, 1.0]])
    control = np.array([[20, 1.0], [30, 1.25], [40, 9.0]])
    assert plots._distance(arm, control).tolist() == [[20, 500], [30, -250]]


# ---- what is said ----


def said(report):
    """Text of report.md and of the terminal on one line each."""
    return [" ".join(text.split()) for text in (markdown(jsonable(report)), summary(report))]


@pytest.mark.parametrize(
    ("bounds", "where", "meaning"),
    [
        ((-0.0031, -0.0043, -0.0018), "wholly below 0", "beats rounding afterwards"),
        ((0.0003, -0.0002, 0.0008), "which holds 0", "are not told apart"),
        ((0.0, 0.0, 0.0), "which holds 0", "are not told apart"),
        ((0.0020, 0.0010, 0.0030), "wholly above 0", "is worse than rounding afterwards"),
    ],
)
def test_the_sentence_follows_the_interval(bounds, where, meaning):
    report = example() | {"all_linears": None, "qat_minus_ptq": interval(*bounds)}
    mean, low, high = (f"{1000 * bound:+.2f}" for bound in bounds)
    for text in said(report):
        sentence = re.search(r"QAT - PTQ = [^:]*: [^.]*\.", text)[0]
        assert f"{mean} [{low}, {high}] millinats, {where}" in sentence
        assert meaning in sentence


def test_each_scope_has_its_own_sentences():
    for text in said(example()):
        paper, linears = text.index("Paper's scope ("), text.index("All linears (")
        assert paper < text.index("+0.30 [-0.20, +0.80] millinats, which holds 0") < linears
        assert linears < text.index("-3.10 [-4.30, -1.80] millinats, wholly below 0")
        assert "QAT closes 21% [13%, 29%] of the gap." in text
        assert "QAT closes -21% [-62%, 15%] of the gap, an interval that holds 0: whether" in text


def test_a_gap_that_is_not_there_is_not_closed():
    report = example() | {"ptq_gap_closed": None, "ptq_gap_closed_interval": None}
    report["ptq_minus_control"] = interval(0.0002, -0.0001, 0.0005)
    for text in said(report):
        assert "closes is not defined: the gap's interval holds 0." in text
        assert "rounding to FP4 without training costs is not resolved" in text
    report |= {"ptq_minus_control": interval(-0.002, -0.003, -0.001), "ptq_gap_closed": -4.0}
    for text in said(report):
        assert "There is no gap to close" in text and "-400%" not in text


def test_qat_that_widens_the_gap_is_said_to():
    share = interval(-0.3, -0.5, -0.1)
    report = example() | {"ptq_gap_closed": -0.3, "ptq_gap_closed_interval": share}
    for text in said(report):
        assert "QAT closes -30% [-50%, -10%] of the gap: it widens it." in text


def test_without_the_second_scope_nothing_is_said_of_it():
    for text in said(example() | {"all_linears": None}):
        assert "all linears" not in text.lower()


def test_labels_tell_what_ran():
    for text in said(example()):
        assert "float32 on cpu stands in for BF16" in text
    report = example()
    report["what"] |= {"compute_dtype": "bfloat16", "device": "NVIDIA H100"}
    for text in said(report):
        assert "stands in" not in text
        assert "BF16 is bfloat16 in the model's matmuls, over float32 masters, on NVIDIA" in text


@pytest.mark.parametrize(("bits", "where"), [(1.65, "are below the"), (2.5, "are not below the")])
def test_context_models(bits, where):
    report = example()
    report["bits_per_byte"]["control"] = bits
    for text in said(report):
        assert f"The control's {bits:.3f} bits a byte {where} 2.130 of an order-3" in text


def test_all_tiles_are_all_of_them():
    for share, words in ((1.0, "holds all of the"), (0.99996, "holds 99.9960% of the")):
        for text in said(example() | {"fp8_lossless_share": share}):
            assert words in text


def test_recall_that_is_not_defined():
    report = example() | {"recall": {"qk": None, "score": None, "detail": {}}}
    for text in said(report):
        assert "Index recall is not defined: no query sees more than top-k entries." in text


def test_report_md_holds_what_a_notebook_needs():
    text = markdown(example())
    for part in (
        "python launch.py --experiment=bf16_to_fp4 --workdir=runs/demo",
        "2,041,856 parameters",
        "hash `0123456789ab`",
        "Python 3.13.0, jax 0.10.2, flax 0.12.8, optax 0.2.8",
        "on the first 400 windows",
        "| index query, key |",
        "post-training",
        "1,966,080 bytes in BF16, 522,240 in FP4, 3.76 times fewer",
    ):
        assert part in text
    assert "None" not in text and "nan" not in text.lower().replace("nano", "")


def test_continuations_cannot_leave_their_code_block():
    text = markdown(example())
    assert '````\n    with open(path) as file:\n        """```"""\n\n````' in text
    assert "return path\ufffd\n" in text


def test_the_terminal_is_a_hundred_columns_wide():
    assert max(map(len, summary(example()).splitlines())) <= 100


# ---- seeds ----


def test_seeds_have_mean_and_spread():
    reports = []
    for seed, won in enumerate((-0.003, -0.001, 0.001)):
        report = example()
        report["what"]["seed"] = seed
        report["all_linears"]["qat_minus_ptq"]["mean"] = won
        report["ptq_gap_closed"] = 0.5 if seed == 1 else None
        reports.append(report)
    found = attach_seeds(reports)
    assert found["seeds"] == [0, 1, 2]
    won = found["metrics"]["all_linears.qat_minus_ptq.mean"]
    assert won["values"] == [-0.003, -0.001, 0.001]
    assert won["mean"] == pytest.approx(-0.001) and won["std"] == pytest.approx(0.002)
    share = found["metrics"]["ptq_gap_closed"]
    assert share == {"values": [None, 0.5, None], "mean": 0.5, "std": None}
    report = reports[0] | {"seeds": found}
    sentence = (
        "Over the seeds 0, 1, 2, all linears: QAT - PTQ is -1.00 millinats with standard deviation "
        "2.00, below 0 in 2 of 3."
    )
    assert all(sentence in text for text in said(report))
    with pytest.raises(ValueError, match="no reports"):
        attach_seeds([])


def test_side():
    assert findings.side(None) == findings.side(interval(None, -1.0, 1.0)) == ""
    assert findings.side(interval(0.5, 0.0, 1.0)) == "holds"

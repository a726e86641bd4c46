"""A sweep's numbers: what counts, what mean and spread are, what the files say."""

import csv
import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.launching.fake_sweep import ERROR, curve, finish, simple, sweep, write_json
from v4jax.launching.printable import clean, last_line
from v4jax.launching.results import (
    best,
    choose_metric,
    read_results,
    summarize,
    write_tables,
)

ROOT = Path(__file__).resolve().parents[2]


# ---- mean and spread ----


@given(st.lists(st.floats(-1e100, 1e100), min_size=1, max_size=12))
def test_summary_is_that_of_exact_arithmetic(values):
    found = summarize(values)
    exact = [Fraction(value) for value in values]
    mean = sum(exact) / len(exact)
    assert found.seeds == len(values)
    assert found.mean == float(mean)
    if len(values) == 1:
        assert found.spread is None  # unknown, which is not 0
    else:
        variance = sum((value - mean) ** 2 for value in exact) / (len(exact) - 1)
        assert Fraction(found.spread) ** 2 == pytest.approx(variance, rel=1e-12)


def test_a_seed_that_diverged_is_not_averaged_away():
    for value in (math.nan, math.inf, -math.inf):
        found = summarize([1.0, value, 2.0])
        assert math.isnan(found.mean) and found.spread is None and found.seeds == 3
    assert summarize([]) is None
    assert summarize([1.7e308, -1.7e308]).spread == math.inf


def test_seeds_are_averaged_over_and_every_other_flag_is_kept(tmp_path):
    numbers = {
        ("1e-3", "0", "a"): {"loss": 1.0},
        ("1e-3", "1", "a"): {"loss": 2.0},
        ("1e-3", "2", "a"): {"loss": 6.0},
        ("1e-3", "0", "b"): {"loss": 5.0},
        ("3e-4", "0", "a"): {"loss": 7.0},
        ("3e-4", "1", "a"): None,
    }
    found = simple(tmp_path, numbers, ("learning_rate", "seed", "kind"))
    groups = found.groups()
    assert [dict(group.settings) for group in groups] == [
        {"learning_rate": "1e-3", "kind": "a"},
        {"learning_rate": "1e-3", "kind": "b"},
        {"learning_rate": "3e-4", "kind": "a"},
    ]
    first, second, third = (group.summary("loss") for group in groups)
    assert (first.mean, first.seeds) == (3.0, 3)
    assert first.spread == pytest.approx(math.sqrt(7))  # (4 + 1 + 9) / 2
    assert (second.mean, second.spread, second.seeds) == (5.0, None, 1)
    assert (third.mean, third.seeds, len(groups[2].results)) == (7.0, 1, 2)
    assert list(found.axes) == ["learning_rate", "kind"]


def test_the_axis_may_be_called_seeds(tmp_path):
    found = simple(tmp_path, {("0",): {"x": 1}, ("5",): {"x": 3}}, ("seeds",))
    (group,) = found.groups()
    assert group.settings == {} and group.summary("x").mean == 2.0 and found.axes == {}


@given(st.lists(st.tuples(*[st.sampled_from("123")] * 3), unique=True, min_size=1))
def test_every_run_is_in_the_one_group_of_its_settings(tmp_path_factory, keys):
    folder = tmp_path_factory.mktemp("sweep")
    found = simple(folder, {key: {"x": 1.0} for key in keys}, ("a", "seed", "b"))
    groups = found.groups()
    names = [result.run.name for group in groups for result in group.results]
    assert sorted(names) == sorted(result.run.name for result in found.results)
    assert {(g.settings["a"], g.settings["b"]) for g in groups} == {(a, b) for a, _, b in keys}
    assert len(groups) == len({(a, b) for a, _, b in keys})


# ---- what counts ----


def test_only_finished_runs_have_numbers_and_the_others_say_why(tmp_path):
    plan = sweep(tmp_path, [{"n": str(n)} for n in range(9)])
    done, failed, running, _, odd, damaged, empty, alone, killed = plan.runs
    finish(done, {"loss": 1, "big": 3}, exit=0)
    finish(failed, {"loss": 9.0}, "failed", exit=1, error=ERROR)  # of an earlier attempt
    finish(running, {"loss": 9.0}, "running")
    finish(odd, {"loss": {"main": 9.0}})
    (damaged.folder / "launch").mkdir(parents=True)
    (damaged.folder / "launch" / "state.json").write_text("{")
    finish(empty, None)
    write_json(alone.folder / "result.json", {"loss": 4.0})  # started by hand, without a launcher
    finish(killed, None, "failed", exit=-9)
    found = read_results(tmp_path).results
    assert [r.state for r in found] == [
        "done", "failed", "running", "missing", "done", "damaged", "done", "done", "failed",
    ]  # fmt: skip
    assert [dict(r.numbers) for r in found] == [
        {"loss": 1.0, "big": 3.0}, {}, {}, {}, {}, {}, {}, {"loss": 4.0}, {},
    ]  # fmt: skip
    last = [last_line(r.why) for r in found]
    assert last[0] == last[2] == last[3] == last[7] == ""
    assert last[1] == "FloatingPointError: qat, step 31: loss is nan"
    assert "result.json is damaged: 'loss' is not a number" in last[4]
    assert "state.json is damaged" in last[5]
    assert "neither result.json" in last[6] and last[8] == "ended by SIGKILL"


@pytest.mark.parametrize("text", ["", "[1]", "null", "3", '{"a": "x"}', '{"a": null}', "{", "\xff"])
def test_a_damaged_result_is_listed_not_raised(tmp_path, text):
    (run,) = sweep(tmp_path, [{"n": "1"}]).runs
    finish(run, None)
    (run.folder / "result.json").write_bytes(text.encode("latin-1"))
    (found,) = read_results(tmp_path).results
    assert found.numbers == {} and "result.json is damaged" in found.why and "\n" not in found.why


def test_numbers_that_are_not_finite(tmp_path):
    (run,) = sweep(tmp_path, [{"n": "1"}]).runs
    finish(run, None)
    text = '{"a": "NaN", "b": "-Infinity", "c": NaN, "d": 1' + "0" * 400 + "}"
    (run.folder / "result.json").write_text(text)
    assert "damaged" in read_results(tmp_path).results[0].why  # no float is that large
    (run.folder / "result.json").write_text(text.replace("0" * 400, ""))
    numbers = read_results(tmp_path).results[0].numbers
    assert math.isnan(numbers["a"]) and math.isnan(numbers["c"])
    assert (numbers["b"], numbers["d"]) == (-math.inf, 1.0)


def test_without_a_result_the_last_losses_count(tmp_path):
    plan = sweep(tmp_path, [{"n": "1"}, {"n": "2"}])
    for run in plan.runs:
        finish(run, None)
    curve(plan.runs[0].folder / "pretrain", [3.0, 2.0])
    curve(plan.runs[0].folder / "control", [1.5, 1.25], 3)
    curve(plan.runs[1].folder, [4.0])
    first, second = read_results(tmp_path).results
    assert list(first.numbers.items()) == [("pretrain/loss", 2.0), ("control/loss", 1.25)]
    assert dict(second.numbers) == {"loss": 4.0}


def test_no_sweep_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^[^\n]*holds no sweep[^\n]*$"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("\x1b[31mred\x1b[0m\r\n", "red\N{REPLACEMENT CHARACTER}"),
        ("a\x00b\ud800c\u202ed", "a�b�c�d"),
        ("kept\n\ttoo: é漢☃", "kept\n\ttoo: é漢☃"),
    ],
)
def test_clean(text, cleaned):
    assert clean(text) == cleaned


# ---- the best ----


def test_best_is_by_the_mean_over_seeds_and_ties_go_to_the_first(tmp_path):
    numbers = {
        ("a", "0"): {"loss": 1.0, "recall": 0.5},  # the best single run, of the worst mean
        ("a", "1"): {"loss": 9.0, "recall": 0.5},
        ("b", "0"): {"loss": 3.0, "recall": 0.9},
        ("b", "1"): {"loss": 3.0, "recall": 0.7},
        ("c", "0"): {"loss": 3.0, "recall": 0.8},
        ("d", "0"): {"loss": -5.0, "recall": "NaN"},
        ("d", "1"): {"loss": "NaN"},
    }
    found = simple(tmp_path, numbers, ("kind", "seed"))
    group, run = best(found, "loss")
    assert group.settings == {"kind": "b"} and run.run.settings == {"kind": "d", "seed": "0"}
    group, run = best(found, "recall", highest=True)
    assert group.settings == {"kind": "b"} and run.run.settings == {"kind": "b", "seed": "0"}
    assert best(found, "nothing") is None


def test_the_metric_is_chosen_by_name_or_is_a_loss(tmp_path):
    found = simple(tmp_path, {("1",): {"accuracy": 1, "eval_loss": 2, "loss": 3}}, ("n",))
    assert choose_metric(found) == "eval_loss"
    assert choose_metric(found, "accuracy") == "accuracy"
    with pytest.raises(ValueError) as caught:
        choose_metric(found, "recall")
    line = "--metric=recall: no finished run has it; there are: accuracy, eval_loss, loss"
    assert str(caught.value) == line
    other = simple(tmp_path / "other", {("1",): {"b": 1, "a": 2}}, ("n",))
    assert choose_metric(other) == "b"
    assert choose_metric(simple(tmp_path / "none", {("1",): None}, ("n",))) is None


# ---- the files ----


def table(path):
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def small(tmp_path):
    numbers = {
        ("1e-3", "a,b", "0"): {"loss": 0.1, "state": 1},
        ("1e-3", "a,b", "1"): {"loss": 0.2, "state": 2},
        ("1e-2", "ü", "0"): {"loss": "NaN"},
        ("1e-2", "ü", "1"): None,
    }
    return simple(tmp_path, numbers, ("rate", "kind", "seed"))


def test_csv(tmp_path):
    runs, groups, *_ = write_tables(small(tmp_path), tmp_path / "report")
    rows = table(runs)
    assert [row["rate"] for row in rows] == ["1e-3", "1e-3", "1e-2", "1e-2"]  # as it was written
    assert [row["kind"] for row in rows] == ["a,b", "a,b", "ü", "ü"]
    assert [row["loss"] for row in rows] == ["0.1", "0.2", "nan", ""]
    assert [row["state"] for row in rows] == ["done", "done", "done", "missing"]
    assert [row["state 2"] for row in rows] == ["1.0", "2.0", "", ""]  # a metric of that name
    first, second = table(groups)
    assert (first["runs"], first["done"], first["loss seeds"]) == ("2", "2", "2")
    assert float(first["loss mean"]) == pytest.approx(0.15)
    assert float(first["loss sd"]) == pytest.approx(0.1 / math.sqrt(2))
    assert (second["runs"], second["done"]) == ("2", "1")
    assert (second["loss mean"], second["loss sd"], second["state mean"]) == ("nan", "", "")
    assert "seed" not in first


def test_parquet_has_the_numbers_of_the_csv(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow: pip install pyarrow")
    runs, _, path = write_tables(small(tmp_path), tmp_path / "report")
    stored = parquet.read_table(path)
    assert [str(stored.schema.field(name).type) for name in ("rate", "kind", "seed", "loss")] == [
        "double", "string", "int64", "double",
    ]  # fmt: skip
    for row, expected in zip(stored.to_pylist(), table(runs), strict=True):
        for name, text in expected.items():
            value = row[name]
            if text == "":
                assert value is None
            elif isinstance(value, str):
                assert value == text
            else:
                assert value == float(text) or math.isnan(value) and text == "nan"


def test_without_pyarrow_one_line_says_so_and_no_old_file_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    old = tmp_path / "report" / "runs.parquet"
    old.parent.mkdir()
    old.write_bytes(b"of an older state")
    written = write_tables(small(tmp_path), tmp_path / "report")
    assert [path.name for path in written] == ["runs.csv", "table.csv"] and not old.exists()
    assert capsys.readouterr().err == (
        "report: no runs.parquet, for want of pyarrow: pip install pyarrow\n"
    )


@given(text=st.text(st.characters(), max_size=20), name=st.text(st.characters(), max_size=10))
@example("a\ud800", "b\udfff")
@example('a"\r\n,\x00', " \n")
def test_any_text_survives_the_files(tmp_path_factory, text, name):
    """Lone surrogates too, which JSON can hold and UTF-8 cannot."""
    folder = tmp_path_factory.mktemp("sweep")
    (run,) = sweep(folder, [{"n": "1"}]).runs
    write_json(run.folder / "launch" / "state.json", {"state": "failed", "error": text})
    kept = json.loads((folder / "sweep.json").read_text())
    kept["axes"], kept["runs"][0]["settings"] = [[name, [text]]], {name: text}
    (folder / "sweep.json").write_text(json.dumps(kept))
    runs, *_ = write_tables(read_results(folder), folder / "report")
    with open(runs, encoding="utf-8", newline="") as file:
        header, row = csv.reader(file)
    assert len(header) == len(row) == 4
    if text.isascii() and name not in ("run", "state") and name not in SEED_NAMES:
        assert row[header.index(name)] == text


SEED_NAMES = ("seed", "seeds", "error")


def test_importing_the_report_is_cheap():
    program = "import sys, v4jax.launching.page; print(*sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    heavy = {"jax", "numpy", "flax", "pyarrow", "matplotlib", "tensorboardX", "wandb", "mlflow"}
    assert run.returncode == 0 and not heavy & set(run.stdout.split()), run.stderr

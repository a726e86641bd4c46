"""A study's report: from files that runs left, against numbers made by hand."""

from __future__ import annotations

import json
import math
import pathlib
import types

import numpy as np
import pytest

from v4jax.analysis import study, study_plot
from v4jax.analysis.paired import Paired

STUDIES = pathlib.Path(__file__).resolve().parents[2] / "docs" / "studies"
TOKENS = np.array([10, 10, 5, 20, 10, 15])
DOCUMENT = np.array([3, 3, 7, 7, 9, 1])
WINDOWS = types.SimpleNamespace(document=DOCUMENT, mask=TOKENS[:, None])


def leave(folder, runs, fixed=("--quick",)):
    """What a sweep leaves: runs is name -> (what, arm -> nats [W])."""
    sweep = {"experiment": "demo", "fixed": list(fixed), "runs": [{"name": n} for n in runs]}
    (folder / "sweep.json").write_text(json.dumps(sweep))
    for name, (what, arms) in runs.items():
        if what is None:
            continue
        (folder / name).mkdir()
        (folder / name / "study.json").write_text(json.dumps(what))
        kept = {f"arm {arm}": nll for arm, nll in arms.items()}
        np.savez(folder / name / "losses.npz", **kept, document=DOCUMENT, tokens=TOKENS)
    return folder


def seeds(effect, count=3, noise=0.0):
    """Runs of `count` seeds whose arm "new" differs from "old" by `effect` nats a token."""
    rng = np.random.default_rng(0)
    runs = {}
    for seed in range(count):
        old = TOKENS * (3.0 + 0.1 * seed) + rng.normal(0, 1, 6)
        new = old + TOKENS * (effect + noise * (seed - (count - 1) / 2))
        what = {"seed": seed, "device": "CPU", "versions": {"jax": "0.12"}, "seconds": 2.0}
        what |= {"date": f"2026-01-0{seed + 1}", "numbers": {"new": {"s/step": 0.5 + seed}}}
        runs[f"seed={seed}"] = (what, {"old": old, "new": new})
    return runs


CLAIMS = [study.Claim("New beats old", "new", "old"), study.Claim("Old beats new", "old", "new")]
CLAIMS.append(study.Claim("Newer beats old", "newer", "old"))


def report_of(folder):
    losses = study.read(folder)
    sections = {"New and newer": [("new", "old"), ("newer", "old")]}
    curves = study.Curves("x", {"a": [(1.0, "new", "old"), (2.0, "newer", "old")]})
    lines = study.Lines("step", "nats", {"new": [(1, 5.0), (2, 9.0)], "old": [(1, 5.0), (3, 4.0)]})
    return study.make_report(losses, "A demo", sections, CLAIMS, ["A note."], curves, lines)


def test_a_report_holds_what_the_runs_left(tmp_path, capsys):
    runs = seeds(-0.01, noise=0.001)
    folder = leave(tmp_path, runs | {"seed=3": (None, {})})
    report = report_of(folder)
    ((row,),) = report["sections"].values()  # newer was not measured
    assert math.isclose(row["mean"], -0.01, abs_tol=1e-12)
    assert math.isclose(row["spread"], 0.001)
    assert [round(v, 9) for v in row["seeds"].values()] == [-0.011, -0.01, -0.009]
    # Every window differs alike, so that documents add nothing: what is left is Student's t.
    for side, sign in (("low", -1), ("high", 1)):
        assert math.isclose(row[side], -0.01 + sign * 4.303 * 0.001 / math.sqrt(3), rel_tol=0.05)
    arm = next(arm for arm in report["arms"] if arm["arm"] == "new")
    total = sum(nll["new"].sum() for _, nll in runs.values()) / TOKENS.sum() / 3
    assert math.isclose(arm["mean"], total) and arm["numbers"] == {"s/step": 1.5}
    assert report["what"]["missing"] == 1 and report["what"]["documents"] == 4
    assert report["what"]["seconds"] == 6 and report["what"]["date"] == "2026-01-03"
    assert len(report["curves"]["series"]["a"]) == 1
    study.write_report(folder, report)
    said = capsys.readouterr().out
    page = (folder / "report" / "demo.md").read_text()
    for sentence in (*(claim["sentence"] for claim in report["claims"]), "A note."):
        assert sentence in said and sentence in page
    assert "python launch.py --experiment=demo --quick --workdir=runs/" in page
    assert "device: CPU" in page and "versions: jax 0.12" in page and "missing: 1" in page
    (folder / "report" / "demo.png").unlink()
    study.main(str(folder / "report" / "demo.json"))
    assert capsys.readouterr().out == page  # numbers and words come from the JSON alone
    assert (folder / "report" / "demo.png").stat().st_size > 1000


def test_what_is_no_report_is_refused_in_one_line(tmp_path):
    whole = (STUDIES / "gap.json").read_bytes()
    for content in (None, b"", whole[: len(whole) // 2], b"[]", b"{}"):
        if content is not None:
            (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(SystemExit, match=r"^study: .*x.json: cannot be read .*; allowed: .*$"):
            study.main(str(tmp_path / "x.json"))
    assert not (tmp_path / "x.png").exists()


def test_a_claim_that_did_not_hold_is_said_to(tmp_path):
    def verdicts(name, *arguments, **options):
        (tmp_path / name).mkdir()
        found = report_of(leave(tmp_path / name, seeds(*arguments, **options)))["claims"]
        assert found[2] == {"held": None, "sentence": "Newer beats old: not measured."}
        return [(c["held"], c["sentence"]) for c in found[:2]]

    (held, good), (opposite, bad) = verdicts("clear", -0.01, noise=0.001)
    assert held and good.startswith("New beats old: held. new - old = -10.00 [-1")
    assert good.endswith("wholly below 0; below 0 on 3 of 3 seeds.")
    assert not opposite and bad.startswith("Old beats new: did not hold: the opposite did. old -")
    assert bad.endswith("wholly above 0; below 0 on 0 of 3 seeds.")
    for held, sentence in verdicts("noisy", -0.01, noise=0.02):  # one seed of three is above 0
        assert not held and ": did not hold: not told apart." in sentence
    assert "2 of 3" in verdicts("again", -0.01, noise=0.02)[0][1]
    assert verdicts("one", -0.01, count=1)[0][1].endswith("; one seed.")
    for held, sentence in verdicts("equal", 0.0):
        assert not held and sentence.endswith("which holds 0; below 0 on 0 of 3 seeds."), sentence


def test_documents_are_resampled_together_for_all_seeds():
    """Against a loop that draws documents and sums seeds: with equal seeds t adds nothing."""
    rng = np.random.default_rng(1)
    documents, count = 30, 90
    windows = types.SimpleNamespace(
        document=np.arange(count) % documents, mask=rng.random((count, 8)) < 0.7
    )
    tokens = windows.mask.sum(axis=1)
    d = rng.normal(0.02, 0.3, count) * tokens
    a = np.stack([d, d, d])
    found = Paired(windows).over_seeds(a, np.zeros_like(a))
    means = []
    for _ in range(4000):
        drawn = rng.integers(0, documents, documents)
        picked = np.concatenate([np.flatnonzero(windows.document == i) for i in drawn])
        means.append(d[picked].sum() / tokens[picked].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    assert math.isclose(found.mean, d.sum() / tokens.sum())
    assert abs(found.low - low) < 0.15 * (high - low) > abs(found.high - high)
    one = Paired(windows).over_seeds(a[:1], np.zeros_like(a[:1]))
    assert one == Paired(windows).difference(d, np.zeros(count))


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({}, "no run has left losses.npz and study.json"),
        ({"seed=1": {"seed": 0}}, "seed=1: arm 'old', seed 0 is of another run too"),
    ],
)
def test_what_cannot_be_put_together_is_one_line(tmp_path, changed, what):
    runs = seeds(0.0, count=2) if changed else {"seed=0": (None, {})}
    runs = {name: (changed.get(name, what_), arms) for name, (what_, arms) in runs.items()}
    with pytest.raises(ValueError, match=what) as error:
        study.read(leave(tmp_path, runs))
    assert "\n" not in str(error.value)


def test_arms_of_other_windows_are_not_compared(tmp_path):
    def cut(name, runs):
        (tmp_path / name).mkdir()
        folder = leave(tmp_path / name, runs)
        nats = {f"arm {arm}": np.ones(5) for arm in ("old", "new")}
        np.savez(folder / "seed=1" / "losses.npz", **nats, document=DOCUMENT[:5], tokens=TOKENS[:5])
        return folder

    with pytest.raises(ValueError, match="seed=1: arm 'old' has other windows than with other s"):
        study.read(cut("seeds", seeds(0.0, count=2)))
    # Of another text, as the label says, an arm is another arm: each is held to its own windows.
    label = lambda what: f"text{what['seed']}"  # noqa: E731
    losses = study.read(cut("texts", seeds(0.0, count=2)), label)
    assert study.difference(losses, ("text1 new", "text1 old"))["mean"] == 0
    assert losses.each("text1 new") == {1: 5 / TOKENS[:5].sum()}
    with pytest.raises(ValueError, match="^text0 new and text1 old were measured on different wi"):
        losses.arms["text1 old"][0] = losses.arms["text1 old"][1]
        study.difference(losses, ("text0 new", "text1 old"))
    report = study.make_report(losses, "Two", {})
    assert (report["what"]["windows"], report["what"]["eval_tokens"]) == ([6, 5], [70, 55])


def test_arms_of_one_name_are_told_apart_by_the_runs(tmp_path):
    runs = seeds(0.0, count=2)
    for what, _ in runs.values():
        what["size"] = f"s{what.pop('seed')}"
        what["seed"] = 0
    losses = study.read(leave(tmp_path, runs), lambda what: what["size"])
    assert list(losses.arms) == ["s0 old", "s0 new", "s1 old", "s1 new"]


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.json")), ids=lambda path: path.stem)
def test_the_pages_in_docs_say_what_their_numbers_do(path):
    report = json.loads(path.read_bytes())
    assert len(study_plot.draw(report).axes) >= len(report["sections"]) > 0
    assert path.with_suffix(".md").read_text("utf-8") == study.markdown(report)
    assert report["what"]["missing"] == 0 and report["what"]["seeds"] == [0, 1, 2]
    assert f"--experiment={path.stem} " in report["command"]

"""What differs between runs besides their flags."""

from tests.launching.fake_sweep import sweep, write_json
from v4jax.launching.differences import differences


def wrote(run, commit="abc", jax="1", **config):
    write_json(run.folder / "pretrain" / "config.json", {"format": 2, "config": config})
    launch = {"commit": commit, "packages": {"jax": jax}, "argv": [run.name], "environment": {}}
    write_json(run.folder / "launch" / "command.json", launch)


def test_what_a_flag_explains_comes_last_and_names_it(tmp_path):
    plan = sweep(tmp_path, [{"rate": r, "seed": s} for r in ("1e-3", "1e-2") for s in "01"])
    for i, run in enumerate(plan.runs):
        rate = float(run.settings["rate"])
        wrote(run, optimizer={"rate": rate, "name": "muon"}, jax="2" if i == 3 else "1")
    found = differences(plan.runs)
    assert [(d.name, d.follows) for d in found] == [
        ("packages.jax", None),
        ("optimizer.rate", "rate"),
    ]
    assert found[0].values == {
        "1": ("rate=1e-3,seed=0", "rate=1e-3,seed=1", "rate=1e-2,seed=0"),
        "2": ("rate=1e-2,seed=1",),
    }
    assert list(found[1].values) == ["0.001", "0.01"]


def test_equal_runs_and_runs_that_wrote_nothing_do_not_differ(tmp_path):
    plan = sweep(tmp_path, [{"n": n} for n in "123"])
    for run in plan.runs[:2]:
        wrote(run, model={"layers": [1, 2]})
    (plan.runs[2].folder / "pretrain").mkdir(parents=True)
    (plan.runs[2].folder / "pretrain" / "config.json").write_text("{")  # half of one
    assert differences(plan.runs) == []


def test_a_key_that_only_some_have_and_arms_of_a_run_that_differ(tmp_path):
    plan = sweep(tmp_path, [{"n": n} for n in "12"])
    wrote(plan.runs[0], a=1, new=True)
    wrote(plan.runs[1], a=1)
    for run in plan.runs:  # in both runs the arm has another a: no difference between runs
        write_json(run.folder / "qat" / "config.json", {"format": 2, "config": {"a": 2}})
    (found,) = differences(plan.runs)
    assert found.name == "new" and set(found.values) == {"true", "(none)"}

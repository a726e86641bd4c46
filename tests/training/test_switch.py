"""The switch: which run branches off which, and that arms differ by the format alone."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.training import tiny
from tests.training.tiny import TIMED
from v4jax.quantization import NO_QUANTIZATION, PAPER
from v4jax.training import run_config, switch
from v4jax.training.metrics import read_metrics
from v4jax.training.observe import Pace
from v4jax.training.run import Branch, read_run_config, train
from v4jax.training.run_config import config_hash, write_config
from v4jax.training.switch import check_fit, parse_branch, run_arms, shared_pretraining
from v4jax.training.trainer import Trainer, Variant

SWITCH, STEPS = tiny.SWITCH, tiny.STEPS
PACE = Pace(log_every=1, save_every=6)
PAPER_ALONE = {"paper": PAPER}


class Recorded:
    """A trainer that notes every step it takes: (quantization, state before, batch)."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.steps = trainer, []
        inner = trainer.compiled

        def compiled(variant):
            def update(state, tokens, segment_ids):
                before = jax.tree.map(np.array, state)
                self.steps.append((variant.quantization, before, (tokens, segment_ids)))
                return inner(variant)(state, tokens, segment_ids)

            update.memory_analysis = lambda: inner(variant).memory_analysis()
            return update

        trainer.compiled = compiled

    def taken(self) -> list[tuple[object, int]]:
        """(quantization, updates done before) of the steps since the last call."""
        found = [(quantization, int(state.step)) for quantization, state, _ in self.steps]
        self.steps.clear()
        return found


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return tiny.trainer()


@pytest.fixture(scope="module")
def first(tmp_path_factory, trainer):
    """A pre-training and its two arms: `folder`, `arms`, and what the trainer did, `steps`."""
    recorded = Recorded(copy.copy(trainer))
    folder = tmp_path_factory.mktemp("runs") / "first"
    arms = run_arms(recorded.trainer, folder, switch_step=SWITCH, scopes=PAPER_ALONE, pace=PACE)
    return SimpleNamespace(folder=folder, arms=arms, steps=recorded.steps)


def lines(folder) -> list[dict]:
    return [
        {key: value for key, value in line.items() if key not in TIMED}
        for line in read_metrics(folder)
    ]


# ---- arms ----


def test_every_step_is_trained_once_and_in_order(first):
    taken = [(quantization, int(state.step)) for quantization, state, _ in first.steps]
    bf16 = [(NO_QUANTIZATION, step) for step in range(STEPS)]
    assert taken == bf16 + [(PAPER, step) for step in range(SWITCH, STEPS)]
    for name, (start, stop) in {"pretrain": (0, 12), "control": (12, 24), "qat": (12, 24)}.items():
        assert [line["step"] for line in lines(first.folder / name)] == [
            *range(start + 1, stop + 1)
        ]


def test_arms_differ_by_the_format_alone(first, trainer):
    """The same state at the switch, optimizer and all, and the same data at every step."""
    control = first.steps[SWITCH:STEPS]
    qat = first.steps[STEPS:]
    assert tiny.same_bits(control[0][1], qat[0][1])
    assert int(qat[0][1].opt_state.step) == SWITCH
    assert max(float(np.abs(m).max()) for m in jax.tree.leaves(qat[0][1].opt_state.muon)) > 0
    for (_, _, ours), (_, _, theirs), step in zip(control, qat, range(SWITCH, STEPS), strict=True):
        assert tiny.same_bits(ours, theirs) and tiny.same_bits(
            tuple(ours), tuple(trainer.batch(step))
        )
    mine, other = lines(first.folder / "control"), lines(first.folder / "qat")
    assert [x["lr_scale"] for x in mine] == [x["lr_scale"] for x in other]
    assert all(x["loss"] != y["loss"] for x, y in zip(mine, other, strict=True))
    assert not tiny.same_bits(first.arms.control.params, first.arms.qat["paper"].params)


def test_the_parameter_tree_does_not_change_at_the_switch(first):
    control, qat = first.arms.control, first.arms.qat["paper"]
    assert jax.tree.structure(control) == jax.tree.structure(qat)
    for a, b in zip(jax.tree.leaves(control), jax.tree.leaves(qat), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_the_control_is_an_uninterrupted_bf16_run(first, trainer, tmp_path):
    straight = train(trainer, tmp_path / "straight", stop=STEPS, pace=PACE)
    assert tiny.same_bits(straight, first.arms.control)
    assert lines(tmp_path / "straight") == [
        *lines(first.folder / "pretrain"),
        *lines(first.folder / "control"),
    ]


def test_what_the_arms_say_they_are(first, trainer):
    arms, folder = first.arms, first.folder
    assert arms.branch == Branch(folder / "pretrain", SWITCH)
    names = ("pretrain", "control", "qat")
    assert arms.folders == {name: folder / name for name in names}
    configs = {name: read_run_config(folder / name) for name in names}
    assert configs["pretrain"] == trainer.config
    parent = f"{trainer.config.hash}@{SWITCH}"
    assert configs["control"] == dataclasses.replace(trainer.config, parent=parent)
    assert configs["qat"] == dataclasses.replace(trainer.config, parent=parent, quantization=PAPER)
    assert switch.arm_name("paper") == "qat"
    assert switch.arm_name("all_linears") == "qat_all_linears"


def test_the_same_command_again_trains_nothing(first, trainer):
    recorded = Recorded(copy.copy(trainer))
    again = run_arms(
        recorded.trainer, first.folder, switch_step=SWITCH, scopes=PAPER_ALONE, pace=PACE
    )
    assert recorded.taken() == []
    assert tiny.same_bits(again.control, first.arms.control)
    assert tiny.same_bits(again.qat, first.arms.qat)


def test_steps_are_traced_by_the_caller_and_compiled_once_and_only_for_what_is_left(first):
    """JAX's contexts, such as a matmul precision, are those of the thread that traces."""
    trainer, compiled = tiny.trainer(), []
    trainer._lowered = lambda variant: threading.current_thread()

    def compile(tracer):
        compiled.append((tracer, threading.current_thread()))
        return "compiled"

    trainer._compile = compile
    train(trainer, first.folder / "pretrain", stop=SWITCH)  # it is there already
    with pytest.raises(ValueError, match="past step 3"):
        train(trainer, first.folder / "pretrain", stop=3)
    assert not compiled
    trainer.start_compiling(Variant(NO_QUANTIZATION, trainer.stages[-1].program))
    assert trainer.step(NO_QUANTIZATION) == trainer.step(NO_QUANTIZATION) == "compiled"
    [(tracer, compiler)] = compiled
    assert tracer is threading.current_thread() is not compiler


def test_another_configuration_in_the_same_folder_is_refused(first, trainer):
    changed = copy.copy(trainer)
    changed.config = dataclasses.replace(trainer.config, seed=5)
    with pytest.raises(
        ValueError, match=r"first/pretrain holds a run of another .*seed is 0 there, 5"
    ):
        run_arms(changed, first.folder, switch_step=SWITCH, scopes=PAPER_ALONE, pace=PACE)


# ---- one pre-training for many ----


def test_a_sibling_shares_the_pretraining(first, trainer, capsys):
    recorded = Recorded(copy.copy(trainer))
    folder = first.folder.parent / "second"
    arms = run_arms(recorded.trainer, folder, switch_step=SWITCH, scopes=PAPER_ALONE, pace=PACE)
    assert [step for _, step in recorded.taken()] == [*range(SWITCH, STEPS)] * 2
    assert arms.branch == Branch(folder / "pretrain", SWITCH)
    assert arms.folders["pretrain"] == folder / "pretrain"
    assert read_metrics(folder / "pretrain") == read_metrics(first.folder / "pretrain")
    assert tiny.same_bits(arms.control, first.arms.control)
    assert tiny.same_bits(arms.qat, first.arms.qat)
    said = f"pre-training copied from {first.folder / 'pretrain'}, {SWITCH} steps: "
    assert said in capsys.readouterr().out


def test_a_later_switch_goes_on_from_what_a_sibling_has(first, trainer):
    recorded, later = Recorded(copy.copy(trainer)), SWITCH + 2
    folder = first.folder.parent / "later"
    run_arms(recorded.trainer, folder, switch_step=later, scopes=PAPER_ALONE, pace=PACE)
    pretrained = [*range(SWITCH, later)]
    assert [step for _, step in recorded.taken()] == pretrained + [*range(later, STEPS)] * 2
    phases = json.loads((folder / "phases.json").read_text())
    assert phases == [
        {"name": "pretrain", "first": 0, "last": later},
        {"name": "control", "first": later, "last": STEPS},
        {"name": "qat", "first": later, "last": STEPS},
    ]
    shutil.rmtree(folder)  # or it would be the next test's sibling


def test_other_code_does_not_share(first, trainer, monkeypatch):
    workdir = first.folder.parent / "third"
    assert shared_pretraining(trainer, workdir, SWITCH) is not None
    monkeypatch.setattr(run_config, "source_hash", lambda: "0" * 12)
    assert shared_pretraining(trainer, workdir, SWITCH) is None


def test_a_damaged_sibling_is_passed_over(first, trainer, tmp_path):
    shutil.copytree(first.folder / "pretrain", tmp_path / "a/pretrain")
    assert shared_pretraining(trainer, tmp_path / "b", SWITCH) is not None
    (tmp_path / f"a/pretrain/checkpoints/{SWITCH}/record.json").unlink()
    assert shared_pretraining(trainer, tmp_path / "b", SWITCH) is None


def test_arms_of_another_switch_in_the_same_folder_are_refused_before_training(first, trainer):
    recorded = Recorded(copy.copy(trainer))
    with pytest.raises(ValueError, match="holds a run of another configuration.*parent"):
        run_arms(
            recorded.trainer,
            first.folder,
            switch_step=SWITCH + 2,
            scopes=PAPER_ALONE,
            pace=PACE,
        )
    assert recorded.taken() == []


def leaves(value, path=()):
    """(path, value) of everything in nested dicts and lists that is neither."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list | tuple) and value:
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


def changed(value, path):
    """A copy of nested dicts and lists with another value at `path`."""
    value = json.loads(json.dumps(value))
    at = value
    for key in path[:-1]:
        at = at[key]
    old = at[path[-1]]
    at[path[-1]] = f"{old}x" if old is None or isinstance(old, str | list) else old + 1
    return value


def test_any_other_configuration_does_not_share(first, trainer):
    config = trainer.config.to_dict()
    paths = [path for path, _ in leaves(config)]
    assert ("model", "hidden_size") in paths and ("quantization", "rules") in paths
    assert {path[0] for path in paths} == {f.name for f in dataclasses.fields(trainer.config)}
    workdir = first.folder.parent / "third"

    def trainer_of(hash):
        return SimpleNamespace(
            run_config=lambda _: SimpleNamespace(hash=hash),
            abstract_state=lambda _: trainer.abstract_state(),
        )

    same = shared_pretraining(trainer_of(config_hash(config)), workdir, SWITCH)
    assert same is not None and same.step == SWITCH
    for path in paths:
        other = config_hash(changed(config, path))
        assert shared_pretraining(trainer_of(other), workdir, SWITCH) is None, path


def test_no_sharing_without_a_step_or_with_a_beginning_of_ones_own(first, trainer):
    parent = first.folder.parent
    assert shared_pretraining(trainer, parent / "third", PACE.save_every - 1) is None
    assert shared_pretraining(trainer, parent / "third", SWITCH - 1).step == PACE.save_every
    assert shared_pretraining(trainer, parent / "third", SWITCH).step == SWITCH
    assert shared_pretraining(trainer, first.folder, SWITCH) is None
    assert shared_pretraining(trainer, parent / "no/such", SWITCH) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": 99, "config": {}}',
        '{"format": 1, "config": {}}',
        '{"format": 1, "config": {"quantization": 3}}',
        '{"format": 1, "config": {"quantization": {"rules": []}, "model": {}}}',
    ],
)
def test_folders_that_are_not_ours_are_passed_over(first, trainer, tmp_path, text):
    odd = tmp_path / "a/pretrain"
    odd.mkdir(parents=True)
    (odd / "config.json").write_text(text)
    assert shared_pretraining(trainer, tmp_path / "b", SWITCH) is None
    (tmp_path / "c").symlink_to(first.folder)
    assert shared_pretraining(trainer, tmp_path / "b", SWITCH).step == SWITCH


# ---- --from_checkpoint ----


def test_arms_branch_off_any_checkpoint_of_any_run(first, trainer, tmp_path):
    """From step 6, six steps before the other arms: the control still ends in the same bits."""
    recorded = Recorded(copy.copy(trainer))
    arms = run_arms(
        recorded.trainer,
        tmp_path / "elsewhere",
        switch_step=SWITCH,
        scopes=PAPER_ALONE,
        pace=PACE,
        from_checkpoint=f"{first.folder / 'pretrain'}@6",
    )
    assert [step for _, step in recorded.taken()] == [*range(6, STEPS)] * 2
    assert arms.branch == Branch(first.folder / "pretrain", 6)
    assert tiny.same_bits(arms.control, first.arms.control)
    assert not tiny.same_bits(arms.qat["paper"].params, first.arms.qat["paper"].params)


def test_branches_are_parsed(first):
    folder = first.folder / "pretrain"
    assert parse_branch(str(folder)) == Branch(folder, SWITCH)
    assert parse_branch(f"{folder}@6") == Branch(folder, 6)
    assert parse_branch(f"{folder}/@12").step == 12
    named = first.folder.parent / "run@7"
    named.symlink_to(folder)
    assert parse_branch(f"{named}@12") == Branch(named, 12)


@pytest.mark.parametrize("suffix", ["@5", "@", "@-4", "@6@", "@x", "/no"])
def test_what_is_not_a_checkpoint_is_one_line(first, suffix):
    text = f"{first.folder / 'pretrain'}{suffix}"
    with pytest.raises(ValueError) as error:
        parse_branch(text)
    message = str(error.value)
    assert message.startswith(f"--from_checkpoint={text}: ") and "\n" not in message
    assert message.endswith("has: 6, 12" if suffix == "@5" else "has: none")


def test_a_misfit_names_the_fields(first, trainer, tmp_path):
    branch = Branch(first.folder / "pretrain", SWITCH)
    config = trainer.config

    def refused(other) -> str:
        with pytest.raises(ValueError) as error:
            check_fit(SimpleNamespace(config=other), branch)
        message = str(error.value)
        assert "\n" not in message and str(branch.folder) in message
        return message.split("does not fit: ")[-1]

    model = dataclasses.replace(config.model, hidden_size=64, index_topk=5)
    assert refused(dataclasses.replace(config, model=model)) == (
        "model.hidden_size is 32 there, 64 here, model.index_topk is 3 there, 5 here"
    )
    for name, value in {"seed": 3, "sequence_length": 16, "batch_size": 4, "data": "x"}.items():
        found = refused(dataclasses.replace(config, **{name: value}))
        assert re.fullmatch(rf"{name} is .* there, {value!r} here", found)
    ramp = dataclasses.replace(config.schedule, batch_sizes=((0, 1), (4, 2)))
    found = refused(dataclasses.replace(config, schedule=ramp))
    assert found.endswith("has taken 24 rows of data, this one would have taken 20")
    ended = dataclasses.replace(config, schedule=tiny.schedule(SWITCH))
    assert "nothing is left to train, the run ends at step 12" in refused(ended)
    check_fit(
        SimpleNamespace(config=dataclasses.replace(config, schedule=tiny.schedule(13))), branch
    )
    write_config(tmp_path, {"a": 1})
    with pytest.raises(ValueError, match="holds no run"):
        check_fit(trainer, Branch(tmp_path / "none", 1))


def test_another_optimizer_state_is_one_line(first, trainer, tmp_path):
    """Without the indexer's loss its leaves have no state: such a run cannot go on from one."""
    frozen = tiny.trainer(
        optimizer=dataclasses.replace(trainer.config.optimizer, train_indexer=False),
        objective=dataclasses.replace(trainer.config.objective, index=0.0),
    )
    with pytest.raises(ValueError, match="does not fit this configuration: opt_state/") as error:
        run_arms(
            frozen,
            tmp_path / "run",
            switch_step=SWITCH,
            scopes=PAPER_ALONE,
            pace=PACE,
            from_checkpoint=str(first.folder / "pretrain"),
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("step", [-1, 0, STEPS, STEPS + 1])
def test_the_switch_lies_within_the_run(trainer, tmp_path, step):
    with pytest.raises(ValueError, match=rf"^--qat_start: step {step} is not within 1\.\.23$"):
        run_arms(trainer, tmp_path / "run", switch_step=step, scopes=PAPER_ALONE, pace=PACE)
    assert list(tmp_path.iterdir()) == []


# ---- seconds a step ----


def test_steps_are_timed_in_turn(first, trainer):
    state = first.arms.control
    before = jax.tree.map(np.array, state)
    recorded = Recorded(copy.copy(trainer))
    found = switch.alternate_steps(recorded.trainer, state, pairs=3)
    assert [q for q, _ in recorded.taken()] == [NO_QUANTIZATION, PAPER] * 4
    assert tiny.same_bits(before, jax.tree.map(np.asarray, state))
    assert set(found) == {"bf16", "qat", "ratio", "ratio_low", "ratio_high", "pairs"}
    assert found["pairs"] == 3 and found["bf16"] > 0 and found["qat"] > 0
    assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]

"""Runs that go back to a checkpoint: after a spike, and after steps that are not finite."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training import recovery_worker, tiny
from tests.training.recovery_worker import JUMP, PACE, STEPS
from v4jax.training.checkpoint import Checkpointer
from v4jax.training.data import Batch
from v4jax.training.journal import read_events, read_undone
from v4jax.training.metrics import read_metrics
from v4jax.training.observe import Pace
from v4jax.training.run import checkpoints_needed, train
from v4jax.training.stability import StabilityConfig

ROOT = Path(__file__).resolve().parents[2]


def outcome(folder: Path, on_spike: str):
    """What must not depend on kills: lines but their times, events, the last checkpoint."""
    lines = [dict(line) for line in read_metrics(folder)]
    for line in lines:
        for timed in tiny.TIMED:
            del line[timed]
    abstract = recovery_worker.trainer(on_spike).abstract_state()
    with Checkpointer(folder / "checkpoints") as checkpointer:
        return lines, read_events(folder), checkpointer.restore(abstract)


@pytest.fixture(
    scope="module", params=[pytest.param("anticipate", marks=pytest.mark.slow), "rollback"]
)
def undisturbed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    train(recovery_worker.trainer(request.param), folder, stop=STEPS, pace=PACE)
    return request.param, folder


def test_a_spike_is_shown_undone_and_gone(undisturbed):
    on_spike, folder = undisturbed
    lines, events, last = outcome(folder, on_spike)
    names = [(event["step"], event["event"]) for event in events]
    assert names[:2] == [(JUMP, "spike"), (JUMP, on_spike)] and events[1]["to"] == 30
    undone = read_undone(folder)
    assert [line["step"] for line in undone] == [JUMP + 1] and undone[0]["rollback"] == 1
    assert [line["step"] for line in lines] == [1, *range(2, STEPS + 1, 2)]
    assert last.step == STEPS and last.meta["watch"]["recovery"]["rollbacks"] == 1
    if on_spike == "anticipate":  # the same data again: the batch itself is bad here
        phases = [(event["step"], event["phase"]) for event in events if "phase" in event]
        assert phases == [(31, "ramp"), (34, "active"), (38, "drain"), (41, "normal")]
        assert last.meta["watch"]["recovery"]["skips"] == []
    else:  # steps 31 on with what step 32 had
        assert last.meta["watch"]["recovery"]["skips"] == [[30, 2]]


def test_a_spike_at_a_step_that_is_saved_is_in_the_metrics_too(tmp_path):
    trainer = recovery_worker.trainer("note")
    train(trainer, tmp_path, stop=JUMP + 2, pace=Pace(log_every=100, save_every=JUMP))
    told = {line["step"]: line.get("spike_onset") for line in read_metrics(tmp_path)}
    assert told == {1: None, JUMP: JUMP, JUMP + 2: None}


INSTANTS = {
    # As it looks ahead after the return (twice), in the ramp, at work (twice), in the drain, after.
    "anticipate": [("64", 1), ("60", 2), ("64", 2), ("72", 1), ("78", 1), ("74", 1), ("84", 1)],
    "rollback": [("64", 1), ("62", 2), ("90", 1)],
}


@pytest.mark.slow
def test_kill_9_in_every_phase(undisturbed, tmp_path):
    """Killed as it asks for certain rows of data, each time a little further on."""
    on_spike, folder = undisturbed
    command = [sys.executable, "-m", "tests.training.recovery_worker", str(tmp_path), on_spike]
    for rows, times in INSTANTS[on_spike]:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                times -= line.strip() == f"rows {rows}"
                if not times:
                    break
            else:
                raise AssertionError(f"ended before it asked for rows {rows}")
            worker.kill()
        assert worker.returncode == -signal.SIGKILL
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    ours, theirs = outcome(tmp_path, on_spike), outcome(folder, on_spike)
    assert ours[:2] == theirs[:2] and ours[2].meta == theirs[2].meta
    assert tiny.same_bits(ours[2].state, theirs[2].state)


# ---- not finite ----


POISON = 255
"""A byte that no document has; its embedding is not finite here."""


def poisoned(at, **changes):
    """A trainer whose rows of the updates `at` hold the byte."""
    stability = StabilityConfig(max_nonfinite=2, max_rollbacks=1)
    made = tiny.trainer(**{"stability": stability} | changes)
    rows, fresh = made.rows, made.initial_state

    def with_poison(first: int, count: int) -> Batch:
        batch = rows(first, count)
        if first // count + 1 in at:
            batch.tokens[0, 3] = POISON
        return batch

    def initial_state(config=None):
        state = fresh(config)
        table = state.params["embed_tokens"]["weight"]
        state.params["embed_tokens"]["weight"] = table.at[POISON].set(jnp.inf)
        return state

    made.rows, made.initial_state = with_poison, initial_state
    return made


def test_a_step_that_is_not_finite_is_not_applied(tmp_path):
    trainer = poisoned({3})
    state = trainer.initial_state()
    update = trainer.step(trainer.config.quantization)
    for step in range(2):
        state, _ = update(state, *trainer.batch(step))
    before = jax.tree.map(np.asarray, state)
    state, metrics = update(state, *trainer.batch(2))
    assert not np.isfinite(metrics["loss"]) and metrics["applied"] == 0
    assert tiny.same_bits(state[1:], before[1:]) and state.step == 3
    state, metrics = update(state, *trainer.batch(3))
    assert np.isfinite(metrics["loss"]) and metrics["applied"] == 1


def test_two_in_a_row_go_back_and_skip_their_data(tmp_path):
    trainer = poisoned({7, 11, 12})
    train(trainer, tmp_path, stop=20, pace=Pace(log_every=1, save_every=4))
    events = [(e["step"], e["event"]) for e in read_events(tmp_path)]
    wrong = [(step, "not finite") for step in (7, 11, 12)]
    assert events == [*wrong, (12, "rollback")]
    assert read_events(tmp_path)[-1] | {"why": ""} == {
        "step": 12, "event": "rollback", "to": 8, "why": "", "rows": 4 * tiny.BATCH_SIZE
    }  # fmt: skip
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["step"] for line in lines if not np.isfinite(line["loss"])] == [7]
    # What follows is a run on the data without the batches 8 to 11.
    plain = poisoned({7})
    rows = plain.rows
    skip = 4 * tiny.BATCH_SIZE
    plain.rows = lambda first, count: rows(first + skip * (first >= 16), count)
    train(plain, tmp_path / "plain", stop=20, pace=Pace(log_every=1, save_every=4))
    expected = read_metrics(tmp_path / "plain")
    assert str([x["loss"] for x in lines]) == str([x["loss"] for x in expected])


def test_when_going_back_does_not_help_the_run_ends_with_a_good_checkpoint(tmp_path):
    trainer = poisoned(set(range(6, 30)))
    with pytest.raises(FloatingPointError) as error:
        train(trainer, tmp_path, stop=20, pace=Pace(log_every=1, save_every=4))
    assert str(error.value) == (
        f"{tmp_path.name}: loss or gradient not finite in steps 5 to 6, after 1 returns to a "
        "checkpoint; checkpoint 4 is good"
    )
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        state = checkpointer.restore(trainer.abstract_state(), 4).state
    finite = jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), state.opt_state)
    assert all(jax.tree.leaves(finite))


def test_an_outlier_is_left_out_and_told(tmp_path):
    """64 known steps, then noise: its gradient is far from theirs."""
    from v4jax.training.spikes import SpikeConfig

    stability = StabilityConfig(skip_sigma=6.0, spikes=SpikeConfig(warmup=1000))
    trainer = tiny.trainer(
        model=tiny.model(num_nextn_predict_layers=0),
        schedule=dataclasses.replace(tiny.schedule(80), decay_start=1.0),
        stability=stability,
        optimizer=dataclasses.replace(tiny.config("").optimizer, learning_rate=1e-4),
    )
    rows = trainer.rows

    def noisy(first: int, count: int) -> Batch:
        batch = rows(first, count)
        if first == 70 * count:
            return Batch(np.full_like(batch.tokens, 254), np.ones_like(batch.tokens))
        return batch

    trainer.rows = noisy
    train(trainer, tmp_path, stop=75, pace=Pace(log_every=1, save_every=100))
    assert (71, "outlier") in [(e["step"], e["event"]) for e in read_events(tmp_path)]
    left_out = [line["step"] for line in read_metrics(tmp_path) if not line["applied"]]
    assert 71 in left_out


def test_checkpoints_reach_back_before_any_onset():
    config = StabilityConfig()
    for save_every in (1, 10, 64, 100):
        kept = checkpoints_needed(config, save_every)
        assert (kept - 2) * save_every >= config.spikes.lookback + 1

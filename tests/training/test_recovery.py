"""Decisions after spikes and losses that are not finite: host numbers alone, no model."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from v4jax.training.anticipation import Active
from v4jax.training.recovery import Recovery, Return, Ruin, Watch
from v4jax.training.spikes import SpikeConfig
from v4jax.training.stability import StabilityConfig

SPIKES = SpikeConfig(warmup=10, lookback=8, cooldown=20)
NOTE = StabilityConfig(spikes=SPIKES, delay_steps=3, active_steps=10)
SKIP = dataclasses.replace(NOTE, on_spike="rollback")
ANTICIPATE = dataclasses.replace(NOTE, on_spike="anticipate")


def losses(count: int, jump: int | None = None) -> list[float]:
    """Around 3, with noise; two steps from `jump` (counted from 1) on are far above."""
    found = 3 + 0.01 * np.random.default_rng(0).standard_normal(count)
    if jump is not None:
        found[jump - 1 : jump + 1] += (0.05, 1.0)
    return found.tolist()


def follow(config, values, recovery=None, first=0):
    """(recovery, verdict, step) after the first verdict, or after all the values."""
    recovery = Recovery.begin(config) if recovery is None else recovery
    for step, loss in enumerate(values, first + 1):
        recovery, verdict = recovery.saw(config, step, loss, 1.0, True)
        if verdict is not None:
            return recovery, verdict, step
    return recovery, None, first + len(values)


def names(recovery):
    return [(event["step"], event["event"]) for event in recovery.events]


def test_a_spike_is_only_noted_unless_more_is_asked_for():
    recovery, verdict, _ = follow(NOTE, losses(40, jump=30))
    assert verdict is None and names(recovery) == [(31, "spike")]
    assert recovery.events[0]["onset"] == 30


@pytest.mark.parametrize("config", [SKIP, ANTICIPATE])
def test_a_spike_sends_the_run_back_before_its_onset(config):
    recovery, verdict, step = follow(config, losses(40, jump=30))
    assert step == 31 and isinstance(verdict, Return)
    assert (verdict.step, verdict.before, verdict.event) == (31, 30, config.on_spike)


def test_a_return_skips_the_data_up_to_the_spike():
    there, _, _ = follow(SKIP, losses(28))
    recovery, order, _ = follow(SKIP, losses(40, jump=30))
    back = recovery.back(SKIP, order, there, 28, rows=3 * 4)  # steps 29, 30, 31 of four rows
    assert back.skips == ((28, 12),) and back.active is None
    assert (back.skipped(27), back.skipped(28), back.skipped(500)) == (0, 12, 12)
    assert names(back) == [(31, "spike"), (31, "rollback")] and back.rollbacks == 1
    assert back.spikes == there.spikes  # what comes is other data: it may be as bad


def test_a_second_return_to_before_the_first_skips_the_data_of_both():
    """Rows of 4 a step: 28..31 were skipped before 28; the run went on with row 128 at step 28."""
    recovery = Recovery(skips=((28, 16),), rollbacks=1)
    order = Return(35, 34, "why", "rollback")
    back = recovery.back(SKIP, order, Recovery(), 25, rows=10 * 4)
    # Update 35 took rows 4 * 34 + 16 .. 4 * 34 + 19; the next at step 25 takes 4 * 34 + 20 on, and
    # as it is the second return, two steps more, as many as the jump had.
    assert back.skips == ((25, 56 + 8),) and 4 * 25 + back.skipped(25) == 4 * 34 + 20 + 8


@pytest.mark.parametrize("bad", range(1, 8))
def test_three_returns_get_past_a_run_of_bad_batches(bad):
    """Batches of 4 rows, checkpoints every 7 steps; `bad` of them from the 30th on are noise."""
    batches = losses(80)
    batches[29 : 29 + bad] = [5.0] * bad
    recovery, step, saved, trained = Recovery.begin(SKIP), 0, {}, []
    while step < 60:
        if step % 7 == 0:
            saved[step] = recovery
        at = step + recovery.skipped(step) // 4
        trained = [*trained[:step], at + 1]
        step += 1
        recovery, order = recovery.saw(SKIP, step, batches[at], 1.0, True)
        if order is not None:
            to = max(s for s in saved if s < order.before)
            recovery = recovery.back(SKIP, order, saved[to], to, (order.step - to) * 4)
            step = to
    assert recovery.rollbacks <= 3 and not set(trained) & set(range(30, 30 + bad))
    assert len(set(trained)) == 60 and trained == sorted(trained)
    assert max(trained) - 60 <= 2 + bad + 4  # good ones that were lost: those from step 28 on too


def test_anticipatory_routing_runs_its_course_and_leaves_the_data():
    there, _, _ = follow(ANTICIPATE, losses(28))
    recovery, order, _ = follow(ANTICIPATE, losses(40, jump=30))
    back = recovery.back(ANTICIPATE, order, there, 28, rows=12)
    assert back.active == Active(28, 38) and back.skips == ()
    after, verdict, _ = follow(ANTICIPATE, losses(50)[28:], back, 28)
    assert verdict is None
    phases = [(e["step"], e["phase"]) for e in after.events if "phase" in e]
    assert phases == [(29, "ramp"), (32, "active"), (36, "drain"), (39, "normal")]
    lags = [after.lag(ANTICIPATE, step) for step in range(27, 39)]
    assert lags == [None, 0, 1, 2, 3, 3, 3, 3, 3, 3, 3, None]


def test_no_return_while_routes_are_older_nor_after_the_last_allowed():
    busy = Recovery(active=Active(20, 40))
    recovery, verdict, _ = follow(ANTICIPATE, losses(40, jump=30), busy)
    assert verdict is None and (31, "spike") in names(recovery)
    spent = Recovery(rollbacks=ANTICIPATE.max_rollbacks)
    recovery, verdict, _ = follow(ANTICIPATE, losses(40, jump=30), spent)
    assert verdict is None and (31, "spike") in names(recovery)


def test_every_batch_is_looked_at_once_and_before_its_step():
    for delay in (0, 1, 3):
        active, seen = Active(5, 15), []
        for step in range(20):
            ahead = list(active.ahead(step, delay))
            seen += [(step, batch) for batch in ahead]
            lag = active.lag(step, delay)
            assert (lag is None) == (not 5 <= step < 15)
            if lag is not None:  # by the parameters `lag` steps before
                assert [at for at, batch in seen if batch == step] == [step - lag]
        assert sorted(batch for _, batch in seen) == list(range(5, 15))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_three_steps_that_are_not_finite_send_the_run_back_and_then_end_it(wrong):
    recovery = Recovery.begin(NOTE)
    for step, loss in enumerate([3.0, wrong, 3.0, wrong, wrong], 1):
        recovery, verdict = recovery.saw(NOTE, step, loss, 1.0, not math.isnan(loss))
        assert verdict is None
    recovery, verdict = recovery.saw(NOTE, 6, 3.0, wrong, False)  # the gradient counts too
    assert isinstance(verdict, Return)
    assert (verdict.step, verdict.before, verdict.event) == (6, 4, "rollback")
    assert names(recovery) == [(2, "not finite")] + [(s, "not finite") for s in (4, 5, 6)]
    spent = dataclasses.replace(recovery, failed=2, rollbacks=3)
    _, verdict = spent.saw(NOTE, 6, wrong, 1.0, False)
    assert isinstance(verdict, Ruin)
    assert (
        verdict.why
        == "loss or gradient not finite in steps 4 to 6, after 3 returns to a checkpoint"
    )


def test_a_step_left_out_is_told():
    recovery, verdict = Recovery().saw(NOTE, 7, 3.0, 9.0, False)
    assert verdict is None and names(recovery) == [(7, "outlier")]


@pytest.mark.parametrize("saves", [1, 7])
@pytest.mark.parametrize("config", [NOTE, SKIP, ANTICIPATE])
def test_a_watch_tells_the_same_however_often_it_is_kept_and_read_again(config, saves):
    """A run that is ended at every checkpoint; what is kept goes through JSON."""
    expected, verdict, told_at = follow(config, losses(40, jump=30))
    watch, told = Watch(config, Recovery.begin(config)), []
    for step, loss in enumerate(losses(40, jump=30), 1):
        order = watch.saw(step, {"loss": loss, "grad_norm": 1.0, "applied": 1.0})
        told += [(step, order)] if order else []
        if step % saves == 0:
            watch = Watch.resumed(config, json.loads(json.dumps(watch.keep())))
    assert told == ([(told_at + 1, verdict)] if verdict else [])
    assert watch.recovery.events[: len(expected.events)] == expected.events


def test_the_last_step_is_looked_at_too():
    watch = Watch(SKIP, Recovery.begin(SKIP))
    for step, loss in enumerate(losses(31, jump=30), 1):
        assert watch.saw(step, {"loss": loss, "grad_norm": 1.0, "applied": 1.0}) is None
    assert isinstance(watch.last(), Return) and watch.last() is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("on_spike", "panic"),
        ("anticipate_from", -1),
        ("delay_steps", -1),
        ("active_steps", 16),
        ("skip_sigma", -1.0),
        ("max_nonfinite", 0),
        ("max_rollbacks", True),
    ],
)
def test_wrong_values_are_one_line(name, value):
    with pytest.raises(ValueError, match=rf"^StabilityConfig\.{name}: got .*allowed: [^\n]*$"):
        StabilityConfig(**{name: value})

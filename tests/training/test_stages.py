"""Stages against loops over every step; what their checks refuse; the data under any schedule."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.test_data import numbered
from v4jax.training.data import Batch, cut, predicted
from v4jax.training.optimizer import OptimizerConfig
from v4jax.training.schedule import ScheduleConfig, learning_rate_scale, phase
from v4jax.training.stages import (
    Stage,
    check_stages,
    check_switch,
    rows_before,
    stage_of,
    stage_table,
    stages,
)

LENGTH, MOST = 12, 24  # tokens a row, steps
STEPS = jnp.arange(MOST + 3)  # one shape, compiled once
# Report 4.2.2 in small: everything at once, starts as steps and as fractions.
WHOLE = ScheduleConfig(
    total_steps=20,
    warmup_steps=2,
    decay_start=14,
    decay_end=18,
    dense_until=0.3,
    indexer_warmup=2,
    index_start=4,
    lengths=((0, 4), (0.5, 6), (15, 12)),
    batch_sizes=((0, 2), (6, 4), (10, 8)),
)


@st.composite
def schedules(draw, multiple=1):
    """(schedule, batch size) of rows of LENGTH tokens; batch sizes are multiples of `multiple`."""
    total = draw(st.integers(1, MOST))

    def steps(low, high):
        step = draw(st.integers(low, high))
        return draw(st.sampled_from([step, step / total]))

    def growing(values):
        starts = draw(st.sets(st.integers(1, max(total - 1, 1)), max_size=len(values) - 1))
        starts = [0, *sorted(starts)] if total > 1 else [0]
        chosen = values[len(values) - len(starts) :]  # ends with the last one
        return tuple(
            (draw(st.sampled_from([at, at / total])), value)
            for at, value in zip(starts, chosen, strict=True)
        )

    rows = sorted(draw(st.sets(st.integers(1, 5), min_size=1, max_size=4)))
    batch_sizes = growing([multiple * count for count in rows])
    dense = draw(st.integers(0, total))
    warmup = draw(st.integers(0, total - dense))
    decay = draw(st.integers(dense + warmup, total))
    schedule = ScheduleConfig(
        total,
        warmup_steps=steps(0, dense),
        decay_start=decay,
        decay_end=steps(decay, total),
        dense_until=dense,
        indexer_warmup=warmup,
        index_start=steps(0, dense),
        lengths=draw(st.sampled_from([(), growing([1, 2, 4, 12]), growing([3, 6, 12])])),
        batch_sizes=draw(st.sampled_from([batch_sizes, ((0, batch_sizes[-1][1]),)])),
    )
    return schedule, batch_sizes[-1][1]


def steps_of(schedule, value):
    return value if isinstance(value, int) else round(value * schedule.total_steps)


def by_loop(schedule, batch_size, step):
    """(only the indexer, dense, length, rows) of a step, from the schedule's fields alone."""
    dense = steps_of(schedule, schedule.dense_until)
    warm = dense + steps_of(schedule, schedule.indexer_warmup)
    length, rows = LENGTH, batch_size
    for name in ("lengths", "batch_sizes"):
        value = LENGTH if name == "lengths" else batch_size
        for start, number in getattr(schedule, name):
            if step >= steps_of(schedule, start):
                value = number
        length, rows = (value, rows) if name == "lengths" else (length, value)
    return dense <= step < warm, step < warm, length, rows


@given(schedules())
@settings(max_examples=60)
def test_stages_partition_the_steps_as_a_loop_over_them_does(drawn):
    schedule, batch_size = drawn
    found = stages(schedule, LENGTH, batch_size)
    check_stages(schedule, LENGTH, batch_size, index_weight=1.0)
    steps = [step for stage in found for step in range(stage.first, stage.last)]
    assert steps == list(range(schedule.total_steps))
    taken = 0
    for step in steps:
        stage = stage_of(found, step)
        assert stage.first <= step < stage.last
        assert stage[2:] == by_loop(schedule, batch_size, step)
        assert rows_before(schedule, batch_size, step) == taken
        taken += stage.rows
    for more in range(3):  # past the end nothing changes any more
        step = schedule.total_steps + more
        assert rows_before(schedule, batch_size, step) == taken + more * batch_size
        assert stage_of(found, step) == found[-1]
    for before, after in zip(found[:-1], found[1:], strict=True):
        assert before[2:] != after[2:]
    # The traced settings say the same.
    now = phase(schedule, STEPS)
    dense, index = (field.tolist()[: schedule.total_steps] for field in (now.dense, now.index))
    assert dense == [stage_of(found, step).dense for step in steps]
    start = steps_of(schedule, schedule.index_start)
    assert index == [step >= start for step in steps]
    assert all(i for stage in found if stage.only_indexer for i in index[stage.first : stage.last])


@given(schedules())
@settings(max_examples=60)
def test_the_learning_rate_as_a_loop_over_the_steps_has_it(drawn):
    schedule, _ = drawn
    names = ("warmup_steps", "decay_start", "decay_end")
    warmup, start, end = (steps_of(schedule, getattr(schedule, name)) for name in names)
    expected = []
    for step in STEPS.tolist():
        scale = 1.0
        if step < warmup:
            scale = (step + 1) / warmup
        elif step > start:
            part = (step - start) / (end - start) if step < end else 1.0
            scale = 0.1 + 0.9 * (1 + math.cos(math.pi * part)) / 2
        expected.append(scale)
    got = learning_rate_scale(schedule, STEPS)
    np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_decay_end_by_hand():
    schedule = ScheduleConfig(20, warmup_steps=0, decay_start=8, decay_end=0.6)  # step 12
    got = [float(learning_rate_scale(schedule, step)) for step in (8, 9, 10, 11, 12, 13, 19, 99)]
    wanted = [1.0, 0.1 + 0.9 * 0.8535534, 0.55, 0.1 + 0.9 * 0.1464466, 0.1, 0.1, 0.1, 0.1]
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_stages_by_hand():
    assert stages(WHOLE, LENGTH, 8) == (
        Stage(0, 6, False, True, 4, 2),
        Stage(6, 8, True, True, 4, 4),
        Stage(8, 10, False, False, 4, 4),
        Stage(10, 15, False, False, 6, 8),
        Stage(15, 20, False, False, 12, 8),
    )
    assert [stage.shape(LENGTH) for stage in stages(WHOLE, LENGTH, 8)] == [
        (6, 5),
        (12, 5),
        (12, 5),
        (16, 7),
        (8, 13),
    ]
    programs = [stage.program for stage in stages(WHOLE, LENGTH, 8)]
    assert programs == [(False, 4, 2), (True, 4, 4), (False, 4, 4), (False, 6, 8), (False, 12, 8)]
    assert [rows_before(WHOLE, 8, step) for step in (0, 6, 10, 20)] == [0, 12, 28, 108]


def test_without_options_there_are_the_dense_and_the_sparse_stage():
    schedule = ScheduleConfig(10, dense_until=3, warmup_steps=0)
    assert stages(schedule, 8, 2) == (
        Stage(0, 3, False, True, 8, 2),
        Stage(3, 10, False, False, 8, 2),
    )


# ---- the data ----


def test_cut_by_hand():
    batch = Batch(
        np.array([[0, 1, 2, 3, 0, 5, 6, 7, 0], [7, 0, 9, 0, 0, 0, 0, 0, 0]], np.int32),
        np.array([[1, 1, 1, 1, 2, 2, 2, 2, 3], [1, 2, 2, 0, 0, 0, 0, 0, 0]], np.int32),
    )
    got = cut(batch, 4)
    assert got.tokens.tolist() == [
        [0, 1, 2, 3, 0],
        [0, 5, 6, 7, 0],
        [7, 0, 9, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    assert got.segment_ids.tolist() == [
        [1, 1, 1, 1, 2],
        [1, 1, 1, 1, 2],
        [1, 2, 2, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    assert got.tokens.dtype == got.segment_ids.dtype == np.int32
    assert cut(batch, 8) is batch
    assert cut(batch, 1).tokens.shape == (16, 2)
    for length in (0, 3, 16):
        with pytest.raises(ValueError, match=f"^length: {length} does not divide rows of 8 tokens"):
            cut(batch, length)


def assert_predicted_once(schedule, batch_size, lengths, seed):
    """Every token of documents of `lengths`, after its own past, in one process and in two."""
    dataset = numbered(lengths)
    before = {}  # each token's predecessor in its document, BOS at the start
    for ids in dataset.documents:
        before.update(zip(ids.tolist(), [0, *ids.tolist()], strict=False))
    found = stages(schedule, LENGTH, batch_size)
    shares = {
        n: [dataset.batches(LENGTH, batch_size, seed, i, n) for i in range(n)] for n in (1, 2)
    }
    epoch, step, seen = shares[1][0].epoch_rows, 0, {}
    while (first := rows_before(schedule, batch_size, step)) < epoch:
        stage = stage_of(found, step)
        parts = {
            n: [cut(batches.rows(first, stage.rows), stage.length) for batches in shares[n]]
            for n in shares
        }
        for whole, *halves in zip(*parts[1], *parts[2], strict=True):
            np.testing.assert_array_equal(np.concatenate(halves), whole)
        tokens, segments = parts[1][0]
        assert tokens.shape == segments.shape == stage.shape(LENGTH)
        pieces = LENGTH // stage.length * (epoch - first)  # what comes after is the next epoch's
        for row, ids in zip(tokens[:pieces], segments[:pieces], strict=True):
            used = ids[ids > 0]
            assert (ids[len(used) :] == 0).all() and set(np.diff(used)) <= {0, 1}
            assert used.size == 0 or used[0] == 1
            for i in np.flatnonzero(predicted(ids)):
                assert row[i + 1] not in seen and row[i + 1] != 0
                seen[int(row[i + 1])] = int(row[i])
        step += 1
    assert seen == before


@pytest.mark.parametrize("seed", range(3))
def test_an_epoch_is_predicted_once_by_all_lengths_and_sizes(seed):
    assert_predicted_once(WHOLE, 8, [100, 3, 0, 411, 7, 300], seed)


@pytest.mark.slow
@given(
    schedules(multiple=2),
    st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(sum),
    st.integers(0, 3),
)
@settings(max_examples=50, deadline=None)
def test_an_epoch_is_predicted_once_under_any_schedule(drawn, lengths, seed):
    assert_predicted_once(*drawn, lengths, seed)


def test_rows_are_those_of_the_batches_and_of_any_start():
    batches = numbered([50, 30, 2, 1, 7]).batches(4, 6, seed=0)
    joined = np.concatenate([batches(step).tokens for step in range(4)])
    for first, count in ((0, 6), (5, 3), (11, 13)):
        np.testing.assert_array_equal(
            batches.rows(first, count).tokens, joined[first : first + count]
        )
    halves = numbered([50]).batches(4, 6, 0, 1, 2)
    for arguments, message in (
        ((-1, 2), "first: -1 is below 0"),
        ((0, 0), "count: 0 is not a positive multiple of 2 processes"),
        ((0, 3), "count: 3 is not a positive multiple of 2 processes"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            halves.rows(*arguments)


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("changes", "arguments", "line"),
    [
        (
            {},
            {"index_weight": 0.0},
            "ScheduleConfig.indexer_warmup (--indexer_warmup): got 2, allowed: 0, as the weight "
            "of the indexer's loss (--index_weight) is 0 and nothing would learn",
        ),
        (
            {"lengths": ((0, 5), (3, 12))},
            {},
            "ScheduleConfig.lengths (--lengths): got [5, 12], allowed: divisors of "
            "--sequence_length=12, the last one 12",
        ),
        (
            {"lengths": ((0, 4), (3, 6))},
            {},
            "ScheduleConfig.lengths (--lengths): got [4, 6], allowed: divisors of "
            "--sequence_length=12, the last one 12",
        ),
        (
            {"batch_sizes": ((0, 2), (3, 4))},
            {},
            "ScheduleConfig.batch_sizes (--batch_sizes): got [2, 4], allowed: the last one "
            "--batch_size=8",
        ),
        (
            {},
            {"devices": 4},
            "ScheduleConfig.batch_sizes (--batch_sizes): got [2, 4, 8], allowed: multiples of the "
            "mesh's 4 devices, the last one --batch_size=8",
        ),
    ],
)
def test_what_does_not_fit_the_run_ends_in_one_line(changes, arguments, line):
    check_stages(WHOLE, LENGTH, 8, index_weight=1.0, devices=2)
    with pytest.raises(ValueError) as error:
        check_stages(
            dataclasses.replace(WHOLE, **changes), LENGTH, 8, **{"index_weight": 1.0, **arguments}
        )
    assert str(error.value) == line


def test_a_switch_within_the_warmup_or_outside_the_run_ends_in_one_line():
    for step in (1, 5, 6, 8, 19):
        check_switch(WHOLE, step)
    for step in (-1, 0, 20, 21):
        with pytest.raises(ValueError, match=rf"^--qat_start: step {step} is not within 1\.\.19$"):
            check_switch(WHOLE, step)
    with pytest.raises(ValueError) as error:
        check_switch(WHOLE, 7)
    assert str(error.value) == (
        "--qat_start: step 7 is within the indexer's warm-up, allowed: up to 6 (--dense_until) or "
        "from 8 on (--dense_until + --indexer_warmup)"
    )


# ---- the table ----


def test_the_table_by_hand():
    optimizer = OptimizerConfig(learning_rate=0.002, indexer_learning_rate=0.01)
    lines = stage_table(WHOLE, optimizer, LENGTH, 8, qat_start=14).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        *("steps", "learns", "learning rate", "indexer's", "MTP weight", "attention"),
        *("tokens a row", "rows", "tokens", "weights"),
    ]
    assert cells[2:] == [
        ["1-2", "all but indexer", "0.001 to 0.002", "-", "0.3", "dense", "4", "6", "48", "BF16"],
        ["3-4", "all but indexer", "0.002", "-", "0.3", "dense", "4", "6", "48", "BF16"],
        ["5-6", "all", "0.002", "0.01", "0.3", "dense", "4", "6", "48", "BF16"],
        ["7-8", "indexer", "-", "0.01", "-", "dense", "4", "12", "96", "BF16"],
        ["9-10", "all", "0.002", "0.01", "0.3", "sparse", "4", "12", "96", "BF16"],
        ["11-14", "all", "0.002", "0.01", "0.3", "sparse", "6", "16", "384", "BF16"],
        ["15-15", "all", "0.002", "0.01", "0.1", "sparse", "6", "16", "96", "QAT"],
        [
            *("16-18", "all", "0.00174 to 0.000464", "0.00868 to 0.00232", "0.1", "sparse"),
            *("12", "8", "288", "QAT"),
        ],
        ["19-20", "all", "0.0002", "0.001", "0.1", "sparse", "12", "8", "192", "QAT"],
    ]
    assert sum(int(row[8]) for row in cells[2:]) == 12 * rows_before(WHOLE, 8, 20)


def test_the_table_of_a_run_whose_indexer_does_not_learn():
    schedule = ScheduleConfig(10, warmup_steps=0, decay_start=1.0, dense_until=4, index_start=2)
    lines = stage_table(schedule, OptimizerConfig(train_indexer=False), 8, 2).splitlines()
    assert [line.split("|")[1:3] for line in lines[2:]] == [
        ["   1-4 ", " all but indexer "],
        ["  5-10 ", " all but indexer "],
    ]

"""Schedules against values computed by hand, and the errors of their config."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.training.schedule import ScheduleConfig, learning_rate_scale, phase, resolve_steps

CONFIG = ScheduleConfig(
    total_steps=20, warmup_steps=4, decay_start=12, final_fraction=0.1, dense_until=6
)

# step -> factor: (step + 1) / 4, then 1, then 0.1 + 0.9 (1 + cos(pi (step - 12) / 8)) / 2.
BY_HAND = {
    0: 0.25,
    1: 0.5,
    2: 0.75,
    3: 1.0,
    4: 1.0,
    11: 1.0,
    12: 1.0,
    14: 0.1 + 0.9 * (1 + 0.7071067811865476) / 2,
    16: 0.55,
    18: 0.1 + 0.9 * (1 - 0.7071067811865476) / 2,
    20: 0.1,
    1000: 0.1,
}


@pytest.mark.parametrize("step", BY_HAND)
def test_learning_rate_by_hand(step):
    np.testing.assert_allclose(learning_rate_scale(CONFIG, step), BY_HAND[step], rtol=1e-6)


def test_first_update_is_never_lost_and_no_warmup_is_allowed():
    for warmup in (0, 1, 4, 12):
        config = dataclasses.replace(CONFIG, warmup_steps=warmup)
        assert float(learning_rate_scale(config, 0)) == np.float32(1 / max(warmup, 1))


def test_no_decay():
    config = dataclasses.replace(CONFIG, decay_start=1.0)
    assert [float(learning_rate_scale(config, s)) for s in (4, 19)] == [1.0, 1.0]
    assert float(phase(config, 19).mtp_weight) == np.float32(0.3)


def test_phase_borders():
    weights = [float(phase(CONFIG, step).mtp_weight) for step in (0, 11, 12, 19)]
    np.testing.assert_allclose(weights, [0.3, 0.3, 0.1, 0.1], rtol=1e-6)
    assert [bool(phase(CONFIG, step).dense) for step in (0, 5, 6, 19)] == [True, True, False, False]
    assert not bool(phase(dataclasses.replace(CONFIG, dense_until=0), 0).dense)


def test_traced_step_gives_the_same_bits_with_one_compilation():
    traced = jax.jit(lambda step: phase(CONFIG, step))
    for step in range(22):
        for a, b in zip(
            jax.tree.leaves(traced(jnp.int32(step))),
            jax.tree.leaves(phase(CONFIG, step)),
            strict=True,
        ):
            assert a.shape == () and a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-6)
    assert traced._cache_size() == 1


def test_fractions_are_of_the_total():
    config = ScheduleConfig(
        total_steps=200,
        warmup_steps=0.02,
        decay_start=0.7,
        dense_until=0.1,
        lengths=((0, 4), (0.1, 8)),
    )
    names = ("warmup_steps", "decay_start", "dense_until")
    assert [config.resolve(name) for name in names] == [4, 140, 20]
    assert resolve_steps("qat_start", 1, 200) == 1  # a step
    assert resolve_steps("qat_start", 1.0, 200) == 200  # a fraction
    stored = ScheduleConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert (
        stored == config
        and hash(stored) == hash(config)
        and [stored.resolve(name) for name in names] == [4, 140, 20]
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("total_steps", 0),
        ("total_steps", 10.0),
        ("warmup_steps", -1),
        ("warmup_steps", 13),
        ("decay_start", 1.5),
        ("decay_start", "0.7"),
        ("decay_start", 21),
        ("decay_end", 11),
        ("decay_end", 21),
        ("dense_until", True),
        ("dense_until", 21),
        ("index_start", 7),  # dense_until is 6
        ("indexer_warmup", 7),  # decay_start is 12
        ("indexer_warmup", -1),
        ("lengths", 4),
        ("lengths", (4, 8)),
        ("lengths", ((1, 4),)),
        ("lengths", ((0, 4), (0, 8))),
        ("lengths", ((0, 4), (0.01, 8))),  # a fifth of a step
        ("lengths", ((0, 4), (20, 8))),
        ("lengths", ((0, 4), (1.5, 8))),
        ("lengths", ((0, 4), (2, 4))),
        ("lengths", ((0, 8), (2, 4))),
        ("lengths", ((0, 4.0),)),
        ("batch_sizes", ((0, 0), (3, 4))),
        ("batch_sizes", ((0, True),)),
        ("final_fraction", 1.1),
        ("mtp_weight", -0.1),
        ("mtp_weight_decayed", float("nan")),
    ],
)
def test_bad_values_end_in_one_line_that_names_the_field(field, value):
    with pytest.raises(
        ValueError, match=rf"^ScheduleConfig\.{field}( \(--\w+\))?: got .*allowed: "
    ) as error:
        dataclasses.replace(CONFIG, **{field: value})
    assert "\n" not in str(error.value)


def test_phases_that_overlap_end_in_one_line_that_says_where_they_may_be():
    warm = dataclasses.replace(CONFIG, indexer_warmup=6)
    assert (warm.resolve("dense_until"), warm.sparse_from, CONFIG.sparse_from) == (6, 12, 6)
    for field, value, line in (
        (
            "warmup_steps",
            7,
            "ScheduleConfig.warmup_steps (--warmup): got 7, allowed: <= dense_until (6): "
            "indexer_warmup begins there",
        ),
        (
            "decay_start",
            0.55,
            "ScheduleConfig.indexer_warmup (--indexer_warmup): got 6, allowed: at most the 5 "
            "steps from dense_until (6) to decay_start (0.55)",
        ),
        (
            "index_start",
            0.5,
            "ScheduleConfig.index_start (--index_start): got 0.5, allowed: <= dense_until (6)",
        ),
        (
            "warmup_steps",
            30,
            "ScheduleConfig.warmup_steps (--warmup): got 30, allowed: at most the 20 steps of the "
            "run",
        ),
    ):
        with pytest.raises(ValueError) as error:
            dataclasses.replace(warm, **{field: value})
        assert str(error.value) == line

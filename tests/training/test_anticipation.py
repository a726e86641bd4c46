"""Anticipatory routing, against a simulation that keeps every past model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.jax_model import quick_jit
from tests.training import tiny
from v4jax.model import chosen_experts
from v4jax.quantization import NO_QUANTIZATION, PAPER
from v4jax.training import anticipation
from v4jax.training.checkpoint import Checkpointer
from v4jax.training.journal import read_events
from v4jax.training.metrics import read_metrics
from v4jax.training.observe import Pace
from v4jax.training.run import train
from v4jax.training.stability import StabilityConfig
from v4jax.training.trainer import Variant

FIRST, LENGTH, DELAY, STEPS = 3, 9, 3, 15
PACE = Pace(log_every=1, save_every=5)


def routed(delay: int = DELAY, **changes) -> tiny.QuickTrainer:
    """A layer with a learned router, and MTP's; older routes in steps 3 to 11, after the dense."""
    stability = StabilityConfig(anticipate_from=FIRST, delay_steps=delay, active_steps=LENGTH)
    fields = {"model": tiny.model(mlp_layer_types=("moe",)), "stability": stability}
    return tiny.trainer(**fields | changes)


def simulated(trainer, quantization=NO_QUANTIZATION):
    """(losses, final state) of a run that looks up each step's experts in the model of old."""
    config = trainer.run_config(quantization)

    @quick_jit
    def choose(params, variables, tokens, segment_ids):
        from v4jax.quantization import quantize_params, resolve

        resolved = resolve(quantization, params)
        rounded = quantize_params(params, resolved.weights)
        model = trainer.program.bind(rounded, variables, resolved.index)
        return chosen_experts(model, tokens[:, :-1], segment_ids[:, :-1], False)

    history, losses, stale = [trainer.initial_state(config)], [], []
    for step in range(STEPS):
        state, batch = jax.tree.map(jnp.copy, history[-1]), trainer.batch(step)
        older = FIRST <= step < FIRST + LENGTH
        if older:
            then = history[step - min(step - FIRST, DELAY)]
            ids = choose(then.params, then.variables, *batch)
            now = choose(state.params, state.variables, *batch)
            stale.append(np.mean(np.asarray(ids) != np.asarray(now)))
            ring = anticipation.put(state.memory["routes"], step, ids)
            state = state._replace(memory={"routes": ring})
        program = Variant(quantization, trainer.stage(step).program, routed=older)
        state, metrics = trainer.compiled(program)(state, *batch)
        history.append(state)
        losses.append(float(metrics["loss"]))
    assert max(stale) > 0.05  # else older routes would be the same as live ones
    return losses, history[-1]


def result(trainer, folder):
    with Checkpointer(folder / "checkpoints") as checkpointer:
        return checkpointer.restore(trainer.abstract_state()).state


def test_a_run_is_the_simulation_to_the_last_bit(tmp_path):
    trainer = routed(quantization=PAPER)
    state = train(trainer, tmp_path, stop=STEPS, quantization=PAPER, pace=PACE)
    losses, final = simulated(trainer, PAPER)
    lines = read_metrics(tmp_path)
    assert [line["loss"] for line in lines] == losses
    assert tiny.same_bits(state._replace(memory={}), final._replace(memory={}))
    assert [line.get("routing_lag") for line in lines] == [
        *[None] * 3, 0, 1, 2, *[3] * 6, *[None] * 3
    ]  # fmt: skip
    assert lines[FIRST]["routing_disagreement"] == 0
    assert any(line.get("routing_disagreement", 0) > 0 for line in lines)
    phases = [(event["step"], event["phase"]) for event in read_events(tmp_path)]
    assert phases == [(4, "ramp"), (7, "active"), (10, "drain"), (13, "normal")]


@pytest.mark.slow
def test_without_a_delay_it_is_plain_training_bit_for_bit(tmp_path):
    plain, ahead = routed(stability=StabilityConfig()), routed(delay=0)
    states = [
        train(trainer, tmp_path / name, stop=STEPS, pace=PACE)._replace(memory={})
        for name, trainer in (("plain", plain), ("ahead", ahead))
    ]
    assert tiny.same_bits(*states)
    lines = read_metrics(tmp_path / "ahead")
    assert [line.get("routing_lag") for line in lines][FIRST : FIRST + LENGTH] == [0] * LENGTH
    assert lines[FIRST]["routing_disagreement"] == 0


@pytest.mark.slow
def test_older_routes_pass_from_stage_to_stage(tmp_path):
    """Not quantized; shorter rows first, and fewer: the ring holds batches of every shape."""
    schedule = dataclasses.replace(
        tiny.schedule(STEPS), lengths=((0, 16), (5, 32)), batch_sizes=((0, 1), (8, 2))
    )
    trainer = routed(schedule=schedule)
    state = train(trainer, tmp_path, stop=STEPS, pace=PACE)
    losses, final = simulated(trainer)
    assert [line["loss"] for line in read_metrics(tmp_path)] == losses
    assert tiny.same_bits(state._replace(memory={}), final._replace(memory={}))

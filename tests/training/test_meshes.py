"""Data parallel and FSDP over eight devices train as one device does, and gather no tokens."""

from __future__ import annotations

import functools
import re

import jax
import numpy as np
import pytest

from tests.jax_model import quick_jit
from tests.training import meshed, tiny
from v4jax import parallel
from v4jax.quantization import NO_QUANTIZATION, PAPER
from v4jax.training.step import TrainState

pytestmark = pytest.mark.slow
STEPS, COMPARED = 14, 10
MESHES = ("data=8", "data=2,fsdp=4")


@functools.cache
def on(text: str | None):
    """The trainer on a mesh; its steps are compiled once for all tests."""
    return meshed.trainer(parallel.make_mesh(text))


def trained(trainer) -> tuple[list[float], list[TrainState]]:
    """Losses of every step, and the states that they began with, on one device."""
    state, found, states = trainer.initial_state(), [], []
    update = trainer.step(NO_QUANTIZATION)
    for step in range(STEPS):
        states.append(parallel.on_one_device(state))
        state, metrics = update(state, *trainer.batch(step))
        found.append(float(metrics["loss"]))
    return found, states


@pytest.fixture(scope="module")
def alone():
    trainer = on(None)
    return trainer, *trained(trainer)


@pytest.fixture(scope="module")
def routes(alone):
    """(state, step) -> which experts every token of that step's batch visits."""
    trainer = alone[0]

    @quick_jit
    def choose(params, variables, tokens, segments):
        model = trainer.program.bind(params, variables)
        aux = model(tokens[:, :-1], segments[:, :-1], collect=True).aux
        return [layer["expert_ids"] for layer in aux["layers"]]

    return lambda state, step: choose(state.params, state.variables, *trainer.batches(step))


@pytest.mark.parametrize("text", MESHES)
def test_losses_are_those_of_one_device(alone, routes, text):
    _, wanted, states = alone
    found, ours = trained(on(text))
    assert tiny.same_bits(ours[0], states[0])
    np.testing.assert_allclose(found[:COMPARED], wanted[:COMPARED], rtol=1e-5)
    for step, (a, b) in enumerate(zip(ours, states, strict=True)):
        if not tiny.same_bits(routes(a, step), routes(b, step)):
            print(f"{text}: routing first differs at step {step + 1}")
            break
    else:
        print(f"{text}: the same routing over {STEPS} steps")


def test_parameters_and_optimizer_state_stay_spread_over_fsdp():
    trainer = on("data=2,fsdp=4")
    state = trainer.initial_state()
    state, _ = trainer.step(NO_QUANTIZATION)(state, *trainer.batch(0))
    whole = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
    on_first = sum(
        x.addressable_data(0).nbytes for x in jax.tree.leaves((state.params, state.opt_state))
    )
    assert on_first < 0.5 * whole  # a quarter, and what has no axis of D
    embedding = state.params["embed_tokens"]["weight"]
    assert embedding.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp")


def of_tokens(shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those that hold vectors of tokens: FSDP gathers one array of a number a token."""
    return [shape for shape in shapes if TOKENS & set(shape) and shape[-1] > 1]


def gathered(text: str) -> list[tuple[int, ...]]:
    """Shapes of the results of all-gathers in compiled HLO.

    FSDP has two all-to-alls of tokens beside them, at the embedding, whose table is split along D.
    """
    found = []
    for line in text.splitlines():
        made = re.search(r"= (.*?) all-gather(?:-start)?\(", line)
        for shape in re.findall(r"\[([\d,]+)\]", made[1]) if made else []:
            found.append(tuple(map(int, shape.split(","))))
    return found


TOKENS = {meshed.LENGTH, meshed.LENGTH + 1, 8 * meshed.LENGTH, 8 * meshed.LENGTH * 2}
"""Axes that arrays of tokens have, and no parameter: rows, all rows' tokens, and their experts."""


@pytest.mark.parametrize(
    ("text", "quantization"), [*((text, NO_QUANTIZATION) for text in MESHES), (MESHES[1], PAPER)]
)
def test_no_tokens_are_gathered(text, quantization):
    shapes = gathered(on(text).step(quantization).as_text())
    assert bool(shapes) == ("fsdp" in text)  # parameters are
    assert not of_tokens(shapes)


def test_the_check_sees_gathered_tokens(monkeypatch):
    """Without the map over rows the experts' sort does gather them."""
    monkeypatch.setattr(parallel, "over_rows", lambda f, shared, *arrays: f(shared, *arrays))
    shapes = gathered(meshed.trainer(parallel.make_mesh("data=8")).step(NO_QUANTIZATION).as_text())
    assert of_tokens(shapes), shapes

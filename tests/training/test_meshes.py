"""Data parallel and FSDP over eight devices train as one device does, and exchange no tokens."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from tests.collectives import collectives, of_tokens
from tests.jax_model import quick_jit
from tests.training import meshed, tiny
from v4jax import parallel
from v4jax.quantization import NO_QUANTIZATION, PAPER
from v4jax.training.metrics import read_metrics
from v4jax.training.observe import Pace
from v4jax.training.remedies import RemedyConfig
from v4jax.training.run import train
from v4jax.training.stability import StabilityConfig
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

    return lambda state, step: choose(state.params, state.variables, *trainer.batch(step))


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


OPTIONS = {
    "remedies": RemedyConfig(dampening=1e-2, freeze_above=0.02, ema_decay=0.9),
    "stability": StabilityConfig(anticipate_from=2, delay_steps=2, active_steps=4),
}


def test_what_options_remember_is_spread_too_and_resumes(tmp_path):
    def run(folder, mesh, stop=6):
        trainer = meshed.trainer(parallel.make_mesh(mesh), **OPTIONS)
        how = {"quantization": PAPER, "pace": Pace(log_every=1, save_every=3)}
        return train(trainer, tmp_path / folder, stop=stop, **how)

    whole = run("whole", MESHES[1])
    run("halves", MESHES[1], stop=3)
    resumed = run("halves", MESHES[1])
    assert tiny.same_bits(parallel.on_one_device(resumed), parallel.on_one_device(whole))
    memory = whole.memory["remedies"]
    assert set(memory) >= {"ema", "frozen", "frequency"} and "routes" in whole.memory
    specs = {str(x.sharding.spec) for name in ("ema", "frozen") for x in memory[name].values()}
    assert specs and all("fsdp" in spec for spec in specs), specs
    run("alone", None)
    losses = [[x["loss"] for x in read_metrics(tmp_path / one)] for one in ("whole", "alone")]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def matrices(trainer) -> set[tuple[int, ...]]:
    """The last two axes of each parameter, in order of size."""
    shapes = (x.shape for x in jax.tree.leaves(trainer.params))
    return {tuple(sorted(shape[-2:])) for shape in shapes if len(shape) > 1}


@pytest.mark.parametrize(
    ("text", "quantization"), [*((text, NO_QUANTIZATION) for text in MESHES), (MESHES[1], PAPER)]
)
def test_weights_and_gradients_are_exchanged_and_nothing_of_a_token(text, quantization):
    """Copies add up gradients, counts and scalars. FSDP gathers parameters beside that, and Muon
    makes of matrices split along an axis whole ones."""
    trainer = on(text)
    found = collectives(trainer.step(quantization).as_text())
    assert not of_tokens(found, *LENGTHS), of_tokens(found, *LENGTHS)
    kinds = {one.kind for one in found}
    if "fsdp" not in text:
        assert kinds == {"all-reduce"}
        return
    assert kinds == {"all-reduce", "all-gather", "all-to-all"}
    for one in found:
        if one.kind == "all-gather":
            known = matrices(trainer)
            assert all(tuple(sorted(shape[-2:])) in known for shape in one.shapes), one


LENGTHS = (meshed.LENGTH, meshed.LENGTH + 1, meshed.LENGTH // 4)
"""Of a row's tokens, with the one to predict, and of its entries."""


def test_the_check_sees_exchanged_tokens(monkeypatch):
    """Without the map over rows the experts' sort gathers some, and the embedding exchanges all."""
    monkeypatch.setattr(parallel, "over_rows", lambda f, shared, *arrays: f(shared, *arrays))
    trainer = meshed.trainer(parallel.make_mesh(MESHES[1]))
    found = of_tokens(collectives(trainer.step(NO_QUANTIZATION).as_text()), *LENGTHS)
    assert {one.kind for one in found} >= {"all-gather", "all-to-all"}, found

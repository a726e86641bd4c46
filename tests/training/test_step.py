"""The training step against the numpy reference, and against gradients taken by hand."""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests import reference
from tests.jax_model import build, quick_jit
from tests.reference_parameters import random_parameters
from tests.training import tiny
from v4jax.config import CSA, HCA, SLIDING
from v4jax.layers.context import IndexFormats
from v4jax.model import Transformer, abstract_model
from v4jax.numerics import MXFP4, dequantize, quantize
from v4jax.quantization import ALL_LINEARS, NO_QUANTIZATION, PAPER, flat_paths, resolve
from v4jax.training.losses import Objective, losses
from v4jax.training.optimizer import OptimizerConfig, build_optimizer
from v4jax.training.schedule import learning_rate_scale
from v4jax.training.step import (
    Program,
    TrainState,
    make_train_step,
    moved_biases,
    split_model,
)

SCHEDULE = tiny.schedule()  # dense before step 2, MTP weight 0.3 before step 17, then 0.1
DENSE, SPARSE = 0, 20
CONFIG = tiny.model()  # a CSA layer with hash routing, and MTP's block with top-k
LENGTHS = ((14, 19), (20, 7))  # of samples, in rows of 33; the second row ends in padding
INDEXER = "/indexer/"
OBJECTIVE = Objective(balance=0.5, index=2.0, bias_speed=0.25)


def packed_batch() -> tuple[np.ndarray, np.ndarray]:
    """tokens, segment_ids int32 [2, 33]."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 256, (len(LENGTHS), tiny.LENGTH + 1)).astype(np.int32)
    segments = np.zeros_like(tokens)
    for row, lengths in enumerate(LENGTHS):
        for i, end in enumerate(np.cumsum(lengths)):
            segments[row, end - lengths[i] : end] = i + 1
            tokens[row, end - lengths[i]] = 256
    tokens[segments == 0] = 256
    return tokens, segments


def samples(tokens, segments):
    """(row, start, ids) of each sample of the model's input."""
    for row in range(len(tokens)):
        inputs = segments[row, :-1]
        for sample in range(1, inputs.max() + 1):
            (where,) = np.nonzero(inputs == sample)
            yield row, where[0], tokens[row, where]


def run_reference(params, dense: bool):
    """What the step must measure on the packed batch: losses, and the load of MTP's experts."""
    tokens, segments = packed_batch()
    shape = (*tokens[:, 1:].shape, CONFIG.vocab_size)
    logits, mtp_logits = np.zeros(shape), np.zeros(shape)
    gap, kl, scores, choices = np.inf, [], {}, {}
    for row, start, ids in samples(tokens, segments):
        out = reference.forward(CONFIG, params, ids, dense=dense)
        gap = min(gap, out.smallest_gap)
        logits[row, start : start + len(ids)] = out.logits
        mtp_logits[row, start : start + len(ids)] = out.mtp_logits
        kl.extend(out.index_kl[0])
        scores.setdefault(row, []).append(out.router_scores[1])  # MTP's block: not of a last token
        choices.setdefault(row, []).append(out.router_choices[1])
    assert gap > 1e-5  # no top-k decision that float32 could make otherwise
    parts = [(np.concatenate(scores[row]), np.concatenate(choices[row])) for row in scores]
    balance = np.mean([reference.balance_loss(*part) for part in parts])
    load = np.bincount(np.concatenate([chosen.ravel() for _, chosen in parts]), minlength=4)
    counted = [
        (row, t)
        for row in range(len(tokens))
        for t in range(tiny.LENGTH)
        if segments[row, t] == segments[row, t + 1] != 0
    ]
    nll = [reference.cross_entropy(logits[[r], [t]], tokens[[r], [t + 1]])[0] for r, t in counted]
    mtp_nll = [
        reference.cross_entropy(mtp_logits[[r], [t]], tokens[[r], [t + 2]])[0]
        for r, t in counted
        if (r, t + 1) in counted
    ]
    assert len(mtp_nll) == len(nll) - 4 and len(nll) == 56
    measured = {
        "loss": np.mean(nll),
        "mtp_loss": sum(mtp_nll) / len(nll),  # by the main loss's count
        "balance_loss": balance,
        "index_loss": np.nanmean(kl),
    }
    return SimpleNamespace(measured=measured, load=load)


@pytest.fixture(scope="module")
def start():
    """A model's program, parameters (numpy for the reference, dicts for the step) and variables."""
    raw = random_parameters(CONFIG, 3)
    model = build(CONFIG, raw)
    params, variables = split_model(model)
    return SimpleNamespace(raw=raw, program=Program.of(model), params=params, variables=variables)


def halving() -> optax.GradientTransformation:
    """Moves by -0.5 gradient, exact in float32, and keeps what it was given as its state."""
    return optax.GradientTransformation(
        lambda params: (),
        lambda grads, state, params: (
            jax.tree.map(lambda g: -0.5 * g, grads),
            {"gradients": grads, "masters": params},
        ),
    )


def step_of(program, objective, quantization=NO_QUANTIZATION, optimizer=None):
    train = objective.index > 0
    config = tiny.config(
        "",
        model=program.config,
        schedule=SCHEDULE,
        optimizer=OptimizerConfig(train_indexer=train),
        objective=objective,
        quantization=quantization,
    )
    return quick_jit(make_train_step(program, optimizer or halving(), config))


def apply(step, start, at: int, opt_state=None):
    if opt_state is None:
        opt_state = {"gradients": start.params, "masters": start.params}
    state = TrainState(jnp.int32(at), start.params, start.variables, opt_state, {})
    return step(state, *packed_batch())


@pytest.fixture(scope="module")
def strong_index(start):
    """The step with an index loss so heavy that a leak of its gradient would drown the rest."""
    step = step_of(start.program, Objective(balance=0.5, index=1e6, bias_speed=0.25))
    return {at: apply(step, start, at) for at in (DENSE, SPARSE)}


@pytest.fixture(scope="module")
def no_index(start):
    """The real optimizer without an index loss, which keeps the gradients beside its state."""
    real = build_optimizer(
        start.params,
        CONFIG,
        OptimizerConfig(learning_rate=0.1, train_indexer=False),
        functools.partial(learning_rate_scale, SCHEDULE),
    )

    def update(grads, state, params):
        updates, inner = real.update(grads, state["inner"], params)
        return updates, {"gradients": grads, "inner": inner}

    optimizer = optax.GradientTransformation(real.init, update)
    objective = Objective(balance=0.5, index=0.0, bias_speed=0.0)
    step = step_of(start.program, objective, optimizer=optimizer)
    state = {"inner": real.init(start.params), "gradients": start.params}
    assert tiny.same_bits(apply(step, start, SPARSE, state), apply(step, start, SPARSE, state))
    return {at: apply(step, start, at, state) for at in (DENSE, SPARSE)}


@pytest.fixture(scope="module")
def qat(start):
    step = step_of(start.program, OBJECTIVE, PAPER)
    return {at: apply(step, start, at) for at in (DENSE, SPARSE)}


def gradients(result) -> dict[str, np.ndarray]:
    state, _ = result
    return {path: np.asarray(g) for path, g in flat_paths(state.opt_state["gradients"]).items()}


def assert_close(ours, theirs, share=2e-5):
    """Leaf by leaf, within a share of each leaf's largest element."""
    assert ours.keys() == theirs.keys()
    for path in ours:
        scale = np.abs(theirs[path]).max()
        np.testing.assert_allclose(
            ours[path], theirs[path], rtol=0, atol=share * scale, err_msg=path
        )


# ---- losses and biases, against the reference ----


@pytest.mark.parametrize("at", [DENSE, SPARSE])
def test_losses_of_a_packed_batch(start, strong_index, at):
    wanted = run_reference(start.raw, dense=at == DENSE).measured
    _, metrics = strong_index[at]
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)


def test_dense_and_sparse_are_told_apart(strong_index):
    (_, dense), (_, sparse) = strong_index[DENSE], strong_index[SPARSE]
    assert abs(dense["loss"] - sparse["loss"]) > 1e-4
    assert abs(dense["index_loss"] - sparse["index_loss"]) > 1e-4


@pytest.mark.parametrize("at", [DENSE, SPARSE])
def test_the_bias_moves_against_the_load(start, strong_index, at):
    load = run_reference(start.raw, dense=at == DENSE).load
    before = flat_paths(start.variables)
    after = flat_paths(strong_index[at][0].variables)
    bias, table = "mtp/block/mlp/gate/e_score_correction_bias", "layers/0/mlp/gate/tid2eid"
    assert before.keys() == after.keys() == {bias, table}
    move = (0.25 * np.sign(load.mean() - load)).astype(np.float32)
    assert move.any() and np.array_equal(after[bias], before[bias] + move)
    assert np.array_equal(after[table], before[table])


def test_padding_counts_for_nothing(start):
    """Other tokens there, and other logits, change no loss."""
    tokens, segments = packed_batch()
    rng = np.random.default_rng(2)
    shape = (*tokens[:, 1:].shape, CONFIG.vocab_size)
    logits = rng.standard_normal(shape).astype(np.float32)
    mtp_logits = rng.standard_normal((shape[0], shape[1] - 1, shape[2])).astype(np.float32)

    def of(tokens, logits, mtp_logits):
        out = SimpleNamespace(
            logits=logits, mtp_logits=mtp_logits, aux={"layers": ({},), "mtp": None}
        )
        return {name: float(value) for name, value in losses(out, tokens, segments).items()}

    found = of(tokens, logits, mtp_logits)
    assert found["balance_loss"] == found["index_loss"] == 0
    other = tokens.copy()
    other[segments == 0] = 7
    borders = segments[:, 1:] != segments[:, :-1]
    noise = np.where((borders | (segments[:, 1:] == 0))[..., None], 100.0, 0.0).astype(np.float32)
    assert of(other, logits + noise * rng.standard_normal(shape), mtp_logits) == found
    np.testing.assert_allclose(
        of(other, logits, mtp_logits)["mtp_loss"], found["mtp_loss"], rtol=1e-6
    )
    empty = losses(
        SimpleNamespace(logits=logits, mtp_logits=None, aux={"layers": ({},), "mtp": None}),
        tokens,
        np.zeros_like(segments),
    )
    assert (
        set(empty) == {"loss", "balance_loss", "index_loss", "z_loss"} and float(empty["loss"]) == 0
    )


def test_biases_of_layers_units_and_mtp_by_hand():
    """A hash layer, a top-k one, a unit of two layers three times over, and MTP."""
    config = tiny.model(
        layer_types=(SLIDING, HCA, *(CSA, SLIDING) * 3),
        mlp_layer_types=("hash_moe", *("moe",) * 7),
        scan_layers=True,
    )
    assert config.schedule == (2, 2, 3)
    rng = np.random.default_rng(0)
    _, variables = split_model(abstract_model(config))
    variables = jax.tree.map(
        lambda x: jnp.asarray(rng.integers(-3, 3, x.shape), x.dtype), variables
    )
    loads = rng.integers(0, 5, (9, config.n_routed_experts)).astype(np.float32)
    loads[4] = 2.0  # balanced: nothing moves there
    aux = {
        "layers": tuple({"expert_load": jnp.asarray(load)} for load in loads[:8]),
        "mtp": {"expert_load": jnp.asarray(loads[8])},
    }
    before = {path: np.asarray(x) for path, x in flat_paths(variables).items()}
    after = flat_paths(moved_biases(variables, aux, config, 0.5))

    def moved(bias, load):
        return [b + 0.5 * np.sign(load.mean() - x) for b, x in zip(bias, load, strict=True)]

    bias = "mlp/gate/e_score_correction_bias"
    wanted = {
        "layers/0/mlp/gate/tid2eid": before["layers/0/mlp/gate/tid2eid"],
        f"layers/1/{bias}": moved(before[f"layers/1/{bias}"], loads[1]),
        f"mtp/block/{bias}": moved(before[f"mtp/block/{bias}"], loads[8]),
    }
    for j in (0, 1):
        path = f"units/{j}/{bias}"
        wanted[path] = [moved(before[path][r], loads[2 + 2 * r + j]) for r in range(3)]
    assert after.keys() == wanted.keys()
    for path, value in wanted.items():
        assert np.array_equal(after[path], value), path
        assert np.array_equal(before[path], flat_paths(variables)[path])  # the input is as it was
    assert np.array_equal(after[f"units/0/{bias}"][1], before[f"units/0/{bias}"][1])  # layer 4


# ---- whose gradient reaches whom ----


@pytest.mark.parametrize("at", [DENSE, SPARSE])
def test_the_index_loss_trains_the_indexer_alone_and_nothing_else_does(strong_index, no_index, at):
    strong, without = gradients(strong_index[at]), gradients(no_index[at])
    assert any(INDEXER in path for path in strong)
    for path in strong:
        if INDEXER in path:
            assert not without[path].any(), path
            assert np.abs(strong[path]).max() > 0, path
        else:
            assert np.abs(without[path]).max() > 0, path
            scale = np.abs(without[path]).max()
            np.testing.assert_allclose(
                strong[path], without[path], rtol=0, atol=1e-6 * scale, err_msg=path
            )


def test_an_index_weight_of_zero_freezes_the_indexer(start, no_index):
    """Not a bit of it changes, by decay neither; all else does."""
    state, metrics = no_index[SPARSE]
    assert metrics["index_loss"] > 0  # measured all the same
    before, after = flat_paths(start.params), flat_paths(state.params)
    for path in before:
        assert np.array_equal(before[path], after[path]) == (INDEXER in path), path
    assert tiny.same_bits(state.variables, start.variables)  # optimizer and decay leave them alone
    momentum = flat_paths(state.opt_state["inner"].muon.momentum)
    assert momentum and not any(INDEXER in path for path in momentum)


def test_in_the_indexers_warm_up_nothing_else_moves(start, strong_index):
    """Not by decay, momentum or loads; the indexer does, by its loss over all visible entries."""
    optimizer = build_optimizer(
        start.params,
        CONFIG,
        OptimizerConfig(learning_rate=0.1),
        functools.partial(learning_rate_scale, SCHEDULE),
        only_indexer=True,
    )
    config = tiny.config("", model=CONFIG, schedule=SCHEDULE, objective=OBJECTIVE)
    step = quick_jit(make_train_step(start.program, optimizer, config, only_indexer=True))
    state, metrics = apply(step, start, SPARSE, optimizer.init(start.params))
    before, after = flat_paths(start.params), flat_paths(state.params)
    for path in before:
        assert np.array_equal(before[path], after[path]) == (INDEXER not in path), path
    assert tiny.same_bits(state.variables, start.variables)
    dense = strong_index[DENSE][1]
    np.testing.assert_allclose(metrics["index_loss"], dense["index_loss"], rtol=1e-5)
    assert abs(dense["index_loss"] - strong_index[SPARSE][1]["index_loss"]) > 1e-3


# ---- quantization-aware steps ----


def by_hand(start):
    """Rounded parameters, and the gradient of the whole loss with respect to them, by jax.grad."""
    tokens, segments = map(jnp.asarray, packed_batch())
    counted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    count = jnp.sum(counted)

    def total(params, mtp_weight, dense):
        model = start.program.bind(params, start.variables)
        model.index_formats = IndexFormats(query=MXFP4, key=MXFP4)
        out = model(tokens[:, :-1], segments[:, :-1], dense_index=dense)

        def nll(logits, targets, mask):
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
            return -jnp.sum(picked[..., 0] * mask) / count

        loss = nll(out.logits, tokens[:, 1:], counted)
        mtp = nll(out.mtp_logits, tokens[:, 2:], counted[:, 1:] & counted[:, :-1])
        (csa,), balance = out.aux["layers"], out.aux["mtp"]["balance_loss"]
        return loss + mtp_weight * mtp + 0.5 * balance + 2.0 * csa["index_loss"]

    def rounded(path, leaf):
        chosen = re.search(r"\['experts'\]", jax.tree_util.keystr(path))
        return dequantize(quantize(leaf, MXFP4)) if chosen else leaf

    params = jax.tree_util.tree_map_with_path(rounded, start.params)
    return params, quick_jit(jax.grad(total))


def test_the_gradient_of_the_rounded_weights_goes_straight_to_the_masters(start, qat):
    rounded, gradient = by_hand(start)
    for at, mtp_weight in ((DENSE, 0.3), (SPARSE, 0.1)):
        wanted = flat_paths(gradient(rounded, mtp_weight, at == DENSE))
        assert_close(gradients(qat[at]), {path: np.asarray(g) for path, g in wanted.items()}, 1e-4)
        state, _ = qat[at]
        assert tiny.same_bits(state.opt_state["masters"], start.params)
        moved = jax.tree.map(lambda p, g: p - 0.5 * g, start.params, state.opt_state["gradients"])
        assert tiny.same_bits(state.params, moved)


def test_rounding_is_felt(qat, strong_index):
    (_, metrics), (_, plain) = qat[SPARSE], strong_index[SPARSE]
    assert 1e-5 < abs(metrics["loss"] - plain["loss"]) < 0.5


def test_a_step_keeps_the_tree_of_the_state(start, qat, strong_index):
    """Names, shapes, dtypes: all as before, under quantization too."""
    for state, _ in (qat[SPARSE], strong_index[SPARSE]):
        for ours, before in ((state.params, start.params), (state.variables, start.variables)):
            assert jax.tree.structure(ours) == jax.tree.structure(before)
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(before), strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert int(state.step) == SPARSE + 1 and state.step.dtype == jnp.int32


def equations(jaxpr, inside=()):
    """(names of the enclosing primitives, equation) of everything in a jaxpr."""
    for equation in jaxpr.eqns:
        yield inside, equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner, (*inside, equation.primitive.name))


def traced(config, quantization, dtype=jnp.float32, rows=3):
    """Equations of a step on `rows` rows of 32 tokens, and the parameters' shapes."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=dtype))
    params, variables = split_model(model)
    run = tiny.config(
        "", model=config, schedule=SCHEDULE, objective=OBJECTIVE, quantization=quantization
    )
    step = make_train_step(Program.of(model), halving(), run)
    ids = jax.ShapeDtypeStruct((rows, tiny.LENGTH + 1), jnp.int32)
    before = {"gradients": params, "masters": params}
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, variables, before, {})
    return list(equations(jax.make_jaxpr(step)(state, ids, ids).jaxpr)), params


def test_weights_are_rounded_once_outside_scan_and_remat():
    """Nothing else in a step rounds; the indexer's operands are rounded where they arise."""
    config = tiny.model(
        layer_types=(SLIDING, *(CSA, SLIDING) * 2),
        mlp_layer_types=("hash_moe", *("moe",) * 4),
        scan_layers=True,
        remat="full",
    )
    found, params = traced(config, ALL_LINEARS)
    recomputing = {"scan", "checkpoint", "remat", "remat2"}
    rounded = [(set(inside) & recomputing, e.outvars[0].aval.size) for inside, e in found
               if e.primitive.name == "round"]  # fmt: skip
    chosen = resolve(ALL_LINEARS, params).weights
    wanted = sorted(flat_paths(params)[path].size for path in chosen)
    assert any("units/0" in path for path in chosen) and any("mtp" in path for path in chosen)
    assert sorted(size for within, size in rounded if not within) == wanted
    query, key = 3 * 32 * 2 * 32, 3 * (32 // 4) * 32
    activations = {size for within, size in rounded if within}
    assert activations == {query, key} and activations.isdisjoint(wanted)


def test_without_quantization_nothing_is_rounded():
    found, _ = traced(CONFIG, NO_QUANTIZATION)
    assert not [e for _, e in found if e.primitive.name == "round"]


# ---- bfloat16 ----


def operand_types(found) -> set[str]:
    """Types of the operands of matmuls."""
    return {
        str(v.aval.dtype) for _, e in found if e.primitive.name == "dot_general" for v in e.invars
    }


@pytest.mark.slow
def test_bfloat16_computes_in_bfloat16_with_float32_masters(start, strong_index):
    assert operand_types(traced(CONFIG, NO_QUANTIZATION)[0]) == {"float32"}
    assert "bfloat16" in operand_types(traced(CONFIG, NO_QUANTIZATION, jnp.bfloat16)[0])
    model = nnx.eval_shape(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    step = step_of(Program.of(model), Objective(balance=0.5, index=1.0))
    state, metrics = apply(step, start, DENSE)  # dense: no selection can flip
    _, wanted = strong_index[DENSE]
    for name in ("loss", "mtp_loss", "balance_loss", "index_loss"):
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=0.03, err_msg=name)
    assert float(metrics["loss"]) != float(wanted["loss"])
    for tree in (state.params, state.opt_state["gradients"]):
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} == {"float32"}
    assert all(np.isfinite(g).all() for g in gradients((state, metrics)).values())


# ---- objectives ----


@pytest.mark.parametrize("name", ["balance", "index", "bias_speed"])
@pytest.mark.parametrize("value", [-1, "x", None, float("nan"), float("inf")])
def test_objectives_that_cannot_be_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^Objective\.{name}: got .*, allowed: a number >= 0$"):
        Objective(**{name: value})

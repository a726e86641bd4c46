"""Options of the optimizer: clipping by part, Muon's five rows, the indexer's warm-up and rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training.test_optimizer import (
    EXPECTED,
    HYBRID,
    PATHS_OF_THE_SMALL_TREE,
    factor,
    flatten,
    random_flat,
    reference_adamw,
    reference_muon,
    reference_orthogonal,
    train,
)
from v4jax.training.muon import COEFFICIENTS, newton_schulz, scale_by_muon
from v4jax.training.optimizer import OptimizerConfig

PARTS_OF_THE_SMALL_TREE = (
    ("embed_tokens/weight",),
    ("norm/weight",),
    ("layers/1/mlp/experts/gate_up_proj", "units/0/mlp/experts/down_proj"),
    ("layers/1/attn_hc/fn", "layers/1/attn_hc/base"),
    ("layers/1/self_attn/o_a_proj/weight",),
    ("layers/1/self_attn/compressor/kv_proj/weight",),
    (
        "layers/1/self_attn/compressor/indexer/kv_proj/weight",
        "layers/1/self_attn/compressor/indexer/position_bias",
    ),
    ("mtp/e_proj/weight",),
)


@pytest.mark.parametrize("only_indexer", [False, True])
def test_clip_of_each_part_alone(only_indexer):
    paths = PATHS_OF_THE_SMALL_TREE
    assert sorted(sum(PARTS_OF_THE_SMALL_TREE, ())) == sorted(paths)
    gradients = random_flat(7, paths, 0.15)
    config = OptimizerConfig(clip="group", clip_norm=1.5)
    _, state = train(random_flat(0, paths), [gradients], config, only_indexer=only_indexer)
    got = flatten(state.muon.momentum)
    got |= {path: mu / np.float32(0.1) for path, mu in flatten(state.adamw.mu).items()}
    clipped = 0
    for part in PARTS_OF_THE_SMALL_TREE:
        norm = np.sqrt(sum(np.sum(np.float64(gradients[path]) ** 2) for path in part))
        clipped += norm > 1.5
        learns = not only_indexer or "indexer" in part[0]
        for path in part:
            want = learns * gradients[path] / max(norm / 1.5, 1.0)
            np.testing.assert_allclose(got[path], want, rtol=2e-6, err_msg=path)
    assert 0 < clipped < len(PARTS_OF_THE_SMALL_TREE)


# ---- Muon's first five rows ----


def test_five_rows_equal_optax_muon_of_five_steps():
    """One gradient: optax's momentum is an average with bias correction, which later differs."""
    g = {"w": jnp.asarray(np.random.default_rng(8).normal(size=(6, 9)), jnp.float32)}
    matrix = {"w": optax.contrib.MuonDimensionNumbers()}
    theirs = optax.contrib.scale_by_muon(ns_steps=5, weight_dimension_numbers=matrix)
    ours = scale_by_muon({"w": (6,)}, coefficients=COEFFICIENTS["five"])
    want = jax.jit(lambda g: theirs.update(g, theirs.init(g), g)[0])(g)["w"]
    got = jax.jit(lambda g: ours.update(g, ours.init(g))[0])(g)["w"]
    np.testing.assert_allclose(got / (0.18 * 3), want, atol=2e-6)
    hybrid = jax.jit(newton_schulz)(g["w"][None])[0]
    assert np.abs(hybrid - want).max() > 0.01


@pytest.mark.parametrize("rows", ["hybrid", "five"])
def test_the_option_decides_the_rows(rows):
    path = "mtp/e_proj/weight"
    params, grads = random_flat(0, [path]), random_flat(1, [path], 0.01)
    config = OptimizerConfig(learning_rate=0.05, newton_schulz=rows)
    got, _ = train(params, [grads], config)
    o = reference_orthogonal(np.float64(grads[path]), {"hybrid": HYBRID, "five": HYBRID[:5]}[rows])
    want = np.float64(params[path]) * (1 - 0.005) - 0.05 * 0.18 * np.sqrt(12) * o
    np.testing.assert_allclose(got[path], want, atol=2e-5)


# ---- The indexer's warm-up, and its own rate ----


INDEXER_PATHS = [path for path in PATHS_OF_THE_SMALL_TREE if "/indexer/" in path]
FEW = ["embed_tokens/weight", "norm/weight", "mtp/e_proj/weight", *INDEXER_PATHS]


def reference_leaf(path, gradients, w, rates):
    _, group, decay, parts, _ = EXPECTED[path]
    if group == "muon":
        return reference_muon(gradients, w, parts, rates)
    return reference_adamw(gradients, w, decay, rates)


def test_the_indexer_learns_alone_and_all_others_keep_every_bit():
    """Two steps of all, three of the indexer, two of all: for others the three were not there."""
    paths = FEW
    params = random_flat(0, paths)
    gradients = [random_flat(1 + t, paths, scale=1e-3) for t in range(7)]  # never clipped
    config = OptimizerConfig(learning_rate=0.05, indexer_learning_rate=0.08)
    before, state = train(params, gradients[:2], config)
    kept = jax.tree.map(np.array, state)
    warm, state = train(before, gradients[2:5], config, state=state, only_indexer=True)
    for path in paths:
        assert np.array_equal(warm[path], before[path]) == (path not in INDEXER_PATHS), path
    assert int(state.step) == 5 and int(state.adamw.count) == 2
    assert jax.tree.structure(state) == jax.tree.structure(kept)
    moments = [(kept.muon.momentum, state.muon.momentum)]
    moments += [(kept.adamw.mu, state.adamw.mu), (kept.adamw.nu, state.adamw.nu)]
    for old, new in moments:
        for path, value in flatten(old).items():
            same = np.array_equal(value, flatten(new)[path])
            assert same == (path not in INDEXER_PATHS), path

    got, state = train(warm, gradients[5:], config, state=state)
    assert int(state.step) == 7 and int(state.adamw.count) == 4
    rates = [0.05 * factor(t) for t in (0, 1, 5, 6)]
    own = [0.08 * scale for scale in (factor(0), factor(1), 1, 1, 1, factor(5), factor(6))]
    for path in paths:
        steps, eta = (range(7), own) if path in INDEXER_PATHS else ((0, 1, 5, 6), rates)
        want = reference_leaf(path, [gradients[t][path] for t in steps], params[path], eta)
        np.testing.assert_allclose(got[path], want, atol=3e-5, rtol=0, err_msg=path)


def test_before_its_loss_counts_the_indexer_does_not_decay_and_then_starts_afresh():
    paths = FEW
    params = random_flat(0, paths)
    gradients = [random_flat(1 + t, paths, scale=1e-3) for t in range(5)]
    for grads in gradients[:3]:
        grads |= {path: np.zeros_like(grads[path]) for path in INDEXER_PATHS}
    config = OptimizerConfig(learning_rate=0.05)
    half, state = train(params, gradients[:3], config, index_start=3)
    got, _ = train(half, gradients[3:], config, state=state, index_start=3)
    rates = [0.05 * factor(t) for t in range(5)]
    for path in paths:
        first = 3 if path in INDEXER_PATHS else 0
        assert np.array_equal(half[path], params[path]) == bool(first), path
        history = [grads[path] for grads in gradients[first:]]
        want = reference_leaf(path, history, params[path], rates[first:])
        np.testing.assert_allclose(got[path], want, atol=3e-5, rtol=0, err_msg=path)

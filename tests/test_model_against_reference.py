"""The model in float32 against the numpy float64 reference, over a spread of random models."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests import reference
from tests.jax_model import build, quick_jit, split
from tests.reference import CSA, HCA, SLIDING
from tests.reference_parameters import random_parameters
from v4jax.interop import load_state_dict, state_dict
from v4jax.model import abstract_model

GAP = 1e-5  # a top-k decision nearer than this may flip in float32
YARN = SimpleNamespace(
    factor=16.0, beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=64
)
RATES = SimpleNamespace(compressed_sparse_attention=4, heavily_compressed_attention=8)
BASE = {
    "vocab_size": 40,
    "hidden_size": 24,
    "layer_types": (SLIDING,),
    "mlp_layer_types": ("moe",),
    "compress_rates": RATES,
    "moe_intermediate_size": 12,
    "num_attention_heads": 4,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 20,
    "o_groups": 2,
    "o_lora_rank": 6,
    "sliding_window": 5,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "scoring_func": "sqrtsoftplus",
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 0.7,
    "shared_expert_swiglu_limit": True,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "compress_rope_theta": 1.6e5,
    "rope_scaling": None,
    "num_nextn_predict_layers": 0,
}


def rates(csa: int, hca: int) -> SimpleNamespace:
    return SimpleNamespace(compressed_sparse_attention=csa, heavily_compressed_attention=hca)


# name: batch, length, changes to BASE. The lengths end within, at and after windows.
MODELS = {
    "sliding": (2, 13, {
        "layer_types": (SLIDING, SLIDING), "mlp_layer_types": ("hash_moe", "moe"),
        "hc_mult": 1, "hc_sinkhorn_iters": 1, "scoring_func": "sigmoid", "rope_scaling": YARN,
    }),
    "csa, at a window's end": (2, 24, {
        "layer_types": (CSA, CSA), "mlp_layer_types": ("hash_moe", "moe"), "index_topk": 2,
        "hc_sinkhorn_iters": 2, "hc_eps": 1e-2, "rope_scaling": YARN,
    }),
    "hca, a token after a window": (1, 25, {
        "layer_types": (HCA, HCA), "mlp_layer_types": ("moe", "hash_moe"),
        "scoring_func": "sigmoid", "hc_mult": 3,
    }),
    "every kind, within a window, mtp": (1, 39, {
        "layer_types": (SLIDING, CSA, HCA, CSA), "mlp_layer_types": ("hash_moe", *("moe",) * 3),
        "hc_sinkhorn_iters": 2, "hc_eps": 1e-2, "rope_scaling": YARN, "num_nextn_predict_layers": 1,
    }),
    "as pro, every entry selected": (1, 27, {
        "layer_types": (HCA, HCA, CSA, HCA), "mlp_layer_types": ("moe",) * 4, "index_topk": 100,
        "hc_sinkhorn_iters": 1, "hc_eps": 1e-2, "n_routed_experts": 4, "num_experts_per_tok": 4,
    }),
    "shorter than any window": (3, 3, {
        "layer_types": (CSA, HCA), "mlp_layer_types": ("moe", "moe"), "num_nextn_predict_layers": 1,
    }),
    "one token": (2, 1, {
        "layer_types": (CSA, SLIDING), "mlp_layer_types": ("hash_moe", "moe"),
    }),
    "sliding window beyond the text, odd rate": (2, 17, {
        "layer_types": (SLIDING, CSA), "mlp_layer_types": ("moe", "moe"), "sliding_window": 50,
        "compress_rates": rates(5, 8), "index_topk": 1, "o_groups": 4, "rope_scaling": YARN,
    }),
    "small rates, one expert, free shared expert": (2, 22, {
        "layer_types": (CSA, HCA), "mlp_layer_types": ("moe", "moe"), "sliding_window": 2,
        "compress_rates": rates(2, 13), "index_topk": 3, "hc_mult": 2, "num_experts_per_tok": 1,
        "n_routed_experts": 5, "shared_expert_swiglu_limit": False, "o_groups": 1,
        "qk_rope_head_dim": 4, "head_dim": 8,
    }),
    "scanned": (1, 26, {
        "layer_types": (SLIDING, CSA, HCA, CSA, HCA), "hc_mult": 2, "hc_sinkhorn_iters": 3,
        "mlp_layer_types": ("hash_moe", *("moe",) * 4), "num_nextn_predict_layers": 1,
        "compress_rates": rates(3, 5),
    }),
}  # fmt: skip


def forward(model):
    """A compiled (ids, segment_ids, dense_index) -> Output of the model's own weights."""
    graphdef, params, rest = split(model)

    def run(params, rest, ids, segment_ids, dense):
        return nnx.merge(graphdef, params, rest)(ids, segment_ids, dense_index=dense)

    return functools.partial(quick_jit(run), params, rest)


def safe(cfg, samples, kinds):
    """Parameters by which no top-k decision is near to flipping, and the rows for each of `kinds`.

    samples: for every row its samples' ids. kinds: values of dense_index.
    """
    for seed in range(20):
        params = random_parameters(cfg, seed)
        runs = {dense: reference_rows(cfg, params, samples, dense) for dense in kinds}
        if all(is_safe(rows) for rows in runs.values()):
            return params, runs
    raise RuntimeError("no safe parameters in 20 seeds")


def reference_rows(cfg, params, samples, dense):
    return [[reference.forward(cfg, params, ids, dense=dense) for ids in row] for row in samples]


def is_safe(rows) -> bool:
    return min(run.smallest_gap for row in rows for run in row) > GAP


def check(cfg, out, rows) -> None:
    """`out` of a batch against `rows`: for every row the Forward of each of its samples."""
    check_logits(out, rows)
    check_mtp_logits(cfg, out, rows)
    for layer, aux in enumerate(out.aux["layers"]):
        runs = [run for row in rows for run in row]
        k = cfg.num_experts_per_tok
        choices = np.concatenate([run.router_choices[layer].reshape(-1) for run in runs])
        load = np.bincount(choices, minlength=cfg.n_routed_experts)
        np.testing.assert_array_equal(aux["expert_load"], load)
        assert ("balance_loss" in aux) == (cfg.mlp_layer_types[layer] == "moe")
        if "balance_loss" in aux:
            values = []
            for row in rows:  # a packed row counts as one sequence
                scores = np.concatenate([run.router_scores[layer] for run in row])
                chosen = np.concatenate([run.router_choices[layer] for run in row])
                values.append(reference.balance_loss(scores, chosen.reshape(-1, k)))
            np.testing.assert_allclose(aux["balance_loss"], np.mean(values), rtol=1e-5)
        if cfg.layer_types[layer] == CSA:
            kl = np.concatenate([run.index_kl[layer] for run in runs])
            expected = np.mean(kl[~np.isnan(kl)]) if (~np.isnan(kl)).any() else 0.0
            np.testing.assert_allclose(aux.get("index_loss", 0.0), expected, rtol=1e-5, atol=1e-6)


def check_logits(out, rows) -> None:
    for logits, row in zip(np.asarray(out.logits), rows, strict=True):
        expected = np.concatenate([run.logits for run in row])
        assert np.isfinite(logits).all()
        assert_close(logits[: len(expected)], expected)


def check_mtp_logits(cfg, out, rows) -> None:
    """Of a sample's tokens all but the last have an MTP row."""
    assert (out.mtp_logits is not None) == bool(cfg.num_nextn_predict_layers)
    if out.mtp_logits is None:
        return
    for logits, row in zip(np.asarray(out.mtp_logits), rows, strict=True):
        expected = np.concatenate([run.mtp_logits for run in row])[: len(logits)]
        given = ~np.isnan(expected[:, 0])
        assert_close(logits[: len(expected)][given], expected[given])


def assert_close(logits, expected) -> None:
    atol = 1e-5 * np.abs(expected).max(initial=0)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", MODELS)
def test_random_model(name):
    batch, length, changes = MODELS[name]
    cfg = SimpleNamespace(**BASE | changes)
    ids = np.random.default_rng(len(name)).integers(0, cfg.vocab_size, (batch, length))
    kinds = [False, True] if CSA in cfg.layer_types else [False]
    params, runs = safe(cfg, [[row] for row in ids], kinds)
    model = build(cfg, params, scan_layers=name == "scanned")
    assert bool(model.units) == (name == "scanned")
    run = forward(model)
    for dense in kinds:
        check(cfg, run(jnp.asarray(ids, jnp.int32), None, jnp.asarray(dense)), runs[dense])


PACKED = SimpleNamespace(
    **BASE | {
        "layer_types": (SLIDING, CSA, HCA), "mlp_layer_types": ("hash_moe", "moe", "moe"),
        "compress_rates": rates(3, 5), "index_topk": 2, "hc_sinkhorn_iters": 2,
        "hc_eps": 1e-2, "rope_scaling": YARN, "num_nextn_predict_layers": 1,
    }
)  # fmt: skip
PACKED_LENGTH = 32


@functools.cache
def packed_model():
    params = random_parameters(PACKED, 0)
    return params, forward(build(PACKED, params))


def packed_batch(lengths_of_rows, seed):
    """ids, segment ids [B, T] (0 pads the end) and every row's samples."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, PACKED.vocab_size, (len(lengths_of_rows), PACKED_LENGTH))
    segments, samples = np.zeros_like(ids), []
    for row, lengths in enumerate(lengths_of_rows):
        ends = np.cumsum(lengths)
        for number, (start, end) in enumerate(zip(ends - lengths, ends, strict=True)):
            segments[row, start:end] = number + 1
        samples.append(np.split(ids[row, : ends[-1]], ends[:-1]))
    return jnp.asarray(ids, jnp.int32), jnp.asarray(segments, jnp.int32), samples


@st.composite
def row_lengths(draw):
    """Lengths of at least one sample, together at most PACKED_LENGTH."""
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))
    while sum(lengths) > PACKED_LENGTH:
        lengths.pop()
    return lengths


@pytest.mark.slow
@settings(max_examples=25)
@given(st.tuples(row_lengths(), row_lengths()), st.booleans(), st.integers(0, 1000))
def test_packed_samples_equal_samples_apart(lengths, dense, seed):
    ids, segments, samples = packed_batch(lengths, seed)
    params, run = packed_model()
    rows = reference_rows(PACKED, params, samples, dense)
    assume(is_safe(rows))
    check(PACKED, run(ids, segments, jnp.asarray(dense)), rows)


def test_padding_may_lie_anywhere():
    """Before and between samples too; and what it holds does not matter."""
    params, run = packed_model()
    ids, _, _ = packed_batch([[20], [20]], seed=3)
    segments = np.zeros((2, PACKED_LENGTH), np.int32)
    segments[0, 4:17], segments[0, 20:31], segments[1, 1:32] = 1, 2, 1
    runs = []
    for row, start, end in ((0, 4, 17), (0, 20, 31), (1, 1, 32)):
        sample = np.asarray(ids)[row, start:end]
        runs.append((row, start, end, reference.forward(PACKED, params, sample)))
    for filling in (0, 5):
        filled = jnp.where(segments > 0, ids, filling)
        out = run(filled, jnp.asarray(segments), jnp.asarray(False))
        for row, start, end, one in runs:
            assert_close(np.asarray(out.logits)[row, start:end], one.logits)


SCANNED = SimpleNamespace(
    **BASE | {
        "layer_types": (SLIDING, CSA, CSA), "mlp_layer_types": ("hash_moe", "moe", "moe"),
        "hc_mult": 2, "hc_sinkhorn_iters": 2, "hc_eps": 1e-2,
    }
)  # fmt: skip


def loss_and_gradients(model, ids):
    """All losses in one, and its gradient in every parameter by name."""
    graphdef, params, rest = split(model)

    def loss(params, rest):
        out = nnx.merge(graphdef, params, rest)(ids)
        picked = jnp.take_along_axis(jax.nn.log_softmax(out.logits[:, :-1]), ids[:, 1:, None], -1)
        layers = out.aux["layers"]
        extra = sum(aux.get("index_loss", 0) + aux.get("balance_loss", 0) for aux in layers)
        return extra - jnp.mean(picked), out

    (value, out), gradients = quick_jit(jax.value_and_grad(loss, has_aux=True))(params, rest)
    return float(value), out, state_dict(nnx.merge(graphdef, gradients, rest))


@pytest.mark.slow
def test_scan_and_remat_change_nothing(subtests):
    ids = np.random.default_rng(0).integers(0, SCANNED.vocab_size, (1, 17))
    params, _ = safe(SCANNED, [[ids[0]]], [False])
    ids = jnp.asarray(ids, jnp.int32)
    plain = build(SCANNED, params)
    weights, results = state_dict(plain), loss_and_gradients(plain, ids)
    for scan_layers, remat in ((True, "none"), (False, "dots"), (True, "full")):
        with subtests.test(scan_layers=scan_layers, remat=remat):
            cfg = dataclasses.replace(plain.config, scan_layers=scan_layers, remat=remat)
            assert cfg.schedule == ((1, 1, 2) if scan_layers else (3, 0, 0))
            model = abstract_model(cfg)
            load_state_dict(model, weights)
            jax.tree.map(np.testing.assert_array_equal, state_dict(model), weights)
            check_same(loss_and_gradients(model, ids), results)


def check_same(actual, expected) -> None:
    (value, out, gradients), (expected_value, expected_out, expected_gradients) = actual, expected
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    assert_close(out.logits, expected_out.logits)
    for aux, other in zip(out.aux["layers"], expected_out.aux["layers"], strict=True):
        assert aux.keys() == other.keys()
        for name in aux:
            np.testing.assert_allclose(aux[name], other[name], rtol=1e-5, atol=1e-6)
    del gradients["model.layers.0.mlp.gate.tid2eid"]
    largest = max(np.abs(g).max() for g in gradients.values())
    for name, gradient in gradients.items():
        atol = 1e-5 * np.abs(gradient).max() + 1e-7 * largest
        np.testing.assert_allclose(
            gradient, expected_gradients[name], rtol=0, atol=atol, err_msg=name
        )

"""The numpy reference against the printed numeric case, parameter counts and hand-made examples."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

from tests import numeric_case as case
from tests import reference
from tests.reference_parameters import parameter_shapes, random_parameters

HALF = 0.5000001  # a printed digit is right to half a unit


@pytest.fixture(scope="module")
def run() -> reference.Forward:
    return reference.forward(case.config(), case.seeded_parameters(), case.token_ids())


def variant(**changes) -> SimpleNamespace:
    return SimpleNamespace(**vars(case.config()) | changes)


def test_seeded_parameters_and_ids():
    params = case.seeded_parameters()
    for name, start in case.PARAMETER_STARTS.items():
        np.testing.assert_allclose(params[name][0, :3], start, atol=HALF * 1e-6)
    assert case.token_ids()[:8].tolist() == [1, 9, 27, 55, 29, 13, 7, 11]


def test_streams(run):
    for streams, (mean, start) in zip(run.streams, case.STREAMS, strict=True):
        np.testing.assert_allclose(np.abs(streams).mean(), mean, atol=HALF * 1e-6)
        np.testing.assert_allclose(streams[39, 0, :3], start, atol=HALF * 1e-5)


@pytest.mark.parametrize("part", ["main", "mtp"])
def test_logits(run, part):
    logits, rows = {
        "main": (run.logits, case.LOGITS),
        "mtp": (run.mtp_logits, case.MTP_LOGITS),
    }[part]
    for t, (start, argmax, mean) in rows.items():
        np.testing.assert_allclose(logits[t, :4], start, atol=HALF * 1e-5)
        assert logits[t].argmax() == argmax
        np.testing.assert_allclose(np.abs(logits[t]).mean(), mean, atol=HALF * 1e-6)


def test_losses(run):
    np.testing.assert_allclose(np.abs(run.logits).max(), case.MAX_ABS_LOGIT, atol=HALF * 1e-6)
    np.testing.assert_allclose(run.loss, case.LOSS, atol=HALF * 1e-6)
    np.testing.assert_allclose(run.mtp_loss, case.MTP_LOSS, atol=HALF * 1e-6)
    assert np.isnan(run.token_loss).sum() == 1 and np.isnan(run.mtp_token_loss).sum() == 2


def test_gaps(run):
    main = [gap.min() for layer, gap in run.router_gaps.items() if layer < 4]
    np.testing.assert_allclose(min(main), case.ROUTER_GAP, atol=HALF * 1e-4)
    index = [gap.min() for gap in run.index_gaps.values()]
    np.testing.assert_allclose(min(index), case.INDEX_GAP, atol=HALF * 1e-3)


def gradient(name: str, entry: tuple[int, ...]) -> float:
    """Central difference of the case's loss in one number of one parameter."""
    cfg, params, step = variant(num_nextn_predict_layers=0), case.seeded_parameters(), 1e-5
    losses = []
    for sign in (1, -1):
        moved = params[name].astype(np.float64)
        moved[entry] += sign * step
        losses.append(reference.forward(cfg, params | {name: moved}, case.token_ids()).loss)
    return (losses[0] - losses[1]) / (2 * step)


def test_gradients_by_central_differences():
    scale = [gradient("model.layers.1.attn_hc.scale", (i,)) for i in range(3)]
    np.testing.assert_allclose(scale, case.SCALE_GRADIENT, atol=1e-7)
    name = "model.layers.0.self_attn.sinks"
    norm = np.linalg.norm([gradient(name, (i,)) for i in range(4)])
    np.testing.assert_allclose(norm, case.GRADIENT_NORMS[name], rtol=1e-5)
    indexer = "model.layers.1.self_attn.compressor.indexer.scorer.weights_proj.weight"
    assert gradient(indexer, (0, 0)) == 0.0


@pytest.mark.parametrize(
    ("changes", "main", "mtp"),
    [
        ({}, 284_332_230_231, 6_610_048_891),
        (
            {
                "hidden_size": 7168,
                "layer_types": (reference.HCA,) * 2
                + (reference.CSA, reference.HCA) * 29
                + (reference.CSA,),
                "mlp_layer_types": ("hash_moe",) * 3 + ("moe",) * 58,
                "moe_intermediate_size": 3072,
                "num_attention_heads": 128,
                "q_lora_rank": 1536,
                "o_groups": 16,
                "n_routed_experts": 384,
            },
            1_572_997_179_491,
            25_840_145_979,
        ),
    ],
    ids=["flash", "pro"],
)
def test_parameter_counts_of_the_released_models(changes, main, mtp):
    rates = SimpleNamespace(compressed_sparse_attention=4, heavily_compressed_attention=128)
    flash = {
        "vocab_size": 129280,
        "hidden_size": 4096,
        "layer_types": (reference.SLIDING,) * 2
        + (reference.CSA, reference.HCA) * 20
        + (reference.CSA,),
        "mlp_layer_types": ("hash_moe",) * 3 + ("moe",) * 40,
        "compress_rates": rates,
        "moe_intermediate_size": 2048,
        "num_attention_heads": 64,
        "head_dim": 512,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "n_routed_experts": 256,
        "num_experts_per_tok": 6,
        "hc_mult": 4,
        "num_nextn_predict_layers": 1,
    }
    cfg = SimpleNamespace(**flash | changes)
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(cfg).items()}
    extra = {n for n in sizes if n.startswith(("mtp.", f"model.layers.{len(cfg.layer_types)}."))}
    buffers = {n for n in sizes if n.endswith(("tid2eid", "e_score_correction_bias"))}
    assert sum(sizes[name] for name in sizes.keys() - extra - buffers) == main
    # The published MTP count includes the module's selection bias, the main one no buffer.
    assert sum(sizes[name] for name in extra) == mtp


def test_random_parameters_are_away_from_trivial_values():
    cfg = case.config()
    params = random_parameters(cfg, seed=0)
    assert {name: value.shape for name, value in params.items()} == parameter_shapes(cfg)
    assert all(value.std() > 0 for name, value in params.items() if value.size > 1)
    table = params["model.layers.0.mlp.gate.tid2eid"]
    assert all(len(set(row)) == cfg.num_experts_per_tok for row in table)


def test_yarn_of_the_released_config():
    scaling = SimpleNamespace(
        factor=16, beta_fast=32, beta_slow=1, original_max_position_embeddings=65536
    )
    cfg = variant(qk_rope_head_dim=64, rope_scaling=scaling)
    scaled = reference.rope_frequencies(cfg, reference.CSA)
    plain = reference.rope_frequencies(variant(qk_rope_head_dim=64, rope_scaling=None), "other")
    slowed = plain / scaled
    assert np.all(slowed[:16] == 1) and 1 < slowed[16] and slowed[24] < 15.99
    np.testing.assert_allclose(slowed[25:], 16)
    sliding = reference.rope_frequencies(cfg, reference.SLIDING)
    np.testing.assert_allclose(sliding, 1e4 ** (-np.arange(32) / 32))


def test_top_k_takes_the_lowest_index_first():
    assert reference.top_k(np.array([0.0, -0.0, 1.0, 0.0, -0.0]), 3) == [2, 0, 1]
    assert reference.top_k(np.array([-0.0, 0.0, -1.0]), 2) == [0, 1]
    assert reference.selection_gap([3.0, 1.0, 0.5], 2) == 0.5
    assert reference.selection_gap([3.0, 0.0, -0.0], 2) == math.inf


def test_sinkhorn_ends_with_a_column_step():
    mix = reference.sinkhorn(np.random.RandomState(0).standard_normal((4, 4)), 20, 1e-6)
    np.testing.assert_allclose(mix.sum(axis=0), 1, atol=1e-5)
    np.testing.assert_allclose(mix.sum(axis=1), 1, atol=1e-2)


def test_index_kl_of_hand_made_rows():
    scores, support = np.array([0.0, math.log(3.0), -math.inf]), np.array([True, True, False])
    teacher, kl = reference.index_kl(scores, support, np.array([0.1, 0.1, 0.0]))
    np.testing.assert_allclose(teacher, [0.5, 0.5, 0.0])
    np.testing.assert_allclose(kl, 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    teacher, kl = reference.index_kl(scores, np.zeros(3, bool), np.zeros(3))
    assert not teacher.any() and math.isnan(kl)


def test_index_kl_of_the_model(run):
    cfg, params, ids = case.config(), case.seeded_parameters(), case.token_ids()
    for layer in (1, 3):
        rows = run.index_teacher[layer].sum(axis=1)
        np.testing.assert_allclose(rows, np.arange(40) >= 3)  # tokens 0 to 2 have no entry
        assert run.index_selected[layer].sum(axis=1).tolist() == [
            min((t + 1) // 4, cfg.index_topk) for t in range(40)
        ]
        assert np.array_equal(np.isnan(run.index_kl[layer]), np.arange(40) < 3)
        assert run.kl[layer] > 0
    # Selecting everything is the dense stage; a small k is not.
    dense = reference.forward(cfg, params, ids, dense=True)
    everything = reference.forward(variant(index_topk=10), params, ids)
    np.testing.assert_array_equal(dense.logits, everything.logits)
    np.testing.assert_array_equal(dense.index_kl[1], everything.index_kl[1])
    assert np.abs(dense.logits - run.logits).max() > 0.01


def test_balance_is_one_under_uniform_routing(run):
    choices = np.array([[0, 1], [2, 3]])
    np.testing.assert_allclose(reference.balance_loss(np.ones((2, 4)), choices), 1.0)
    skewed = np.array([[3.0, 1.0], [1.0, 1.0]])
    value = reference.balance_loss(skewed, np.array([[0], [0]]))
    np.testing.assert_allclose(value, 2.0 * (0.75 + 0.5) / 2)
    assert sorted(run.balance) == [1, 2, 3, 4]


def test_shared_expert_clamp_is_a_switch(run):
    cfg = variant(shared_expert_swiglu_limit=False)
    free = reference.forward(cfg, case.seeded_parameters(), case.token_ids())
    assert np.abs(free.logits - run.logits).max() > 0.1


def test_packed_is_the_samples_apart():
    cfg, params, ids = case.config(), case.seeded_parameters(), case.token_ids()
    samples = [ids[:1], ids[:3], ids[3:16]]
    out = reference.packed(cfg, params, samples)
    alone = reference.forward(cfg, params, ids[3:16])
    np.testing.assert_array_equal(out.logits[4:], alone.logits)
    np.testing.assert_array_equal(out.index_scores[1][4:], alone.index_scores[1])
    assert out.streams[0].shape == (17, 4, 32) and out.index_selected[1].shape == (17, 3)
    assert np.isnan(out.token_loss[[0, 3, 16]]).all() and np.isnan(out.token_loss).sum() == 3
    assert np.isnan(out.mtp_logits[[0, 3, 16]]).all() and np.isnan(out.mtp_token_loss).sum() == 5
    np.testing.assert_allclose(out.balance[1], np.mean([s.balance[1] for s in out.samples]))
    for field in dataclasses.fields(out):
        value = getattr(out, field.name)
        if isinstance(value, dict) and field.name != "balance":
            rows = {layer: len(array) for layer, array in value.items()}
            # The MTP block (layer 4) has no row for the last token of a sample.
            assert rows == {layer: 14 if layer == 4 else 17 for layer in rows}, field.name


def test_two_mtp_modules_are_refused():
    cfg = variant(num_nextn_predict_layers=2)
    with pytest.raises(ValueError, match="num_nextn_predict_layers=2; allowed: 0, 1"):
        reference.forward(cfg, case.seeded_parameters(), case.token_ids()[:4])

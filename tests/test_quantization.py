"""Which tensor gets which format: rules, errors, bytes, and one forward pass for PTQ and QAT."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.jax_model import quick_jit
from tests.training import tiny
from v4jax import presets
from v4jax.config import CSA, HCA, SLIDING
from v4jax.layers.context import IndexFormats
from v4jax.model import Transformer, abstract_model
from v4jax.numerics import (
    FORMATS,
    MXFP4,
    MXFP4_EVEN,
    dequantize,
    format_named,
    pack,
    quantize,
)
from v4jax.quantization import (
    ALL_LINEARS,
    BF16_INDEX_SCORES,
    NO_QUANTIZATION,
    PAPER,
    SCOPES,
    Quantization,
    flat_paths,
    lossless_share,
    quantize_params,
    quantized,
    resolve,
    table,
)
from v4jax.training.data import EvalWindows
from v4jax.training.observe import quantization_note
from v4jax.training.step import Program, split_model

EXPERTS = r".*/experts/(gate_up|down)_proj"
SCANNED = tiny.model(
    layer_types=(SLIDING, *(CSA, HCA) * 2),
    mlp_layer_types=("hash_moe", *("moe",) * 4),
    scan_layers=True,
)


def shapes(config):
    return split_model(abstract_model(config))[0]


@pytest.fixture(scope="module")
def params():
    """Shapes of a stacked model with every kind of layer."""
    return shapes(SCANNED)


def refused(params, *rules) -> str:
    with pytest.raises(ValueError) as error:
        resolve(Quantization(rules), params)
    message = str(error.value)
    assert message.startswith("Quantization.rules: ") and "\n" not in message
    return message.removeprefix("Quantization.rules: ")


# ---- rules ----


def test_the_papers_scope_is_experts_and_index_operands(params):
    resolved = resolve(PAPER, params)
    blocks = ("layers/0", "units/0", "units/1", "mtp/block")
    assert dict(resolved.weights) == {
        f"{block}/mlp/experts/{name}_proj": MXFP4
        for block in blocks
        for name in ("gate_up", "down")
    }
    assert resolved.index == IndexFormats(query=MXFP4, key=MXFP4, scores=None)


def test_all_linears_are_all_but_embedding_head_routers_and_streams(params):
    resolved = resolve(ALL_LINEARS, params)
    assert set(resolved.weights.values()) == {MXFP4}
    matrices = {path for path, leaf in flat_paths(params).items() if len(leaf.shape) >= 2}
    stacked = {path for path in matrices if path.startswith("units/")}
    vectors = {path for path in stacked if len(flat_paths(params)[path].shape) == 2}
    left = matrices - vectors - set(resolved.weights)
    kept = ("embed_tokens/", "lm_head/", "/gate/weight", "_hc/fn", "hc_head/hc_fn", "position_bias")
    assert left and all(any(mark in path for mark in kept) for path in left), left
    for mark in kept:
        assert any(mark in path for path in left) and not any(mark in p for p in resolved.weights)
    for mark in ("q_a", "q_b", "kv", "o_a", "o_b", "compressor/gate", "indexer/weights", "mtp/e"):
        assert any(f"{mark}_proj/weight" in path for path in resolved.weights)
    assert resolved.index == IndexFormats(query=MXFP4, key=MXFP4)


@pytest.mark.parametrize("name", [p for p in presets.PRESETS if p != "tiny"])
@pytest.mark.parametrize("scope", SCOPES)
def test_every_scope_fits_every_preset(name, scope):
    resolved = resolve(SCOPES[scope], shapes(presets.PRESETS[name]()))
    assert len(resolved.weights) >= 4


def test_the_preset_of_smoke_tests_has_the_papers_scope_alone():
    """It has no MTP, which the others round too."""
    tiny_shapes = shapes(presets.tiny())
    assert len(resolve(PAPER, tiny_shapes).weights) == 2
    assert "'mtp/[eh]_proj/weight' matches no tensor" in refused(tiny_shapes, *ALL_LINEARS.rules)


def test_the_first_rule_that_matches_wins(params):
    down, up = "mtp/block/mlp/experts/down_proj", "mtp/block/mlp/experts/gate_up_proj"
    rules = ((r"mtp/.*/down_proj", "nvfp4"), (EXPERTS, "mxfp4"))
    found = resolve(Quantization(rules), params).weights
    assert found[down] == FORMATS["nvfp4"] and found[up] == MXFP4
    rules = ((r"mtp/.*/gate_up_proj", "nvfp4"), (r".*/down_proj", "mxfp4_even"))
    found = resolve(Quantization(rules), params).weights
    assert found[up] == FORMATS["nvfp4"] and found[down].name == "mxfp4_even"
    assert "layers/0/mlp/experts/gate_up_proj" not in found


def test_patterns_match_whole_paths(params):
    assert refused(params, ("experts/down_proj", "mxfp4")) == (
        "pattern 'experts/down_proj' matches no tensor"
    )
    assert "matches no tensor" in refused(params, (EXPERTS, "mxfp4"), ("norm/weight", "mxfp4"))


def test_a_rule_that_never_gets_a_turn_is_refused(params):
    message = refused(params, (r".*/down_proj", "mxfp4"), (r"mtp/.*/experts/down_proj", "nvfp4"))
    assert message == "pattern 'mtp/.*/experts/down_proj' matches no tensor"


def test_an_unknown_format_is_refused(params):
    message = refused(params, (EXPERTS, "fp3"))
    assert "unknown format 'fp3', known: mxfp4, " in message and EXPERTS in message
    assert "unknown format 'bf16'" in refused(params, (EXPERTS, "bf16"))


def test_a_variant_of_a_format_is_named_by_its_options(params):
    found = resolve(
        Quantization(((EXPERTS, "mxfp4-16"), ("activations/index_(query|key)", "mxfp4-plain"))),
        params,
    )
    assert {fmt.block for fmt in found.weights.values()} == {(1, 16)}
    assert found.index.query is not None and found.index.key is not None
    assert (found.index.query.rotated, found.index.query.block) == (False, (1, 32))
    assert MXFP4.rotated and found.index.key == found.index.query
    eight = format_named("fp8_1x128-32")
    assert (eight.name, eight.block, eight.bits) == ("fp8_1x128-32", (1, 32), 8)
    assert "'x': allowed: a length of blocks, or plain" in refused(params, (EXPERTS, "mxfp4-x"))
    assert "not divisible by 48" in refused(params, (EXPERTS, "mxfp4-48"))


def test_a_shape_that_a_format_cannot_hold_names_the_tensor():
    params = shapes(tiny.model(moe_intermediate_size=48))
    message = refused(params, (EXPERTS, "mxfp4"))
    assert message.startswith("layers/0/mlp/experts/down_proj: mxfp4: ") and "32" in message
    resolve(Quantization(((EXPERTS, "nvfp4"),)), params)  # its blocks are 16 wide
    resolve(Quantization(((r".*/gate_up_proj", "mxfp4"),)), params)  # asked of what gets FP4 alone


# ---- activations ----


def test_activations_have_paths_of_their_own(params):
    query = Quantization((("activations/index_query", "mxfp4"),))
    assert resolve(query, params).index == IndexFormats(query=MXFP4)
    both = Quantization(((r"activations/index_(query|key)", "mxfp4_even"), BF16_INDEX_SCORES))
    resolved = resolve(both, params)
    assert resolved.index == IndexFormats(query=MXFP4_EVEN, key=MXFP4_EVEN, scores="bf16")
    assert not resolved.weights


def test_scores_are_bf16_or_nothing_and_nothing_else_is(params):
    assert refused(params, ("activations/index_scores", "mxfp4")).endswith("allow only bf16")
    assert "unknown format 'bf16'" in refused(params, ("activations/index_key", "bf16"))


def test_activations_without_an_indexer_match_nothing():
    params = shapes(tiny.model(layer_types=(HCA,)))
    for rule in ((r"activations/index_(query|key)", "mxfp4"), BF16_INDEX_SCORES):
        assert refused(params, rule) == f"pattern {rule[0]!r} matches no tensor"


def test_an_index_width_that_a_format_cannot_hold_names_the_activation():
    params = shapes(tiny.model(index_head_dim=16))
    assert refused(params, ("activations/index_key", "mxfp4")).startswith("activations/index_key: ")
    params = shapes(tiny.model(index_head_dim=96))
    assert "index_head_dim is 96" in refused(params, ("activations/index_key", "mxfp4"))


def test_a_scale_over_all_tokens_would_show_the_indexer_the_future(params):
    said = refused(params, ("activations/index_key", "nvfp4"))
    assert said.startswith("activations/index_key: the scale of nvfp4 spans all tokens")


# ---- the printed table ----


def test_bytes_are_those_of_a_hand_count(params):
    rows = {path: row for path, *row in table(resolve(PAPER, params), params)}
    # Two stacked layers of four experts of [2 F, D] = [64, 32]: 4 bits each, a byte for every 32.
    size = 2 * 4 * 64 * 32
    assert rows["units/0/mlp/experts/gate_up_proj"] == [
        "2x4x64x32", "mxfp4", 2 * size, size // 2 + size // 32,
    ]  # fmt: skip
    assert rows["activations/index_query"] == ["", "mxfp4", 0, 0]
    assert "activations/index_scores" not in rows
    before, after = (sum(row[i] for row in rows.values()) for i in (2, 3))
    assert before / after == 16 / 4.25 == 2 / 0.53125  # 3.7647
    rules = Quantization((*PAPER.rules, BF16_INDEX_SCORES))
    lines = quantization_note(rules, params).splitlines()
    assert f"{before}" in lines[-1] and f"{after}" in lines[-1] and "sum" in lines[-1]
    assert any("activations/index_scores" in line and "bf16" in line for line in lines)
    assert sum("units/1/mlp/experts/down_proj" in line for line in lines) == 1


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp8_1x128", "fp8_128x128"])
def test_bytes_are_those_of_the_packed_arrays(name):
    config = tiny.model(hidden_size=128, moe_intermediate_size=128)
    model = shapes(config)
    rows = table(resolve(Quantization(((EXPERTS, name),)), model), model)
    for path, shape, fmt, _, size in rows:
        leaf = flat_paths(model)[path]
        assert fmt == name and shape == "x".join(map(str, leaf.shape))
        packed = jax.eval_shape(lambda w: pack(quantize(w, FORMATS[name])), leaf)
        assert size == sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(packed))


# ---- what is computed ----


@pytest.fixture(scope="module")
def model():
    make = quick_jit(lambda: nnx.state(Transformer(tiny.model(), rngs=nnx.Rngs(0))))
    model = abstract_model(tiny.model())
    nnx.update(model, make())
    return model


FORWARD = quick_jit(lambda model, tokens: model(tokens).logits)


def text(rows=2, length=33):
    return np.random.default_rng(0).integers(0, 257, (rows, length)).astype(np.int32)


@pytest.mark.parametrize("scope", ["paper", "all_linears"])
def test_chosen_leaves_are_rounded_and_others_are_the_same_arrays(model, scope):
    params, _ = split_model(model)
    weights = resolve(SCOPES[scope], params).weights
    rounded = flat_paths(quantize_params(params, weights))
    before = flat_paths(params)
    assert before.keys() == rounded.keys()
    for path, leaf in before.items():
        if path in weights:
            wanted = np.asarray(dequantize(quantize(leaf, MXFP4)))
            assert np.asarray(rounded[path]).tobytes() == wanted.tobytes() != leaf.tobytes()
        else:
            assert rounded[path] is leaf


def test_a_quantized_model_is_a_copy(model):
    graphdef, before = nnx.split(model)
    before = jax.tree.map(np.asarray, before)
    copy = quantized(model, PAPER)
    plain, rounded = FORWARD(model, text()), FORWARD(copy, text())
    assert np.abs(np.asarray(plain) - np.asarray(rounded)).max() > 0
    assert copy.index_formats == IndexFormats(query=MXFP4, key=MXFP4)
    assert model.index_formats == IndexFormats()
    assert nnx.split(model)[0] == graphdef
    assert tiny.same_bits(jax.tree.map(np.asarray, nnx.split(model)[1]), before)
    assert tiny.same_bits(FORWARD(model, text()), plain)
    twice = quantized(copy, PAPER)  # already on the grid
    assert tiny.same_bits(FORWARD(twice, text()), rounded)


@pytest.mark.slow
def test_ptq_and_qat_are_one_forward_pass(model):
    """On the same masters: `quantized`, the evaluation, and weights rounded on their way, bit for
    bit; so PTQ - QAT is what training did."""
    params, variables = split_model(model)
    tokens = text(4)
    windows = EvalWindows(tokens, np.ones((4, 32), bool), np.arange(4), np.full(4, 32))
    evaluator = tiny.QuickEvaluator(Program.of(model), windows, 2)
    ptq = evaluator.nll(params, variables, PAPER)
    copy, _ = split_model(quantized(model, PAPER))
    activations = Quantization(PAPER.rules[1:])
    assert np.array_equal(ptq, evaluator.nll(copy, variables, activations))
    assert np.array_equal(ptq, evaluator.nll(copy, variables, PAPER))
    assert not np.array_equal(ptq, evaluator.nll(params, variables, NO_QUANTIZATION))
    assert not np.array_equal(ptq, evaluator.nll(copy, variables, NO_QUANTIZATION))
    resolved = resolve(PAPER, params)

    def in_a_step(params, tokens):
        rounded = quantize_params(params, resolved.weights)
        bound = evaluator.program.bind(rounded, variables, resolved.index)
        return bound(tokens).logits, rounded

    logits, rounded = quick_jit(in_a_step)(params, tokens[:2, :-1])
    assert tiny.same_bits(rounded, copy)
    picked = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), tokens[:2, 1:, None], axis=-1
    )
    np.testing.assert_allclose(-picked.sum(axis=(1, 2)), ptq[:2], rtol=1e-5)


def test_bf16_scores_are_an_option_of_their_own(model):
    scores = quantized(model, Quantization((BF16_INDEX_SCORES,)))
    assert scores.index_formats == IndexFormats(scores="bf16")
    assert tiny.same_bits(split_model(scores)[0], split_model(model)[0])


def test_lossless_share_weighs_tiles_by_number():
    """Of 2 + 4 x 3 tiles, one stacked tile holds scales more than 2^14 apart."""
    params = {"a": jnp.ones((2, 128, 128)), "b": {"c": np.ones((300, 512), np.float32)}}
    params["a"] = params["a"].at[1, 5, 64].set(2.0**30)
    share = lossless_share(Quantization(((".*", "mxfp4"),)), params)
    assert math.isclose(share(params), (2 + 12 - 1) / 14, rel_tol=1e-6)
    assert lossless_share(Quantization(((".*", "nvfp4"),)), params) is None
    assert lossless_share(NO_QUANTIZATION, params) is None


def test_quantizations_are_static_data():
    assert hash(PAPER) == hash(Quantization(PAPER.rules)) and PAPER != ALL_LINEARS
    assert dataclasses.asdict(PAPER) == {"rules": PAPER.rules}
    assert functools.cache(lambda q: q)(PAPER) is PAPER


def test_a_rule_of_none_opts_out_and_is_shown():
    """The first rule that matches wins, so it stands before those that would take the tensor."""
    params = shapes(presets.nano())
    plain, path = resolve(PAPER, params), "layers/0/mlp/experts/down_proj"
    some = PAPER.without("layers/0/.*", "activations/index_key")
    assert some.rules[:2] == (("layers/0/.*", "none"), ("activations/index_key", "none"))
    resolved = resolve(some, params)
    taken = set(plain.weights) - set(resolved.weights)
    assert taken == {p for p in plain.weights if p.startswith("layers/0/")} and path in taken
    assert resolved.index == IndexFormats(query=MXFP4)
    assert set(resolved.opted_out) == taken | {"activations/index_key"}
    rows = {row[0]: row[1:] for row in table(resolved, params)}
    size = 2 * int(np.prod(flat_paths(params)[path].shape))
    assert rows[path] == ("x".join(map(str, flat_paths(params)[path].shape)), "none", size, size)
    assert rows["activations/index_key"] == ("", "none", 0, 0)
    assert rows["layers/1/mlp/experts/down_proj"][1] == "mxfp4"
    after = resolve(Quantization((*PAPER.rules, (".*/self_attn/.*", "none"))), params)
    assert after == plain

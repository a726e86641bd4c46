"""Live parity with transformers' DeepSeek-V4 in float32, and the folders that it writes.

    make test-interop

Logits to 1e-5 of the largest; every gradient that transformers has to 1e-4 of its own largest plus
1e-7 of the model's. The indexer's KL is off here: transformers gives its parameters no gradient.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import v4jax
from tests import reference
from tests import released_folder as folders
from tests.jax_model import build, by_reference_name, quick_jit, split
from tests.reference import CSA, HCA, SLIDING
from tests.reference_parameters import random_parameters
from v4jax.interop import state_dict

MODELS = 12
GAP = 1e-5  # a top-k decision nearer than this may flip in float32


def random_config(number: int) -> SimpleNamespace:
    """A small model of random shape; what must not be left to chance goes by `number`."""
    rng = np.random.default_rng(number)

    def pick(*values):
        return values[rng.integers(len(values))]

    layers = [(SLIDING, CSA), (CSA, HCA), (HCA, HCA, CSA), (SLIDING, HCA)][number % 4]
    heads, experts, head_dim = pick(2, 4), pick(4, 8, 12), pick(16, 32)
    yarn = SimpleNamespace(
        factor=16.0, beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=64
    )
    return SimpleNamespace(
        vocab_size=50,
        hidden_size=24,
        layer_types=layers,
        mlp_layer_types=(*(pick("hash_moe", "moe") for _ in layers[1:]), "moe"),
        compress_rates=SimpleNamespace(
            compressed_sparse_attention=pick(2, 4, 5), heavily_compressed_attention=pick(6, 8, 13)
        ),
        moe_intermediate_size=12,
        num_attention_heads=heads,
        head_dim=head_dim,
        qk_rope_head_dim=head_dim // pick(2, 4),
        q_lora_rank=20,
        o_groups=pick(1, 2, heads),
        o_lora_rank=6,
        sliding_window=pick(2, 5, 60),
        index_n_heads=16,  # with few heads, scores of exactly 0 tie
        index_head_dim=16,
        index_topk=(1, 3, 100)[number % 3],
        n_routed_experts=experts,
        num_experts_per_tok=int(rng.integers(1, 5)),
        scoring_func=("sqrtsoftplus", "sqrtsoftplus", "sigmoid")[number % 3],
        routed_scaling_factor=pick(1.0, 1.5, 2.5),
        swiglu_limit=0.7,
        shared_expert_swiglu_limit=True,
        hc_mult=(4, 2, 1)[number // 4],
        hc_sinkhorn_iters=(2, 20, 1)[number % 3],
        hc_eps=(1e-2, 1e-6)[number // 3 % 2],
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        compress_rope_theta=1.6e5,
        rope_scaling=yarn if (number + number // 4) % 2 else None,
        num_nextn_predict_layers=0,
    )


def length(cfg, number: int) -> int:
    """Tokens that end within, at or after a window of the first compressed layer."""
    rate = getattr(cfg.compress_rates, next(kind for kind in cfg.layer_types if kind != SLIDING))
    return (4 * rate - 1, 6 * rate, 5 * rate + 1, rate - 1)[number // 2 % 4]


def transformers_model(cfg, params):
    """transformers' model with the given parameters, float32, eager."""
    share = cfg.qk_rope_head_dim / cfg.head_dim
    assert int(share * cfg.head_dim) == cfg.qk_rope_head_dim
    tables = {
        "main": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "compress": {"rope_type": "default", "rope_theta": cfg.compress_rope_theta},
    }
    if cfg.rope_scaling is not None:
        tables["compress"] |= {"rope_type": "yarn", "attention_factor": 1.0}
        tables["compress"] |= vars(cfg.rope_scaling)
    for table in tables.values():
        table["partial_rotary_factor"] = share
    ours = ("rope_theta", "compress_rope_theta", "rope_scaling", "qk_rope_head_dim")
    ours += ("shared_expert_swiglu_limit", "num_nextn_predict_layers")
    fields = {name: value for name, value in vars(cfg).items() if name not in ours}
    fields |= {name: list(fields[name]) for name in ("layer_types", "mlp_layer_types")}
    fields["compress_rates"] = vars(cfg.compress_rates)
    config = transformers.DeepseekV4Config(
        **fields,
        num_hidden_layers=len(cfg.layer_types),
        rope_parameters=tables,
        partial_rotary_factor=share,
    )
    model = transformers.DeepseekV4ForCausalLM._from_config(config, attn_implementation="eager")
    model.eval().float()
    model.load_state_dict({name: torch.tensor(value) for name, value in params.items()})
    return model


@functools.cache
def case(number: int):
    """Config, parameters without a top-k decision near to flipping, and ids [B, T]."""
    cfg = random_config(number)
    ids = np.random.default_rng(number).integers(
        0, cfg.vocab_size, (1 + number % 2, length(cfg, number))
    )
    for seed in range(20):
        params = random_parameters(cfg, seed)
        if min(reference.forward(cfg, params, row).smallest_gap for row in ids) > GAP:
            return cfg, params, ids
    raise RuntimeError("no safe parameters in 20 seeds")


def test_the_models_cover_what_they_should():
    cases = [case(number) for number in range(MODELS)]
    configs = [cfg for cfg, _, _ in cases]
    assert {kind for cfg in configs for kind in cfg.layer_types} == {SLIDING, CSA, HCA}
    assert {kind for cfg in configs for kind in cfg.mlp_layer_types} == {"hash_moe", "moe"}
    assert {cfg.rope_scaling is None for cfg in configs} == {True, False}
    assert (2, 1e-2) in {(cfg.hc_sinkhorn_iters, cfg.hc_eps) for cfg in configs}
    assert {len(ids) for _, _, ids in cases} == {1, 2}
    below, above, ends = False, False, set()
    for cfg, _, ids in cases:
        for kind in set(cfg.layer_types) - {SLIDING}:
            rate = getattr(cfg.compress_rates, kind)
            entries, left = divmod(ids.shape[1], rate)
            ends |= {"at"} if left == 0 else {"after"} if left == 1 else {"within"}
            if kind == CSA:
                below |= cfg.index_topk < entries
                above |= cfg.index_topk > entries
    assert below and above and ends == {"at", "after", "within"}


def transformers_run(cfg, params, ids):
    """Logits [B, T, V], the mean next-token cross-entropy's gradient by name where there is one."""
    model = transformers_model(cfg, params)
    tokens = torch.tensor(ids)
    logits = model(input_ids=tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, cfg.vocab_size), tokens[:, 1:].reshape(-1)
    )
    loss.backward()
    gradients = {
        name: parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return logits.detach().numpy(), gradients


def our_run(cfg, params, ids):
    model = build(cfg, params)
    graphdef, weights, rest = split(model)
    ids = jnp.asarray(ids, jnp.int32)

    def loss(weights, rest):
        logits = nnx.merge(graphdef, weights, rest)(ids).logits
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], -1)
        return -jnp.mean(picked), logits

    run = quick_jit(jax.value_and_grad(loss, has_aux=True))
    (_, logits), gradients = run(weights, rest)
    return np.asarray(logits), by_reference_name(model, gradients)


def assert_close(logits, expected) -> None:
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("number", range(MODELS))
def test_random_model(number):
    cfg, params, ids = case(number)
    expected, expected_gradients = transformers_run(cfg, params, ids)
    logits, gradients = our_run(cfg, params, ids)
    assert_close(logits, expected)
    largest = max(np.abs(gradient).max() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        # One stream's head weight only scales what the final norm normalizes: nothing but rounding.
        rounding = 1e-6 if cfg.hc_mult == 1 and ".hc_head." in name else 1e-7
        atol = 1e-4 * np.abs(gradient).max() + rounding * largest
        np.testing.assert_allclose(gradients[name], gradient, rtol=0, atol=atol, err_msg=name)
    # No gradient there: indexers, and compressors of texts shorter than one window.
    without = gradients.keys() - expected_gradients.keys()
    assert all(".compressor." in name and not gradients[name].any() for name in without)
    indexer = {name for name in gradients if ".indexer." in name}
    assert indexer <= without and len(indexer) == 6 * cfg.layer_types.count(CSA)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("original", [True, False])
def test_load_hf_reads_what_save_pretrained_writes(tmp_path, original, shard_size, dtype):
    cfg, params, _ = case(2)
    model = transformers_model(cfg, params).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, save_original_format=original, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "1GB")
    loaded = state_dict(v4jax.load_hf(tmp_path))
    expected = model.state_dict()
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        value = value if value.dtype == torch.int64 else value.float()
        np.testing.assert_array_equal(loaded[name], value.numpy(), err_msg=name)


def logits_of(model, ids):
    graphdef, weights, rest = split(model)
    return quick_jit(lambda w, r: nnx.merge(graphdef, w, r)(ids))(weights, rest)


@pytest.mark.parametrize("number", [1, 2])
def test_a_loaded_model_computes_the_same(tmp_path, number):
    """From config.json as transformers writes it, without and with YaRN."""
    cfg, params, ids = case(number)
    model = transformers_model(cfg, params)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(ids), use_cache=False).logits.numpy()
    assert_close(logits_of(v4jax.load_hf(tmp_path), jnp.asarray(ids, jnp.int32)).logits, expected)


def test_a_released_folder_with_mtp(tmp_path):
    """transformers reads the same folder, but for the MTP module; the reference has that."""
    cfg = SimpleNamespace(**vars(case(2)[0]))
    cfg.layer_types, cfg.mlp_layer_types = (SLIDING, CSA, HCA), ("hash_moe", "moe", "moe")
    cfg.compress_rates = SimpleNamespace(
        compressed_sparse_attention=4, heavily_compressed_attention=128
    )
    cfg.num_nextn_predict_layers = 1
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, 133)
    params = random_parameters(cfg, 0)
    run = reference.forward(cfg, params, ids)
    assert run.smallest_gap > GAP
    config, flat = folders.legacy_config(cfg), folders.released(cfg, params)
    folders.write(tmp_path, config, flat, shards=3)

    out = logits_of(v4jax.load_hf(tmp_path), jnp.asarray(ids[None], jnp.int32))
    assert_close(out.logits[0], run.logits)
    assert_close(out.mtp_logits[0], run.mtp_logits[:-1])
    model = transformers.DeepseekV4ForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(ids[None]), use_cache=False).logits.numpy()
    assert_close(out.logits, expected)

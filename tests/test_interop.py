"""Weights by name: three dialects, files, strictness; configs of both kinds. Without torch."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import v4jax
from tests import numeric_case as case
from tests import released_folder as folders
from tests.jax_model import build, model_config
from v4jax.interop import config_from_hf, load_state_dict, state_dict
from v4jax.model import abstract_model

RATES = SimpleNamespace(compressed_sparse_attention=4, heavily_compressed_attention=128)
CONFIG = SimpleNamespace(**vars(case.config()) | {"compress_rates": RATES})


def parameters(mtp: bool = True) -> dict[str, np.ndarray]:
    params = case.random_parameters(CONFIG, 0)
    main = (f"model.layers.{i}." for i in range(4))
    keep = (*main, "model.embed", "model.norm", "model.hc_head", "lm_head")
    return {n: v for n, v in params.items() if mtp or n.startswith(keep)}


def assert_same(flat, expected) -> None:
    assert flat.keys() == expected.keys()
    for name, value in expected.items():
        assert flat[name].dtype == value.dtype, name
        np.testing.assert_array_equal(flat[name], value, err_msg=name)


def test_state_dict_has_transformers_names_and_the_releases_for_mtp():
    params = parameters()
    flat = state_dict(build(CONFIG, params))
    renamed = folders.released(CONFIG, params)
    mtp = {name: value for name, value in renamed.items() if name.startswith("mtp.0.")}
    assert_same(flat, parameters(mtp=False) | mtp)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dialect", ["released", "mixture", "native"])
def test_folders_of_every_dialect(tmp_path, dialect, shards):
    params = parameters(mtp=False)
    flat = folders.released(CONFIG, params)
    flat = {"released": flat, "mixture": folders.mixture(flat), "native": params}[dialect]
    folders.write(tmp_path, folders.legacy_config(CONFIG), flat, shards)
    model = v4jax.load_hf(tmp_path)
    assert model.config == model_config(CONFIG, num_nextn_predict_layers=0)
    assert_same(state_dict(model), params)
    leaves = nnx.to_flat_state(nnx.state(model))
    assert {str(leaf.dtype) for _, leaf in leaves} == {"float32", "int32"}


def test_a_released_folder_with_mtp(tmp_path):
    params = parameters()
    folders.write(tmp_path, folders.legacy_config(CONFIG), folders.released(CONFIG, params))
    model = v4jax.load_hf(tmp_path, dtype=jnp.bfloat16)
    assert model.dtype == jnp.bfloat16 and model.config.num_nextn_predict_layers == 1
    assert_same(state_dict(model), state_dict(build(CONFIG, params)))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files_are_read_exactly(tmp_path, dtype):
    params = parameters(mtp=False)
    half = {n: v if v.dtype == np.int64 else v.astype(dtype) for n, v in params.items()}
    folders.write(tmp_path, folders.legacy_config(CONFIG), half)
    expected = {n: v if v.dtype == np.int64 else v.astype(np.float32) for n, v in half.items()}
    assert_same(state_dict(v4jax.load_hf(tmp_path)), expected)


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn", "float8_e8m0fnu"])
def test_a_quantized_tensor_ends_in_one_line(tmp_path, kind):
    flat = folders.released(CONFIG, parameters())
    name = "layers.1.ffn.experts.3.w2.weight"
    flat[name] = np.zeros((32, 8), np.int8) if kind == "int8" else flat[name].astype(kind)
    folders.write(tmp_path, folders.legacy_config(CONFIG), flat)
    with pytest.raises(ValueError, match=rf"load_hf: {re.escape(name)} is .*quantized") as error:
        v4jax.load_hf(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.safetensors does not exist"):
        v4jax.load_hf(tmp_path)
    folders.write(tmp_path, folders.legacy_config(CONFIG), parameters(mtp=False), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.safetensors does not exist"):
        v4jax.load_hf(tmp_path)


NORM, TABLE = "model.norm.weight", "model.layers.0.mlp.gate.tid2eid"
GATE_UP = "layers.1.ffn.experts.{}.w{}.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.extra": 0}, "the model has no place for: model.extra"),
        ({"mtp.1.enorm.weight": 0}, "the model has no place for: mtp.1.enorm.weight"),
        ({"model.layers.9.attn_hc.fn": 0}, "the model has no place for: model.layers.9.attn_hc.fn"),
        (
            {"model.layers.1.mlp.gate.weight.scale": 0},
            "the model has no place for: model.layers.1.mlp.gate.weight.scale",
        ),
        ({NORM: None}, f"missing: {NORM}"),
        ({f"model.layers.{i}.attn_hc.fn": None for i in range(4)}, "missing: model.layers.0.attn"),
        ({"norm.weight": np.ones(32)}, "given in two dialects at once: norm.weight"),
        ({NORM: np.ones(31)}, f"{NORM} has shape (31,), allowed: (32,)"),
        ({TABLE: np.full((64, 3), 8)}, f"{TABLE} has expert ids 8 to 8, allowed: 0 to 7"),
        ({TABLE: np.full((64, 3), -1)}, f"{TABLE} has expert ids -1 to -1, allowed: 0 to 7"),
        (
            {GATE_UP.format(0, 1): np.ones((16, 32))},
            f"given in two dialects at once: {GATE_UP.format(0, 1)}",
        ),
    ],
)  # fmt: skip
def test_loading_is_strict(changes, message):
    params = {n: v for n, v in (parameters(mtp=False) | changes).items() if v is not None}
    model = abstract_model(model_config(CONFIG, num_nextn_predict_layers=0))
    with pytest.raises(ValueError, match=f"^load_state_dict: {re.escape(message)}") as error:
        load_state_dict(model, params)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not hasattr(model.norm.weight.get_value(), "addressable_shards")  # still a shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({GATE_UP.format(7, 3): None}, f"missing: {GATE_UP.format(7, 3)}"),
        ({GATE_UP.format(8, 1): np.ones((16, 32))}, f"no place for: {GATE_UP.format(8, 1)}"),
        ({GATE_UP.format(2, 1): np.ones((9, 32))}, "w1.weight has shape (9, 32), allowed: (16"),
    ],
)  # fmt: skip
def test_loading_experts_is_strict(changes, message):
    flat = folders.released(CONFIG, parameters()) | changes
    model = abstract_model(model_config(CONFIG))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_state_dict(model, {n: v for n, v in flat.items() if v is not None})


def modern_config(**changes) -> dict:
    """config.json as transformers 5.24 saves it, the fields that matter."""
    tables = {
        "main": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        "compress": {
            **{"rope_type": "yarn", "rope_theta": 1.6e5, "partial_rotary_factor": 0.5},
            **{"attention_factor": 1.0, **vars(CONFIG.rope_scaling)},
        },
    }
    legacy = folders.legacy_config(CONFIG)
    old = ("compress_ratios", "num_hash_layers", "rope_scaling")
    return {name: value for name, value in legacy.items() if name not in old} | {
        "layer_types": list(CONFIG.layer_types),
        "mlp_layer_types": list(CONFIG.mlp_layer_types),
        "compress_rates": vars(CONFIG.compress_rates),
        "rope_parameters": tables,
        "partial_rotary_factor": 0.5,
        **changes,
    }


def test_old_and_new_config_keys_are_the_same_config():
    expected = model_config(CONFIG)
    assert config_from_hf(folders.legacy_config(CONFIG)) == expected
    assert config_from_hf(modern_config()) == expected
    # What transformers reads off a file wins: its tables over the older keys beside them.
    assert config_from_hf(modern_config(rope_theta=5, qk_rope_head_dim=4)) == expected
    plain = SimpleNamespace(**vars(CONFIG) | {"rope_scaling": None})
    assert config_from_hf(folders.legacy_config(plain)) == model_config(plain)
    json.dumps(modern_config())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "deepseek_v41"}, "model_type: got 'deepseek_v41', allowed: 'deepseek_v4'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: got True, allowed: False"),
        ({"mlp_bias": True}, "mlp_bias: got True, allowed: False"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"num_hidden_layers": 9}, "layer_types: got ["),
        ({"layer_types": None}, "layer_types: got []"),
        ({"layer_types": None, "compress_ratios": [0, 64]}, "compress_ratios: got [0, 64]"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: got {'rope_type': 'yarn'}"),
    ],
)  # fmt: skip
def test_a_config_of_another_model_ends_in_one_line(fields, message):
    changed = {n: v for n, v in modern_config(**fields).items() if v is not None}
    with pytest.raises(ValueError, match=f"^config.json: {re.escape(message)}") as error:
        config_from_hf(changed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("table", "changes", "message"),
    [
        ("compress", {"attention_factor": 1.2}, "attention_factor: got 1.2, allowed: 1.0"),
        ("compress", {"attention_factor": None}, "attention_factor: got None, allowed: 1.0"),
        ("compress", {"rope_type": "linear"}, "compress: got 'linear', allowed: default | yarn"),
        ("main", {"rope_type": "yarn"}, "rope_parameters.main: got 'yarn', allowed: default"),
        ("main", {"partial_rotary_factor": 0.25}, "partial_rotary_factor: got [0.25, 0.5]"),
    ],
)
def test_a_rotary_table_that_v4_lacks_ends_in_one_line(table, changes, message):
    config = modern_config()
    config["rope_parameters"][table] |= changes
    with pytest.raises(ValueError, match=re.escape(message)):
        config_from_hf(config)

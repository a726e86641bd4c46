"""Weights and configs of transformers and of the release, and ours: one table of names, both ways.

    model = load_hf(folder)              # a folder written by transformers' save_pretrained
    flat = state_dict(model)             # numpy arrays by name
    load_state_dict(other, flat)         # strict

Three dialects name the same tensors: the release's (`layers.0.attn.wq_a.weight`), transformers'
own (`model.layers.0.self_attn.q_a_proj.weight`), and the mixture of both that `save_pretrained`
writes by default. Reading accepts any of them, name by name. `state_dict` writes transformers'
names, and the release's for the MTP module (`mtp.0.…`), which transformers lacks.

Every matrix is [out, in] in all dialects, as here, so nothing is transposed. The release stores
each expert's gate (w1), down (w2) and up (w3) apart; transformers and we stack them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import safe_open

from v4jax.config import CSA, HCA, SLIDING, CompressRates, ModelConfig, RopeScaling
from v4jax.layers.experts import PackedWeight
from v4jax.layers.router import HashTable
from v4jax.model import Transformer

# ---- names -------------------------------------------------------------------------------------

# Our path -> the release's name. transformers' name is our path but for INDEXER_HEADS and "model.".
STREAM_HEAD = {f"hc_head.hc_{part}": f"hc_head_{part}" for part in ("fn", "base", "scale")}
MODEL = STREAM_HEAD | {
    "embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "norm.weight": "norm.weight",
}
BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "attn_hc.fn": "hc_attn_fn",
    "attn_hc.base": "hc_attn_base",
    "attn_hc.scale": "hc_attn_scale",
    "ffn_hc.fn": "hc_ffn_fn",
    "ffn_hc.base": "hc_ffn_base",
    "ffn_hc.scale": "hc_ffn_scale",
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_proj.weight": "attn.wkv.weight",
    "self_attn.kv_norm.weight": "attn.kv_norm.weight",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.o_a_proj.weight": "attn.wo_a.weight",
    "self_attn.o_b_proj.weight": "attn.wo_b.weight",
    "self_attn.compressor.kv_proj.weight": "attn.compressor.wkv.weight",
    "self_attn.compressor.gate_proj.weight": "attn.compressor.wgate.weight",
    "self_attn.compressor.position_bias": "attn.compressor.ape",
    "self_attn.compressor.kv_norm.weight": "attn.compressor.norm.weight",
    "self_attn.compressor.indexer.kv_proj.weight": "attn.indexer.compressor.wkv.weight",
    "self_attn.compressor.indexer.gate_proj.weight": "attn.indexer.compressor.wgate.weight",
    "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
    "self_attn.compressor.indexer.kv_norm.weight": "attn.indexer.compressor.norm.weight",
    "self_attn.compressor.indexer.q_b_proj.weight": "attn.indexer.wq_b.weight",
    "self_attn.compressor.indexer.weights_proj.weight": "attn.indexer.weights_proj.weight",
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
}
# Our stacked tensor -> the release's matrices of one expert, `ffn.experts.{e}.{w}.weight`, whose
# rows follow each other in it.
EXPERTS = {
    "mlp.experts.gate_up_proj": ("w1", "w3"),
    "mlp.experts.down_proj": ("w2",),
}
MTP = STREAM_HEAD | {
    f"{name}.weight": f"{name}.weight" for name in ("enorm", "hnorm", "norm", "e_proj", "h_proj")
}
INDEXER_HEADS = ("indexer.weights_proj", "indexer.scorer.weights_proj")  # ours, transformers'
# save_pretrained's default undoes one of its renames wrongly.
SAVED_BY_TRANSFORMERS = {"attn.norm.weight": "self_attn.kv_norm.weight"}


def _spellings(table: Mapping[str, str], extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Every name of a table's tensors, in any dialect -> our path."""
    ours = {path.replace(*INDEXER_HEADS): path for path in table} | {path: path for path in table}
    return ours | {name: path for path, name in table.items()} | dict(extra or {})


_MODEL_NAMES, _MTP_NAMES = _spellings(MODEL), _spellings(MTP)
_BLOCK_NAMES = _spellings(BLOCK, SAVED_BY_TRANSFORMERS) | {path: path for path in EXPERTS}
_PLACES = {w: (path, half) for path, words in EXPERTS.items() for half, w in enumerate(words)}


class Place(NamedTuple):
    """Where a named tensor lies: our path and, of one expert's matrix, its index and half.

    The halves of gate_up_proj [E, 2F, D] are gate (0) and up (1); down_proj has half 0 alone.
    """

    path: str
    expert: int | None = None
    half: int = 0


def place_of(name: str) -> Place | None:
    """Where the tensor `name`, of any dialect, belongs; None if none has such a name."""
    name = name.removeprefix("model.")
    layer = re.fullmatch(r"(layers\.\d+\.)(.+)", name)
    if layer:
        return _place_in_block(layer[1], layer[2])
    if name.startswith("mtp.0."):
        name = name.removeprefix("mtp.0.")
        if name in _MTP_NAMES:
            return Place(f"mtp.{_MTP_NAMES[name]}")
        return _place_in_block("mtp.block.", name)
    return Place(_MODEL_NAMES[name]) if name in _MODEL_NAMES else None


def _place_in_block(prefix: str, name: str) -> Place | None:
    if name in _BLOCK_NAMES:
        return Place(prefix + _BLOCK_NAMES[name])
    expert = re.fullmatch(r"ffn\.experts\.(\d+)\.(w[123])\.weight", name)
    if expert is None:
        return None
    path, half = _PLACES[expert[2]]
    return Place(prefix + path, int(expert[1]), half)


def _written(path: str) -> str:
    """The name that `state_dict` gives a path, but for MTP's experts, which it writes apart."""
    if path.startswith("mtp.block."):
        path = path.removeprefix("mtp.block.")
        return f"mtp.0.{BLOCK.get(path, path)}"
    if path.startswith("mtp."):
        return f"mtp.0.{MTP[path.removeprefix('mtp.')]}"
    return path if path == "lm_head.weight" else f"model.{path.replace(*INDEXER_HEADS)}"


# ---- weights -----------------------------------------------------------------------------------


def _leaves(model: Transformer) -> dict[str, tuple[tuple, nnx.Variable, int | None]]:
    """Path of one layer's tensor -> key and variable in the model, index on a stacked axis."""
    prefix, unit, _ = model.config.schedule
    leaves: dict[str, tuple[tuple, nnx.Variable, int | None]] = {}
    for key, variable in nnx.to_flat_state(nnx.state(model)):
        if isinstance(variable, PackedWeight):
            raise ValueError("the model's experts are packed: take the model before pack_experts")
        if key[0] != "units":
            leaves[".".join(map(str, key))] = (key, variable, None)
            continue
        rest = ".".join(map(str, key[2:]))
        for repeat in range(variable.shape[0]):
            layer = prefix + repeat * unit + int(str(key[1]))
            leaves[f"layers.{layer}.{rest}"] = (key, variable, repeat)
    return leaves


def state_dict(model: Transformer) -> dict[str, np.ndarray]:
    """All weights by name: float32, and int64 for tid2eid, as others store it.

    Names are transformers' (`model.layers.1.attn_hc.fn`), layer by layer also where the model
    stacks them, selection biases and hash tables included; the MTP module's are the release's.
    """
    flat: dict[str, np.ndarray] = {}
    arrays: dict[tuple, np.ndarray] = {}
    for path, (key, variable, index) in _leaves(model).items():
        if key not in arrays:
            arrays[key] = np.asarray(variable[...])
        value = arrays[key] if index is None else arrays[key][index]
        words = EXPERTS.get(path.removeprefix("mtp.block."))
        if words is None:
            integer = isinstance(variable, HashTable)
            flat[_written(path)] = value.astype(np.int64) if integer else value
            continue
        for expert, matrix in enumerate(value):
            for word, part in zip(words, np.split(matrix, len(words)), strict=True):
                flat[f"mtp.0.ffn.experts.{expert}.{word}.weight"] = part
    return flat


def load_state_dict(model: Transformer, flat: Mapping[str, np.ndarray]) -> None:
    """Sets every weight of the model, whose leaves may still be shapes, from names of any dialect.

    Parameters become float32, tid2eid int32. Raises ValueError, one line that lists the names, for
    a tensor that the model has no place for, a weight that is missing or given twice, a shape that
    does not fit, or expert ids outside 0 to E - 1. The model is unchanged then.
    """
    leaves = _leaves(model)
    sources: dict[str, dict[tuple[int | None, int], str]] = {path: {} for path in leaves}
    unknown, twice = [], []
    for name in flat:
        place = place_of(name)
        if place is None or place.path not in leaves:
            unknown.append(name)
        elif place[1:] in sources[place.path]:
            twice.append(name)
        else:
            sources[place.path][place[1:]] = name
    _refuse("the model has no place for", unknown)
    _refuse("given in two dialects at once", twice)
    _refuse("missing", [_written(path) for path, names in sources.items() if not names])

    parts: dict[tuple, list[np.ndarray]] = {}
    for path, (key, variable, index) in leaves.items():
        shape = variable.shape if index is None else variable.shape[1:]
        value = _assembled(path, sources[path], flat, shape)
        if isinstance(variable, HashTable):
            low, high, top = value.min(), value.max(), model.config.n_routed_experts - 1
            if low < 0 or high > top:
                _fail(f"{_written(path)} has expert ids {low} to {high}, allowed: 0 to {top}")
        parts.setdefault(key, []).append(value)
    state = {}
    for key, variable, index in {leaf[0]: leaf for leaf in leaves.values()}.values():
        value = parts[key][0] if index is None else np.stack(parts[key])
        state[key] = variable.replace(jnp.array(value, variable.dtype))
    nnx.update(model, nnx.from_flat_state(state))


def _assembled(path: str, names: Mapping, flat: Mapping, shape: tuple[int, ...]) -> np.ndarray:
    """One layer's tensor of `shape`: as given, or stacked from its experts' matrices.

    names: (expert, half) of `Place` -> name in flat; (None, 0) is the whole tensor.
    """
    if (None, 0) in names:
        _refuse("given in two dialects at once", [n for p, n in names.items() if p != (None, 0)])
        return _shaped(names[None, 0], flat, shape)
    words = EXPERTS[re.sub(r"^(layers\.\d+|mtp\.block)\.", "", path)]
    stem = next(iter(names.values())).partition("ffn.")[0]
    wanted = {
        (expert, half): f"{stem}ffn.experts.{expert}.{word}.weight"
        for expert in range(shape[0])
        for half, word in enumerate(words)
    }
    _refuse("missing", [name for place, name in wanted.items() if place not in names])
    _refuse("the model has no place for", [n for place, n in names.items() if place not in wanted])
    value, rows = np.empty(shape, np.float32), shape[1] // len(words)
    for (expert, half), name in names.items():
        value[expert, half * rows : (half + 1) * rows] = _shaped(name, flat, (rows, shape[2]))
    return value


def _shaped(name: str, flat: Mapping, shape: tuple[int, ...]) -> np.ndarray:
    value = np.asarray(flat[name])
    if value.shape != tuple(shape):
        _fail(f"{name} has shape {value.shape}, allowed: {tuple(shape)}")
    return value


def _refuse(complaint: str, names: list[str], shown: int = 5) -> None:
    if names:
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        _fail(f"{complaint}: {', '.join(names[:shown])}{more}")


def _fail(message: str) -> NoReturn:
    raise ValueError(f"load_state_dict: {message}")


# ---- folders -----------------------------------------------------------------------------------

UNQUANTIZED = ("F32", "BF16", "F16", "I64", "I32")  # safetensors' names


def load_hf(folder: str | Path, dtype: DTypeLike = jnp.float32) -> Transformer:
    """The model of a folder written by transformers' `save_pretrained`, or laid out as released.

    Reads config.json and model.safetensors, or the shards of model.safetensors.index.json, in any
    of the three dialects, F32, BF16 or F16. The model has an MTP module if the folder has its
    tensors (transformers drops them). dtype: what it computes in; its parameters are float32.

    Raises ValueError, one line, for a quantized tensor, a config that is not this architecture, or
    tensors that do not fit it (`load_state_dict`); FileNotFoundError for a missing file.
    """
    folder = Path(folder)
    flat = _read_tensors(folder)
    fields = json.loads((folder / "config.json").read_text("utf-8"))
    depth = int(any(name.removeprefix("model.").startswith("mtp.") for name in flat))
    cfg = config_from_hf(fields | {"num_nextn_predict_layers": depth})
    # Built from shapes alone: the hash tables' values, of any seed, are replaced too.
    model = nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0), dtype=dtype))
    load_state_dict(model, flat)
    return model


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    index = folder / "model.safetensors.index.json"
    files: Iterable[str] = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    flat: dict[str, np.ndarray] = {}
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"load_hf: {folder / file} does not exist")
        with safe_open(folder / file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                stored = tensors.get_slice(name).get_dtype()
                if stored not in UNQUANTIZED:
                    raise ValueError(
                        f"load_hf: {name} is {stored}: quantized checkpoints cannot be read yet, "
                        f"allowed: {', '.join(UNQUANTIZED)}"
                    )
                flat[name] = tensors.get_tensor(name)
    return flat


# ---- config ------------------------------------------------------------------------------------

COMPRESS_RATIOS = {0: SLIDING, 4: CSA, 128: HCA}  # the release's spelling of layer_types
# Fields of which the architecture has one value; a config may leave them out.
FIXED: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "mlp_bias": False,
}
SAME_NAME = (
    *("vocab_size", "hidden_size", "moe_intermediate_size", "num_attention_heads", "head_dim"),
    *("q_lora_rank", "o_groups", "o_lora_rank", "sliding_window", "index_n_heads"),
    *("index_head_dim", "index_topk", "n_routed_experts", "num_experts_per_tok", "scoring_func"),
    *("routed_scaling_factor", "swiglu_limit", "hc_mult", "hc_sinkhorn_iters", "hc_eps"),
    *("rms_norm_eps", "num_nextn_predict_layers", "initializer_range"),
)


def config_from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a config.json: transformers' own keys, or the older ones that the release has.

    Fields that do not change the function are ignored. Raises ValueError, one line, naming a field
    that is missing or has a value that this architecture does not have.
    """
    for name, value in FIXED.items():
        _require(fields.get(name, value) == value, name, fields.get(name), repr(value))
    try:
        layers = fields["num_hidden_layers"]
        values: dict[str, Any] = {name: fields[name] for name in SAME_NAME}
    except KeyError as missing:
        raise ValueError(f"config.json: {missing} is missing") from None
    if fields.get("compress_rates"):
        values["compress_rates"] = CompressRates(**fields["compress_rates"])
    return ModelConfig(**values, **_schedules(fields, layers), **_rope(fields))


def _schedules(fields: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """layer_types and mlp_layer_types; the release's list goes on with one entry a MTP module."""
    kinds, mlp = fields.get("layer_types"), fields.get("mlp_layer_types")
    if kinds is None:
        ratios: list = fields.get("compress_ratios", [])
        _require(set(ratios) <= set(COMPRESS_RATIOS), "compress_ratios", ratios, "0, 4, 128")
        kinds = [COMPRESS_RATIOS[ratio] for ratio in ratios]
    if mlp is None:
        hashed = min(fields.get("num_hash_layers", 3), layers)
        mlp = ["hash_moe"] * hashed + ["moe"] * (layers - hashed)
    for name, value in (("layer_types", kinds), ("mlp_layer_types", mlp)):
        _require(len(value) >= layers, name, value, f"{layers} entries, as num_hidden_layers")
    return {"layer_types": tuple(kinds[:layers]), "mlp_layer_types": tuple(mlp[:layers])}


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Thetas, YaRN and rotated dims, from rope_parameters {main, compress} or the older keys."""
    head_dim, share = fields["head_dim"], fields.get("partial_rotary_factor")
    tables = fields.get("rope_parameters")
    if not tables:
        scaled = {"attention_factor": 1.0} | (fields.get("rope_scaling") or {})
        tables = {
            "main": {"rope_theta": fields.get("rope_theta", 1e4)},
            "compress": scaled | {"rope_theta": fields.get("compress_rope_theta", 1.6e5)},
        }
    _require({"main", "compress"} <= set(tables), "rope_parameters", tables, "main and compress")
    main, compress = tables["main"], tables["compress"]
    shares = [table.get("partial_rotary_factor", share) for table in (main, compress)]
    _require(shares[0] == shares[1], "partial_rotary_factor", shares, "one for both tables")
    dims = fields.get("qk_rope_head_dim", 64)
    plain, scaling = main.get("rope_type", "default"), None
    kind = compress.get("rope_type", compress.get("type", "default"))
    _require(plain == "default", "rope_parameters.main", plain, "default")
    _require(kind in ("default", "yarn"), "rope_parameters.compress", kind, "default | yarn")
    if kind == "yarn":
        scale = compress.get("attention_factor")
        _require(scale == 1, "rope_parameters.compress.attention_factor", scale, "1.0")
        names = ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings")
        scaling = RopeScaling(**{name: compress[name] for name in names if name in compress})
    return {
        "qk_rope_head_dim": dims if shares[0] is None else int(head_dim * shares[0]),
        "rope_theta": main["rope_theta"],
        "compress_rope_theta": compress["rope_theta"],
        "rope_scaling": scaling,
    }


def _require(condition: bool, field: str, value, allowed: str) -> None:
    if not condition:
        raise ValueError(f"config.json: {field}: got {value!r}, allowed: {allowed}")

"""Writes checkpoint folders of each naming, from the rules of the release and of transformers.

Written from transformers' conversion rules, apart from v4jax.interop's table.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.reference import CSA, HCA, SLIDING

RULES = (
    (r"^model\.embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"^model\.", ""),
    (r"hc_head\.hc_", "hc_head_"),
    (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.self_attn\.", ".attn."),
    (r"\.compressor\.indexer\.(q_b_proj|scorer)", r".indexer.\1"),
    (r"\.compressor\.indexer\.", ".indexer.compressor."),
    (r"\.scorer\.", "."),
    (r"\.indexer\.q_b_proj\.", ".indexer.wq_b."),
    (r"\.(q|o)_(a|b)_proj\.", r".w\1_\2."),
    (r"\.q_a_norm\.", ".q_norm."),
    (r"\.sinks$", ".attn_sink"),
    (r"\.compressor\.kv_norm\.", ".compressor.norm."),
    (r"\.position_bias$", ".ape"),
    (r"\.mlp\.", ".ffn."),
    (r"\.e_score_correction_bias$", ".bias"),
    (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
    (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
    (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
    (r"\.kv_proj\.", ".wkv."),
    (r"\.gate_proj\.", ".wgate."),
)


def released(cfg, params) -> dict[str, np.ndarray]:
    """Parameters by tests/reference.py's names -> by the release's, experts apart, MTP as mtp.0."""
    flat = {}
    for name, value in params.items():
        name = re.sub(rf"^model\.layers\.{len(cfg.layer_types)}\.", "mtp.0.", name)
        for pattern, new in RULES:
            name = re.sub(pattern, new, name)
        experts, _, tensor = name.rpartition(".")
        if not experts.endswith("ffn.experts"):
            flat[name] = value
            continue
        words = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}[tensor]
        for expert, matrix in enumerate(value):
            for word, part in zip(words, np.split(matrix, len(words)), strict=True):
                flat[f"{experts}.{expert}.{word}.weight"] = part
    return flat


def mixture(flat) -> dict[str, np.ndarray]:
    """The release's names -> those that transformers' `save_pretrained` writes by default."""
    rules = (
        (r"^embed\.", "embed_tokens."),
        (r"^hc_head_", "hc_head.hc_"),
        (r"\.attn\.kv_norm\.", ".attn.norm."),
        (r"^(?!head\.)", "model."),
    )
    for pattern, new in rules:
        flat = {re.sub(pattern, new, name): value for name, value in flat.items()}
    return flat


def legacy_config(cfg) -> dict:
    """config.json with the release's keys."""
    ratios = {SLIDING: 0, CSA: 4, HCA: 128}
    different = ("layer_types", "mlp_layer_types", "compress_rates", "shared_expert_swiglu_limit")
    fields = {name: value for name, value in vars(cfg).items() if name not in different}
    scaling = cfg.rope_scaling
    return fields | {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "num_hidden_layers": len(cfg.layer_types),
        "compress_ratios": [ratios[kind] for kind in cfg.layer_types] + [0],
        "num_hash_layers": cfg.mlp_layer_types.count("hash_moe"),
        "rope_scaling": None if scaling is None else {"type": "yarn", **vars(scaling)},
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
    }


def write(folder: Path, config: dict, flat: dict[str, np.ndarray], shards: int = 1) -> None:
    """Writes config.json and the tensors, in several files with an index if shards > 1."""
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    flat = {name: np.ascontiguousarray(value) for name, value in flat.items()}
    if shards == 1:
        save_file(flat, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: flat[name] for name in sorted(flat)[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(v.nbytes for v in flat.values())}}
    index["weight_map"] = weight_map
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")

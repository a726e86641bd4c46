"""Names, shapes and random values of a DeepSeek-V4 model's parameters, without any framework."""

from __future__ import annotations

import zlib

import numpy as np

from tests.reference import CSA, SLIDING

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(cfg) -> Shapes:
    """transformers' state_dict names (MTP's as in tests/reference.py) -> shapes, buffers included.

    Buffers are `gate.e_score_correction_bias` (top-k layers) and `gate.tid2eid` (hash layers).
    """
    vocab, d, m = cfg.vocab_size, cfg.hidden_size, cfg.hc_mult
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, d)}
    blocks = list(zip(cfg.layer_types, cfg.mlp_layer_types, strict=True))
    blocks += [(SLIDING, "moe")] * cfg.num_nextn_predict_layers
    for layer, (attention_kind, mlp_kind) in enumerate(blocks):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: s for name, s in _block(cfg, attention_kind, mlp_kind).items()}
    shapes |= {
        "model.norm.weight": (d,),
        "model.hc_head.hc_fn": (m, m * d),
        "model.hc_head.hc_base": (m,),
        "model.hc_head.hc_scale": (1,),
        "lm_head.weight": (vocab, d),
    }
    for depth in range(cfg.num_nextn_predict_layers):
        prefix = f"mtp.{depth}."
        shapes |= {f"{prefix}{name}.weight": (d,) for name in ("enorm", "hnorm", "norm")}
        shapes |= {f"{prefix}{name}.weight": (d, d) for name in ("e_proj", "h_proj")}
        shapes |= {prefix + "hc_head_fn": (m, m * d), prefix + "hc_head_base": (m,)}
        shapes |= {prefix + "hc_head_scale": (1,)}
    return shapes


def _block(cfg, attention_kind, mlp_kind) -> Shapes:
    d, m, heads, c = cfg.hidden_size, cfg.hc_mult, cfg.num_attention_heads, cfg.head_dim
    shapes: Shapes = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
    for hc in ("attn_hc", "ffn_hc"):
        outputs = (2 + m) * m
        shapes |= {f"{hc}.fn": (outputs, m * d), f"{hc}.base": (outputs,), f"{hc}.scale": (3,)}
    attention: Shapes = {
        "q_a_proj.weight": (cfg.q_lora_rank, d),
        "q_a_norm.weight": (cfg.q_lora_rank,),
        "q_b_proj.weight": (heads * c, cfg.q_lora_rank),
        "kv_proj.weight": (c, d),
        "kv_norm.weight": (c,),
        "sinks": (heads,),
        "o_a_proj.weight": (cfg.o_groups * cfg.o_lora_rank, heads * c // cfg.o_groups),
        "o_b_proj.weight": (d, cfg.o_groups * cfg.o_lora_rank),
    }
    if attention_kind != SLIDING:
        rate, double = getattr(cfg.compress_rates, attention_kind), attention_kind == CSA
        attention |= _compressor("compressor.", d, rate, c, double)
    if attention_kind == CSA:
        index = "compressor.indexer."
        attention |= _compressor(index, d, rate, cfg.index_head_dim, True)
        queries = cfg.index_n_heads * cfg.index_head_dim
        attention[index + "q_b_proj.weight"] = (queries, cfg.q_lora_rank)
        attention[index + "scorer.weights_proj.weight"] = (cfg.index_n_heads, d)
    shapes |= {f"self_attn.{name}": shape for name, shape in attention.items()}
    experts, hidden, k = cfg.n_routed_experts, cfg.moe_intermediate_size, cfg.num_experts_per_tok
    shapes["mlp.gate.weight"] = (experts, d)
    if mlp_kind == "hash_moe":
        shapes["mlp.gate.tid2eid"] = (cfg.vocab_size, k)
    else:
        shapes["mlp.gate.e_score_correction_bias"] = (experts,)
    return shapes | {
        "mlp.experts.gate_up_proj": (experts, 2 * hidden, d),
        "mlp.experts.down_proj": (experts, d, hidden),
        "mlp.shared_experts.gate_proj.weight": (hidden, d),
        "mlp.shared_experts.up_proj.weight": (hidden, d),
        "mlp.shared_experts.down_proj.weight": (d, hidden),
    }


def _compressor(prefix, d, rate, width, double) -> Shapes:
    channels = 2 * width if double else width
    return {
        prefix + "kv_proj.weight": (channels, d),
        prefix + "gate_proj.weight": (channels, d),
        prefix + "position_bias": (rate, channels),
        prefix + "kv_norm.weight": (width,),
    }


def random_parameters(cfg, seed: int) -> dict[str, np.ndarray]:
    """Float32 values (tid2eid int64) away from every trivial value; a pure function of name, seed.

    Norms and scales are near 1, sinks, position biases, bases and selection biases near 0 but not
    on it, matrices have the variance of 1 / fan-in, and tid2eid rows hold distinct random experts.
    """
    return {name: _value(cfg, name, shape, seed) for name, shape in parameter_shapes(cfg).items()}


def _value(cfg, name, shape, seed) -> np.ndarray:
    random = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    if name.endswith("tid2eid"):
        order = random.random_sample((shape[0], cfg.n_routed_experts)).argsort(axis=1)
        return order[:, : shape[1]].astype(np.int64)
    z = random.standard_normal(shape)
    if name.endswith(("norm.weight", "scale")):
        z = 1 + 0.2 * z
    elif name.endswith(("sinks", "position_bias", "base")):
        z = 0.5 * z
    elif name.endswith("e_score_correction_bias"):
        z = 0.2 * z
    else:
        z = z * shape[-1] ** -0.5
    return z.astype(np.float32)

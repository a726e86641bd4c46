"""A small model with seeded weights and the values it must produce, as data.

The values come from a numpy float64 forward pass that agrees with transformers' DeepSeek-V4 in
float32 to 6.5e-7 relative; the gradients are transformers' own in float32. The digits below are
all that was printed, so a test holds to half a unit of the last one.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from tests.reference_parameters import random_parameters

LENGTH = 40


def config() -> SimpleNamespace:
    """Four layers (sliding, CSA, HCA, CSA; the first one hash-routed) and an MTP module."""
    return SimpleNamespace(
        vocab_size=64,
        hidden_size=32,
        layer_types=(
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ),
        mlp_layer_types=("hash_moe", "moe", "moe", "moe"),
        compress_rates=SimpleNamespace(
            compressed_sparse_attention=4, heavily_compressed_attention=8
        ),
        moe_intermediate_size=16,
        num_attention_heads=4,
        head_dim=16,
        qk_rope_head_dim=8,
        q_lora_rank=24,
        o_groups=2,
        o_lora_rank=8,
        sliding_window=6,
        index_n_heads=16,
        index_head_dim=16,
        index_topk=3,
        n_routed_experts=8,
        num_experts_per_tok=3,
        scoring_func="sqrtsoftplus",
        routed_scaling_factor=1.5,
        swiglu_limit=0.5,
        shared_expert_swiglu_limit=True,
        hc_mult=4,
        hc_sinkhorn_iters=20,
        hc_eps=1e-6,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        compress_rope_theta=1.6e5,
        rope_scaling=SimpleNamespace(
            factor=16.0, beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=64
        ),
        num_nextn_predict_layers=1,
    )


def seeded_parameters() -> dict[str, np.ndarray]:
    """State_dict name -> float32 array (tid2eid: int64), the same on every machine."""
    cfg = config()
    params = random_parameters(cfg, seed=4)
    for name, table in params.items():
        if name.endswith("tid2eid"):
            token, slot = np.indices(table.shape)
            params[name] = (7 * token + 3 * slot) % cfg.n_routed_experts
    return params


def token_ids() -> np.ndarray:
    """[40] int32."""
    i = np.arange(LENGTH, dtype=np.int32)
    return (5 * i * i + 3 * i + 1) % 64


# Spot checks of seeded_parameters: name -> row 0, columns 0 to 2.
PARAMETER_STARTS = {
    "model.embed_tokens.weight": (-0.121560, 0.188893, 0.042878),
    "model.layers.1.self_attn.compressor.indexer.kv_proj.weight": (-0.020363, -0.218765, -0.161155),
}

# After layer i: mean |X| (6 decimals), X[39, stream 0, 0:3] (5 decimals).
STREAMS = (
    (0.425106, (0.97824, -1.07227, 0.16890)),
    (0.611823, (1.72692, -0.54486, 0.24908)),
    (0.786982, (0.88529, -0.76947, 0.63227)),
    (0.859086, (0.86916, 0.56184, 0.80037)),
)

# t: logits[t, 0:4] (5 decimals), argmax, mean |logits[t]| (6 decimals).
LOGITS = {
    0: ((1.55007, -1.44862, 0.14551, 0.23465), 41, 0.820248),
    3: ((0.80459, 0.14100, 0.77061, 0.39345), 50, 0.743640),
    7: ((-0.19025, 0.48922, -0.38191, 1.58733), 13, 0.878120),
    20: ((0.56166, -0.74339, 0.22135, -0.31139), 46, 0.748625),
    39: ((0.29365, -0.73734, -0.19500, 1.51831), 61, 0.776788),
}
MAX_ABS_LOGIT = 3.446040
LOSS = 4.643837  # mean over the 39 targets

# MTP logits, the same columns as LOGITS; row t predicts token t + 2.
MTP_LOGITS = {
    0: ((-0.77977, -1.03955, -0.32566, 0.43698), 18, 0.829186),
    20: ((-1.33725, -0.55226, 0.04611, 1.11325), 49, 0.910666),
    37: ((-1.70163, -0.79593, -0.91002, -0.51032), 7, 0.898878),
}
MTP_LOSS = 4.886574  # mean over t = 0 to 37

# Smallest distances of a top-k decision to flipping (2 digits).
ROUTER_GAP = 2.6e-3
INDEX_GAP = 1.6e-2

# Gradients of LOSS: L2 norms (6 digits). GLOBAL runs over every parameter that has a gradient,
# i.e. the main model without its indexers, whose gradient is exactly zero.
GLOBAL_GRADIENT_NORM = 5.54011
GRADIENT_NORMS = {
    "model.embed_tokens.weight": 2.79065,
    "lm_head.weight": 0.954254,
    "model.hc_head.hc_fn": 0.0192279,
    "model.layers.0.self_attn.sinks": 0.00881111,
    "model.layers.1.attn_hc.fn": 0.290723,
    "model.layers.1.attn_hc.base": 0.0126486,
    "model.layers.1.attn_hc.scale": 0.0180626,
    "model.layers.1.self_attn.q_a_proj.weight": 0.606186,
    "model.layers.1.self_attn.compressor.kv_proj.weight": 0.695615,
    "model.layers.1.self_attn.compressor.gate_proj.weight": 0.387526,
    "model.layers.1.self_attn.compressor.position_bias": 0.0724901,
    "model.layers.2.self_attn.compressor.position_bias": 0.0209960,
    "model.layers.2.self_attn.o_a_proj.weight": 0.578744,
    "model.layers.0.mlp.gate.weight": 0.106049,
    "model.layers.3.mlp.gate.weight": 0.0227070,
    "model.layers.3.mlp.experts.gate_up_proj": 0.196931,
    "model.layers.3.mlp.shared_experts.down_proj.weight": 0.0741692,
}
SCALE_GRADIENT = (-0.0042717, -0.0175300, 0.0008419)  # of model.layers.1.attn_hc.scale

"""Model configurations by name: functions that return a `ModelConfig`.

`nano` is the demo's, `pico` half as wide, `small` fits one GPU; `flash` and `pro` are the released
shapes.
"""

import dataclasses
from collections.abc import Callable

from v4jax.config import CSA, HCA, SLIDING, CompressRates, ModelConfig, RopeScaling


def _mlp(layers: int, hashed: int) -> tuple[str, ...]:
    return ("hash_moe",) * hashed + ("moe",) * (layers - hashed)


def nano(vocab_size: int = 2048) -> ModelConfig:
    """About 2M parameters: minutes on a laptop. Every kind of layer once, MTP, both routers."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        layer_types=(SLIDING, CSA, HCA, CSA),
        mlp_layer_types=_mlp(4, 1),
        moe_intermediate_size=64,
        num_attention_heads=4,
        head_dim=32,
        q_lora_rank=64,
        qk_rope_head_dim=16,
        o_groups=2,
        o_lora_rank=32,
        sliding_window=32,
        index_n_heads=8,
        index_head_dim=32,
        index_topk=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        compress_rates=CompressRates(4, 32),
    )


def tiny(vocab_size: int = 512) -> ModelConfig:
    """About 0.2M parameters: one CSA layer, no MTP: for smoke tests that compile quickly."""
    return dataclasses.replace(
        pico(vocab_size),
        layer_types=(CSA,),
        mlp_layer_types=("moe",),
        num_nextn_predict_layers=0,
        compress_rates=CompressRates(4, 16),
        sliding_window=16,
        index_topk=8,
        n_routed_experts=4,
    )


def pico(vocab_size: int = 1024) -> ModelConfig:
    """About 0.5M parameters: `nano` at half the width, for many tokens a parameter in minutes."""
    return dataclasses.replace(
        nano(vocab_size),
        hidden_size=64,
        moe_intermediate_size=32,
        head_dim=16,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        o_lora_rank=16,
        index_n_heads=4,
    )


def shallow(cfg: ModelConfig) -> ModelConfig:
    """`cfg` cut to one CSA and one HCA layer and windows of a few tokens: for smoke tests.

    What has one layer stays as it is.
    """
    if len(cfg.layer_types) == 1:
        return cfg
    return dataclasses.replace(
        cfg,
        layer_types=(CSA, HCA),
        mlp_layer_types=("hash_moe", "moe"),
        compress_rates=CompressRates(4, 16),
        sliding_window=16,
        index_topk=8,
        scan_layers=False,
    )


def micro(vocab_size: int = 4096) -> ModelConfig:
    """About 18M parameters."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        layer_types=(SLIDING, SLIDING) + (CSA, HCA) * 2 + (CSA,),
        mlp_layer_types=_mlp(7, 2),
        moe_intermediate_size=128,
        num_attention_heads=8,
        head_dim=64,
        q_lora_rank=128,
        qk_rope_head_dim=32,
        o_groups=2,
        o_lora_rank=64,
        sliding_window=64,
        index_n_heads=8,
        index_head_dim=64,
        index_topk=32,
        n_routed_experts=16,
        num_experts_per_tok=2,
        compress_rates=CompressRates(4, 32),
        scan_layers=True,
    )


def mini(vocab_size: int = 8192) -> ModelConfig:
    """About 70M parameters."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=512,
        layer_types=(SLIDING, SLIDING) + (CSA, HCA) * 3 + (CSA,),
        mlp_layer_types=_mlp(9, 2),
        moe_intermediate_size=192,
        num_attention_heads=8,
        head_dim=128,
        q_lora_rank=256,
        qk_rope_head_dim=64,
        o_groups=4,
        o_lora_rank=128,
        sliding_window=128,
        index_n_heads=16,
        index_head_dim=64,
        index_topk=64,
        n_routed_experts=16,
        num_experts_per_tok=2,
        compress_rates=CompressRates(4, 64),
        scan_layers=True,
    )


def small(vocab_size: int = 32768) -> ModelConfig:
    """About 0.7B parameters, 0.2B of them active: one GPU."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=1024,
        layer_types=(SLIDING, SLIDING) + (CSA, HCA) * 5 + (CSA,),
        mlp_layer_types=_mlp(13, 3),
        moe_intermediate_size=384,
        num_attention_heads=16,
        head_dim=128,
        q_lora_rank=512,
        qk_rope_head_dim=64,
        o_groups=4,
        o_lora_rank=256,
        sliding_window=128,
        index_n_heads=16,
        index_head_dim=128,
        index_topk=128,
        n_routed_experts=32,
        num_experts_per_tok=4,
        compress_rates=CompressRates(4, 128),
        scan_layers=True,
        remat="dots",
    )


def flash() -> ModelConfig:
    """DeepSeek-V4-Flash as released: 284B parameters, 13B active (report 4.2.1)."""
    return ModelConfig(
        vocab_size=129280,
        hidden_size=4096,
        layer_types=(SLIDING, SLIDING) + (CSA, HCA) * 20 + (CSA,),
        mlp_layer_types=_mlp(43, 3),
        moe_intermediate_size=2048,
        num_attention_heads=64,
        head_dim=512,
        q_lora_rank=1024,
        qk_rope_head_dim=64,
        o_groups=8,
        o_lora_rank=1024,
        sliding_window=128,
        index_n_heads=64,
        index_head_dim=128,
        index_topk=512,
        n_routed_experts=256,
        num_experts_per_tok=6,
        routed_scaling_factor=1.5,
        rope_scaling=RopeScaling(),
        scan_layers=True,
        remat="full",
    )


def pro() -> ModelConfig:
    """DeepSeek-V4-Pro as released: 1.6T parameters, 49B active (report 4.2.1)."""
    return ModelConfig(
        vocab_size=129280,
        hidden_size=7168,
        layer_types=(HCA, HCA) + (CSA, HCA) * 29 + (CSA,),
        mlp_layer_types=_mlp(61, 3),
        moe_intermediate_size=3072,
        num_attention_heads=128,
        head_dim=512,
        q_lora_rank=1536,
        qk_rope_head_dim=64,
        o_groups=16,
        o_lora_rank=1024,
        sliding_window=128,
        index_n_heads=64,
        index_head_dim=128,
        index_topk=1024,
        n_routed_experts=384,
        num_experts_per_tok=6,
        routed_scaling_factor=2.5,
        rope_scaling=RopeScaling(),
        scan_layers=True,
        remat="full",
    )


PRESETS: dict[str, Callable[..., ModelConfig]] = {
    f.__name__: f for f in (tiny, pico, nano, micro, mini, small, flash, pro)
}

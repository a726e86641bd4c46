"""Model FLOPs: the multiply-adds that a training step needs, counted from the configuration.

Per token and forward pass, with V4's notation and the legend of `v4jax.layers` (one multiply-add
is 2 FLOPs; T is the row's length, means are over its tokens t = 0 .. T-1; r = q_lora_rank,
g = o_groups, r_o = o_lora_rank, m the kind's tokens an entry):

    attention projections   D r + r N H + D H + N H r_o + g r_o D                      a layer
    compressors             2 D H of a HCA layer, 4 D H of a CSA layer
    indexers                4 D J + r I J + D I + (I J + I) mean floor((t+1)/m)        a CSA layer
    attention               2 N H (mean min(t+1, W) + mean entries)                    a layer
        entries: none in sliding layers, floor((t+1)/m) in HCA, min(K, floor((t+1)/m)) in CSA
    routers                 D E                                                        a layer
    routed experts          3 D F times num_experts_per_tok                            a layer
    shared experts          3 D F                                                      a layer
    hyper-connections       2 (M D (2+M) M + 2 M D + M^2 D), and M^2 D + M D at the head
    head                    D V
    MTP                     D^2 + M D^2, a sliding layer with top-k experts, a stream head, and
                            D V (T-1)/T

A training step is 3 forward passes: backwards there are two products for each of the forward's.
What is not counted: recomputation (`remat`, pieces of attention), sums and elementwise work (norms,
softmax, Sinkhorn), the optimizer, the dense stage's extra entries, padding. What is counted too
high: the indexer's inputs have no gradient, which would save a third of its projections; and a row
of several samples attends to less than one long sample. Recomputation is thus time lost, not work
done: utilisation falls with it (PaLM, arXiv 2204.02311, appendix B).
"""

import jax
import jax.numpy as jnp

from v4jax.config import CSA, HCA, SLIDING, ModelConfig
from v4jax.training.peaks import published

FORWARD_PASSES = 3


def forward_flops(cfg: ModelConfig, length: int) -> dict[str, float]:
    """FLOPs a token of the forward pass over rows of `length` tokens, by part; see the module."""
    found = dict.fromkeys(
        (
            "attention projections",
            "compressors",
            "indexers",
            "attention",
            "routers",
            "routed experts",
            "shared experts",
            "hyper-connections",
            "head",
            "MTP",
        ),
        0.0,
    )
    for kind in cfg.layer_types:
        for part, products in _layer(cfg, kind, length).items():
            found[part] += 2 * products
    d, m = cfg.hidden_size, cfg.hc_mult
    stream_head = m * m * d + m * d
    found["hyper-connections"] += 2 * stream_head
    found["head"] += 2 * d * cfg.vocab_size
    if cfg.num_nextn_predict_layers:
        products = sum(_layer(cfg, SLIDING, length).values())
        products += (1 + m) * d * d + stream_head + d * cfg.vocab_size * (length - 1) / length
        found["MTP"] = 2 * products
    return found


def _layer(cfg: ModelConfig, kind: str, length: int) -> dict[str, float]:
    """Multiply-adds a token of one layer, by part."""
    d, n, h, r = cfg.hidden_size, cfg.num_attention_heads, cfg.head_dim, cfg.q_lora_rank
    i, j, m, f = cfg.index_n_heads, cfg.index_head_dim, cfg.hc_mult, cfg.moe_intermediate_size
    latent = cfg.o_groups * cfg.o_lora_rank
    seen = _mean_least(length, 1, cfg.sliding_window)
    found: dict[str, float] = {
        "attention projections": d * r + r * n * h + d * h + n * h * cfg.o_lora_rank + latent * d,
        "routers": d * cfg.n_routed_experts,
        "routed experts": 3 * d * f * cfg.num_experts_per_tok,
        "shared experts": 3 * d * f,
        "hyper-connections": 2 * (m * d * (2 + m) * m + 2 * m * d + m * m * d),
    }
    if kind != SLIDING and length >= (rate := getattr(cfg.compress_rates, kind)):
        visible = _mean_least(length, rate, length)
        found["compressors"] = 2 * d * h * (2 if kind == CSA else 1)
        if kind == CSA:
            found["indexers"] = 4 * d * j + r * i * j + d * i + (i * j + i) * visible
            seen += _mean_least(length, rate, cfg.index_topk)
        if kind == HCA:
            seen += visible
    found["attention"] = 2 * n * h * seen
    return found


def _mean_least(length: int, rate: int, most: int) -> float:
    """Mean over t of min(most, floor((t+1) / rate))."""
    return sum(min(most, (t + 1) // rate) for t in range(length)) / length


def training_flops(cfg: ModelConfig, length: int) -> float:
    """FLOPs a token of a training step on rows of `length` tokens."""
    return FORWARD_PASSES * sum(forward_flops(cfg, length).values())


def peak_flops(dtype: str) -> float | None:
    """FLOP/s of all devices together with operands of `dtype`; None where none are published."""
    devices = jax.devices()
    found = published(devices[0])
    rate = None if found is None else found.flops.get(jnp.dtype(dtype).name)
    if rate is None:
        return None
    # The table's TPU figures are of a TensorCore; some TPUs show a chip of two as one device.
    return rate * len(devices) * (getattr(devices[0], "num_cores", None) or 1)


def describe(cfg: ModelConfig, length: int, dtype: str) -> str:
    """One line: FLOPs a token, the largest parts, and what utilisation will be measured against."""
    parts = forward_flops(cfg, length)
    total = sum(parts.values())
    largest = sorted(parts.items(), key=lambda item: -item[1])[:4]
    shares = ", ".join(f"{name} {value / total:.0%}" for name, value in largest)
    peak = peak_flops(dtype)
    against = "no peak is published for this device, so no utilisation (mfu)"
    if peak is not None:
        against = f"mfu is of {peak / 1e12:,.0f} TFLOP/s on {jax.device_count()} devices"
    return f"model FLOPs a token: {FORWARD_PASSES * total / 1e6:,.2f} million ({shares}); {against}"

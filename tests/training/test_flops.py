"""The formula of model FLOPs against counts made another way: loops, and the program itself."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest

from tests.training import tiny
from v4jax import presets
from v4jax.config import CSA, HCA, SLIDING
from v4jax.model import abstract_model, parameter_counts
from v4jax.training import flops
from v4jax.training.observe import StepWork

LENGTH = 32
CFG = tiny.model(
    layer_types=(SLIDING, HCA, CSA, CSA), mlp_layer_types=("hash_moe", "moe", "moe", "moe")
)


def products(jaxpr, times: float = 1.0, scope: str = "") -> dict[str, float]:
    """Scope path -> FLOPs of the matrix products in a program, those of inner programs included."""
    found: dict[str, float] = {}
    for eqn in jaxpr.eqns:
        path = f"{scope}/{eqn.source_info.name_stack}"
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            size = math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contract)
            found[path] = found.get(path, 0.0) + times * 2 * size
        inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        name = "custom_vjp_call"
        keys = ["call_jaxpr"] if eqn.primitive.name.startswith(name) else list(eqn.params)
        for key in keys:
            value = eqn.params.get(key)
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                for at, count in products(value, inner, path).items():
                    found[at] = found.get(at, 0.0) + count
    return found


@pytest.fixture(scope="module")
def program():
    """FLOPs a token of the forward pass's matrix products, by scope path."""
    tokens = jax.ShapeDtypeStruct((1, LENGTH), np.int32)
    jaxpr = jax.make_jaxpr(lambda model, tokens: model(tokens).logits)(abstract_model(CFG), tokens)
    found = products(jaxpr.jaxpr)
    assert any(path.startswith("/layer_3/moe/") for path in found)
    return {path: count / LENGTH for path, count in found.items() if "/mtp" not in path}


def in_scopes(program, *scopes: str, unless: str = "nothing") -> float:
    return sum(
        count
        for path, count in program.items()
        if any(scope in path for scope in scopes) and unless not in path
    )


def test_dense_parts_are_the_products_of_the_program(program):
    """Parts whose products are the same in every form of the computation."""
    found = flops.forward_flops(CFG, LENGTH)
    d, m = CFG.hidden_size, CFG.hc_mult
    attention = in_scopes(program, "attention/projections", "attention/output")
    assert found["attention projections"] == attention
    assert found["compressors"] == in_scopes(
        program, "attention/compressor", unless="attention/indexer"
    )
    assert found["shared experts"] == in_scopes(program, "moe/shared_expert")
    assert found["routers"] == 4 * 2 * d * CFG.n_routed_experts
    assert found["head"] == in_scopes(program, "/head") - 2 * m * m * d  # without the stream head
    elementwise = 4 * 2 * 2 * (2 * m * d + m * m * d) + 2 * m * d  # read and mixed, not products
    maps = in_scopes(program, "hyper_connection") + 2 * m * m * d
    assert found["hyper-connections"] == maps + elementwise


def test_attention_indexers_and_experts_are_counted_in_loops():
    """Over every token: what it attends to, scores and visits."""
    cfg, found = CFG, flops.forward_flops(CFG, LENGTH)
    i, j, d, r = cfg.index_n_heads, cfg.index_head_dim, cfg.hidden_size, cfg.q_lora_rank
    attended = scored = visited = 0
    for kind in cfg.layer_types:
        for t in range(LENGTH):
            attended += sum(key <= t and t - key < cfg.sliding_window for key in range(LENGTH))
            visited += cfg.num_experts_per_tok
            if kind == SLIDING:
                continue
            rate = getattr(cfg.compress_rates, kind)
            entries = sum((entry + 1) * rate - 1 <= t for entry in range(LENGTH // rate))
            attended += min(entries, cfg.index_topk) if kind == CSA else entries
            scored += entries if kind == CSA else 0
    two_products = 2 * 2 * cfg.num_attention_heads * cfg.head_dim
    assert math.isclose(found["attention"], attended * two_products / LENGTH)
    projections = 2 * 2 * (2 * d * 2 * j + r * i * j + d * i)  # of two CSA layers
    assert math.isclose(found["indexers"], projections + scored * 2 * i * (j + 1) / LENGTH)
    an_expert = 2 * 3 * d * cfg.moe_intermediate_size
    assert math.isclose(found["routed experts"], visited * an_expert / LENGTH)


def test_mtp_is_a_sliding_layer_with_two_projections_and_the_head():
    mtp = flops.forward_flops(CFG, LENGTH)["MTP"]
    plain = dict(num_nextn_predict_layers=0)
    one = tiny.model(layer_types=(SLIDING,), mlp_layer_types=("moe",), **plain)
    layer = flops.forward_flops(one, LENGTH)
    d, m = CFG.hidden_size, CFG.hc_mult
    wanted = sum(layer.values()) - layer["head"] / LENGTH + 2 * (d * d + m * d * d)
    assert math.isclose(mtp, wanted)
    assert flops.forward_flops(one, LENGTH)["MTP"] == 0


def test_a_long_row_of_the_released_model_is_nearly_six_times_its_active_parameters():
    """6 N a token, N without the embedding table, is the common estimate; attention comes on top.

    Layers are stacked: quicker to count."""
    cfg = dataclasses.replace(presets.pro(), scan_layers=True)
    active = parameter_counts(cfg)["active without the embedding table"]
    without_mtp = flops.forward_flops(cfg, 4096)
    del without_mtp["MTP"]
    assert 1.0 < 3 * sum(without_mtp.values()) / (6 * active) < 1.15
    assert flops.training_flops(cfg, 65536) > flops.training_flops(cfg, 4096)


def test_utilisation_is_of_all_devices_and_only_where_a_peak_is_known(monkeypatch):
    assert flops.peak_flops("float32") is None  # a CPU
    assert "no utilisation" in flops.describe(CFG, LENGTH, "float32")

    class H100:
        device_kind = "NVIDIA H100 80GB HBM3"

    class Megacore:
        device_kind, num_cores = "TPU v5", 2

    monkeypatch.setattr(jax, "devices", lambda: [H100()] * 4)
    assert flops.peak_flops("bfloat16") == 4 * 989e12
    monkeypatch.setattr(jax, "devices", lambda: [Megacore()])
    assert flops.peak_flops("bfloat16") == 2 * 229.5e12
    assert flops.peak_flops("float32") is None
    work = StepWork(tokens=100, flops=5e9, peak=1e10)
    assert work.speed(2.0) == {"model_flops_per_second": 2.5e9, "mfu": 0.25}
    assert work.peak_tokens == 200
    assert StepWork(100, 5e9, None).speed(2.0) == {"model_flops_per_second": 2.5e9}

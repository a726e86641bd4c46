"""Experts handed in (anticipatory routing): the choice is replaced, and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.jax_model import quick_jit, split
from tests.training import tiny
from v4jax.config import CSA, SLIDING
from v4jax.model import Transformer, chosen_experts, routed_blocks
from v4jax.training.losses import losses

SMALL = {"hc_mult": 2, "hc_sinkhorn_iters": 1, "vocab_size": 40, "moe_intermediate_size": 16}
MODEL = tiny.model(layer_types=(CSA,), mlp_layer_types=("moe",), **SMALL)
SCANNED = tiny.model(
    layer_types=(SLIDING,) * 3,
    mlp_layer_types=("hash_moe", "moe", "moe"),
    num_nextn_predict_layers=0,
    scan_layers=True,
    remat="full",
    **SMALL,
)


def case(cfg, dtype=jnp.float32, rows=2, length=24):
    """(graphdef, params, rest, tokens, segment ids [rows, length + 1]) with a bias that counts."""
    graphdef, params, rest = split(Transformer(cfg, rngs=nnx.Rngs(0), dtype=dtype))
    rng = np.random.default_rng(0)
    rest = jax.tree.map(
        lambda x: x if x.dtype == jnp.int32 else jnp.asarray(rng.normal(0, 0.05, x.shape), x.dtype),
        rest,
    )
    tokens = jnp.asarray(rng.integers(0, cfg.vocab_size, (rows, length + 1)), jnp.int32)
    segments = jnp.asarray(np.repeat([[1, 2, 0]], [length - 8, 6, 3], axis=1).repeat(rows, axis=0))
    return graphdef, params, rest, tokens, segments


def learning(graphdef, tokens, segments):
    """(params, rest, routes) -> (losses and loads, gradients) of all losses in one."""

    def total(params, rest, routes):
        out = nnx.merge(graphdef, params, rest)(tokens[:, :-1], segments[:, :-1], routes=routes)
        found = losses(out, tokens, segments)
        loads = [layer["expert_load"] for layer in out.aux["layers"]]
        return sum(found.values()), (found, loads)

    return lambda *arguments: jax.grad(total, has_aux=True)(*arguments)[::-1]


def choosing(graphdef, tokens, segments):
    def choose(params, rest):
        return chosen_experts(nnx.merge(graphdef, params, rest), tokens[:, :-1], segments[:, :-1])

    return choose


@pytest.mark.parametrize("program", ["quick", pytest.param("default", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["unrolled, bfloat16", "scanned, remat"])
def test_the_live_choice_handed_in_changes_no_bit(kind, program):
    """Of any loss, load or gradient; choice and both trainings are programs of their own."""
    cfg = SCANNED if "scanned" in kind else MODEL
    dtype = jnp.bfloat16 if "bfloat16" in kind else jnp.float32
    graphdef, params, rest, tokens, segments = case(cfg, dtype)
    jit = quick_jit if program == "quick" else jax.jit
    routes = jit(choosing(graphdef, tokens, segments))(params, rest)
    assert routes.dtype == jnp.int32
    assert routes.shape == (routed_blocks(cfg), 2, 24, cfg.num_experts_per_tok)
    learn = jit(learning(graphdef, tokens, segments))
    plain = learn(params, rest, None)
    assert tiny.same_bits(learn(params, rest, routes), plain)
    other = (routes + 1) % cfg.n_routed_experts
    found, gradients = learn(params, rest, other.astype(jnp.int8))
    assert not tiny.same_bits(found, plain[0]) and not tiny.same_bits(gradients, plain[1])

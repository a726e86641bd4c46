"""Experts handed in (anticipatory routing): the choice is replaced, and nothing else."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import reference
from tests.collectives import collectives, of_tokens
from tests.jax_model import build, quick_jit, split
from tests.test_model_against_reference import BASE, check, safe
from tests.training import tiny
from v4jax import parallel
from v4jax.config import CSA, HCA, SLIDING
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


ROWS_AND_LENGTH = 2, 24


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cfg", "dtype", "jit"),
    [(MODEL, jnp.bfloat16, jax.jit), (SCANNED, jnp.float32, quick_jit)],
    ids=["bfloat16, default options", "scanned, remat, quick"],
)
def test_the_live_choice_handed_in_changes_no_bit(cfg, dtype, jit):
    """Of any loss, load or gradient; choice and both trainings are programs of their own."""
    graphdef, params, rest, tokens, segments = case(cfg, dtype)
    routes = jit(choosing(graphdef, tokens, segments))(params, rest)
    assert routes.dtype == jnp.int32
    assert routes.shape == (routed_blocks(cfg), *ROWS_AND_LENGTH, cfg.num_experts_per_tok)
    learn = jit(learning(graphdef, tokens, segments))
    plain = learn(params, rest, None)
    assert tiny.same_bits(learn(params, rest, routes), plain)
    found, gradients = learn(params, rest, (routes + 1) % cfg.n_routed_experts)
    assert not tiny.same_bits(found, plain[0]) and not tiny.same_bits(gradients, plain[1])


EVERY_KIND = {
    "layer_types": (SLIDING, CSA, HCA),
    "mlp_layer_types": ("hash_moe", "moe", "moe"),
    "num_nextn_predict_layers": 1,
}
ALIKE = {"layer_types": (SLIDING, *(CSA, HCA) * 2), "mlp_layer_types": ("hash_moe", *("moe",) * 4)}


@pytest.mark.parametrize("changes", [EVERY_KIND, ALIKE], ids=["every kind, mtp", "scanned"])
def test_routes_against_the_reference(changes, monkeypatch):
    """Logits, MTP's, loads and losses of float64 numpy that looks its experts up by position."""
    small = {"hc_mult": 2, "hc_sinkhorn_iters": 1, "n_routed_experts": 6, "num_experts_per_tok": 2}
    cfg, length = SimpleNamespace(**BASE | small | changes), 18
    scanned = changes is ALIKE
    rng = np.random.default_rng(0)
    ids = rng.integers(0, cfg.vocab_size, (1, length))
    blocks = len(cfg.layer_types) + cfg.num_nextn_predict_layers
    routes = rng.permuted(np.tile(np.arange(6), (blocks, 1, length, 1)), axis=-1)[..., :2]
    plain_moe = reference.moe

    def moe(cfg, w, kind, x, ids, out, layer):
        """Of tokens numbered by position, so that a table of theirs says what each visits."""
        if kind == "hash_moe":
            return plain_moe(cfg, w, kind, x, ids, out, layer)
        w = Replaced(w, {"gate.tid2eid": routes[layer, 0]})
        y = plain_moe(cfg, w, "hash_moe", x, np.arange(len(x)), out, layer)
        out.balance[layer] = reference.balance_loss(
            out.router_scores[layer], out.router_choices[layer]
        )
        return y

    monkeypatch.setattr(reference, "moe", moe)
    params, runs = safe(cfg, [[row] for row in ids], [False])
    model = build(cfg, params, scan_layers=scanned)
    assert bool(model.units) == scanned
    graphdef, weights, rest = split(model)
    run = quick_jit(lambda p, rest, ids, routes: nnx.merge(graphdef, p, rest)(ids, routes=routes))
    out = run(weights, rest, jnp.asarray(ids, jnp.int32), jnp.asarray(routes, jnp.uint8))
    check(cfg, out, runs[False])
    for kind, aux in zip(cfg.mlp_layer_types, out.aux["layers"], strict=True):
        assert ("disagreement" in aux) == (kind == "moe")
        assert kind == "hash_moe" or 0 < aux["disagreement"] < 1


class Replaced:
    """A reference's weights of which some have other values."""

    def __init__(self, weights, values):
        self.weights, self.values = weights, values

    def __getitem__(self, name):
        return self.values[name] if name in self.values else self.weights[name]

    def at(self, prefix):
        return self.weights.at(prefix)


def test_choosing_computes_neither_logits_nor_a_loss():
    """Of the program that is compiled: what it would cost, and nothing with an axis of V but E."""
    graphdef, params, rest, tokens, segments = case(MODEL)
    program = quick_jit(choosing(graphdef, tokens, segments)).lower(params, rest).as_text()
    rows, length = ROWS_AND_LENGTH
    assert f"tensor<{rows}x{length}x{MODEL.hidden_size}xf32>" in program
    assert f"tensor<{rows}x{length}x{MODEL.vocab_size}xf32>" not in program
    assert f"tensor<{rows}x{length - 1}x{MODEL.vocab_size}xf32>" not in program


def test_routes_of_another_shape_or_kind_are_refused():
    graphdef, params, rest, tokens, _ = case(MODEL)
    for shape, dtype in (((1, 2, 25, 2), "int32"), ((2, 2, 25, 2), "float32")):
        with pytest.raises(
            ValueError, match=r"^routes: got \w+ \(.*allowed: integers \(2, 2, 25, 2\)$"
        ):
            nnx.merge(graphdef, params, rest)(tokens, routes=jnp.zeros(shape, dtype))


@pytest.mark.slow
def test_on_a_mesh_rows_stay_where_they_are():
    """The choice and a forward pass that is handed one: what one device finds, nothing exchanged
    that has an axis of tokens."""
    length = 29  # of no axis of a parameter a factor, nor the number of entries
    cfg = dataclasses.replace(MODEL, num_nextn_predict_layers=0)
    graphdef, params, rest, tokens, segments = case(cfg, rows=8, length=length)
    mesh = parallel.make_mesh("data=2,fsdp=4")
    rows = parallel.rows_sharding(mesh)

    def choose(params, rest, tokens, segments):
        return chosen_experts(nnx.merge(graphdef, params, rest), tokens, segments)

    def forward(params, rest, tokens, segments, routes):
        out = nnx.merge(graphdef, params, rest)(tokens, segments, routes=routes)
        return out.logits, [{n: aux[n] for n in SCALARS} for aux in out.aux["layers"]]

    given = params, rest, tokens[:, :-1], segments[:, :-1]
    placed = jax.device_put(given, (*(parallel.shardings(x, mesh) for x in given[:2]), rows, rows))
    expected = quick_jit(choose)(*given)
    with jax.set_mesh(mesh):
        program = quick_jit(choose).lower(*placed).compile()
        found = program(*placed)
    np.testing.assert_array_equal(found, expected)
    assert found.sharding.spec == jax.sharding.PartitionSpec(None, parallel.ROWS)
    other = (expected + 1) % cfg.n_routed_experts
    whole = quick_jit(forward)(*given, other)
    with jax.set_mesh(mesh):
        placed = *placed, jax.device_put(other, found.sharding)
        second = quick_jit(forward).lower(*placed).compile()
        spread = second(*placed)
    for a, b in zip(jax.tree.leaves(spread), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for one in (program, second):
        exchanged = collectives(one.as_text())
        assert exchanged and not of_tokens(exchanged, length, length // 4)


SCALARS = ("disagreement", "clamped", "index_kept_mass", "expert_load", "balance_loss")

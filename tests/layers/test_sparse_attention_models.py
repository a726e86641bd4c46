"""The gathered form in layers and models: formats, packed samples, sharded rows, long context."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tests import test_model_against_reference as against_reference
from tests.jax_model import build, quick_jit
from tests.layers.test_sparse_attention import sizes
from v4jax import presets
from v4jax.config import CSA, HCA, SLIDING
from v4jax.layers import sparse_attention
from v4jax.layers.attention import Attention
from v4jax.layers.context import IndexFormats, make_context
from v4jax.model import abstract_model
from v4jax.numerics import MXFP4

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def in_pieces(monkeypatch):
    monkeypatch.setattr(sparse_attention, "PIECE", {"cpu": 1})


CONFIG = dataclasses.replace(presets.nano(64), hidden_size=32, sliding_window=8, index_topk=3)
FP4 = IndexFormats(MXFP4, MXFP4, "bf16")


def test_a_layer_computes_and_learns_the_same_in_fp4():
    """Output, the indexer's loss and every gradient, sparse and dense; a traced phase is either."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 40, 32)), jnp.float32)

    def results(form, traced):
        cfg = dataclasses.replace(CONFIG, sparse_attention=form)
        graphdef, params = nnx.split(Attention(cfg, nnx.Rngs(0), CSA))

        def loss(params, x, dense):
            tokens = jnp.zeros((2, 40), jnp.int32)
            ctx = make_context(cfg, tokens, index_formats=FP4, dense_index=dense)
            o, aux = nnx.merge(graphdef, params)(x, ctx)
            return jnp.sum(jnp.sin(o)) + aux["index_loss"], (o, aux["index_loss"])

        static = {} if traced else {"static_argnums": 2}
        go = quick_jit(jax.value_and_grad(loss, (0, 1), has_aux=True), **static)
        with jax.default_matmul_precision("highest"):
            return {dense: jax.tree.leaves(go(params, x, dense)) for dense in (False, True)}

    expected = results("masked", True)
    for traced in (True, False):
        found = results("gathered", traced)
        for dense in (False, True):
            for a, b in zip(found[dense], expected[dense], strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(np.abs(b).max(), 1e-3))


def test_a_gathered_model_against_the_reference():
    """Two CSA layers in float32 against numpy in float64, selected and dense."""
    name = "csa, at a window's end"
    batch, length, changes = against_reference.MODELS[name]
    fields: dict[str, object] = against_reference.BASE | changes
    cfg = SimpleNamespace(**fields)
    ids = np.random.default_rng(len(name)).integers(0, cfg.vocab_size, (batch, length))
    params, runs = against_reference.safe(cfg, [[row] for row in ids], [False, True])
    forward = against_reference.forward(build(cfg, params, sparse_attention="gathered"))
    for dense, rows in runs.items():
        out = forward(jnp.asarray(ids, jnp.int32), None, jnp.asarray(dense))
        against_reference.check(cfg, out, rows)


def test_packed_rows_of_a_gathered_model_equal_their_samples_apart():
    cfg, lengths = against_reference.PACKED, [[9, 3, 14], [1, 25, 6]]
    params = against_reference.random_parameters(cfg, 0)
    ids, segments, samples = against_reference.packed_batch(lengths, seed=1)
    rows = against_reference.reference_rows(cfg, params, samples, False)
    assert against_reference.is_safe(rows)
    forward = against_reference.forward(build(cfg, params, sparse_attention="gathered"))
    against_reference.check(cfg, forward(ids, segments, jnp.asarray(False)), rows)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_traced_phase_has_no_array_of_heads_by_length_by_entries(remat, monkeypatch):
    """The dense phase has scores of every query and entry, and both phases nothing larger."""
    monkeypatch.setattr(sparse_attention, "PIECE", {"cpu": 2**18})
    cfg = dataclasses.replace(
        CONFIG,
        layer_types=(SLIDING, CSA, HCA),
        mlp_layer_types=("hash_moe", "moe", "moe"),
        num_nextn_predict_layers=0,
        remat=remat,
    )
    length = 16384
    graphdef, params, rest = nnx.split(abstract_model(cfg), nnx.Param, ...)

    def loss(params, rest, tokens, dense):
        out = nnx.merge(graphdef, params, rest)(tokens, dense_index=dense)
        return jnp.sum(out.logits[..., 0]) + sum(a.get("index_loss", 0) for a in out.aux["layers"])

    tokens, dense = (jax.ShapeDtypeStruct(*x) for x in (((1, length), jnp.int32), ((), bool)))
    program = jax.make_jaxpr(jax.grad(loss))(params, rest, tokens, dense)
    assert max(sizes(program.jaxpr)) == length * length // 4


def test_rows_that_are_sharded_stay_where_they_are():
    """Data parallel: no device gets another's queries, keys or entries."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    cfg = dataclasses.replace(CONFIG, sparse_attention="gathered")
    graphdef, params = nnx.split(Attention(cfg, nnx.Rngs(0), CSA))

    def loss(params, x):
        ctx = make_context(cfg, jnp.zeros(x.shape[:2], jnp.int32))
        o, aux = nnx.merge(graphdef, params)(x, ctx)
        return jnp.sum(jnp.sin(o)) + aux["index_loss"]

    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 24, 32)), jnp.float32)
    gradient = quick_jit(jax.grad(loss, argnums=1))
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    held = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    program = gradient.lower(held, placed).compile().as_text()
    assert "all-reduce" in program  # the indexer's loss is a mean over all rows
    for moved in ("all-gather", "all-to-all", "collective-permute"):
        assert moved not in program
    np.testing.assert_allclose(gradient(held, placed), gradient(params, x), rtol=1e-5, atol=1e-6)

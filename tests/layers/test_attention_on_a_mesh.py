"""Attention on a mesh: each device has its own rows, from the indexer to the output."""

from __future__ import annotations

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.collectives import collectives, of_tokens
from tests.jax_model import QUICK_COMPILE
from tests.training import tiny
from v4jax import parallel
from v4jax.config import CSA
from v4jax.layers import sparse_attention
from v4jax.layers.attention import Attention
from v4jax.layers.context import IndexFormats, make_context
from v4jax.numerics import MXFP4

pytestmark = pytest.mark.slow
ROWS, LENGTH = 8, 29
ENTRIES = LENGTH // 4  # neither has a factor in common with an axis of a parameter


@pytest.fixture(autouse=True)
def as_at_scale(monkeypatch):
    """What is small takes the loops over blocks and over pieces too."""
    scores = importlib.import_module("kernels_pallas.index_scores")  # the name is the function's
    monkeypatch.setattr(scores, "DIRECT", 0)
    monkeypatch.setattr(sparse_attention, "PIECE", {"cpu": 1})


def compiled(form: str, mesh):
    """(program, arguments): value and gradients of a layer, both outputs counted."""
    cfg = dataclasses.replace(tiny.model(), sparse_attention=form)
    graphdef, params = nnx.split(Attention(cfg, nnx.Rngs(0), CSA))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((ROWS, LENGTH, cfg.hidden_size)), jnp.float32)
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (ROWS, LENGTH))), jnp.int32)

    def loss(params, x, segments):
        formats = IndexFormats(MXFP4, MXFP4, "bf16")
        ctx = make_context(cfg, segments, segments, index_formats=formats)
        o, aux = nnx.merge(graphdef, params)(x, ctx)
        return jnp.sum(jnp.sin(o)) + aux["index_loss"]

    arguments = params, x, segments
    if mesh is not None:
        rows = parallel.rows_sharding(mesh)
        places = parallel.shardings(params, mesh), rows, rows
        arguments = jax.device_put(arguments, places)
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    if mesh is None:
        return step.lower(*arguments).compile(QUICK_COMPILE), arguments
    with jax.set_mesh(mesh):
        return step.lower(*arguments).compile(QUICK_COMPILE), arguments


@pytest.mark.parametrize("form", ["masked", "gathered"])
def test_a_layer_on_a_mesh_exchanges_weights_alone_and_learns_the_same(form):
    alone, arguments = compiled(form, None)
    spread, placed = compiled(form, parallel.make_mesh("data=2,fsdp=4"))
    with jax.default_matmul_precision("highest"):
        expected, found = (
            jax.tree.leaves(f(*a)) for f, a in ((alone, arguments), (spread, placed))
        )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-3))
    exchanged = collectives(spread.as_text())
    assert {one.kind for one in exchanged} == {"all-gather", "all-reduce"}
    assert not of_tokens(exchanged, LENGTH, ENTRIES), of_tokens(exchanged, LENGTH, ENTRIES)

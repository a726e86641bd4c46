"""Both forms of attention over selected entries: against each other, a loop, and their memory."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.jax_model import quick_jit
from tests.training import tiny
from v4jax.config import CSA
from v4jax.layers import sparse_attention
from v4jax.layers.sparse_attention import attend, gathers, take_entries
from v4jax.model import Transformer, abstract_model

B, T, N, H, C, K, WINDOW = 2, 21, 3, 8, 7, 3, 4


def case(seed: int = 0):
    """(arrays that have gradients, indices int32 [B, T, K] with -1, the same as a mask)."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    mask = np.zeros((B, T, C), bool)
    index = np.full((B, T, K), -1, np.int32)
    for row in np.ndindex(B, T):
        chosen = rng.permutation(C)[: rng.integers(0, K + 1)]  # none, fewer than K, or K
        index[row][: len(chosen)] = chosen
        mask[row][chosen] = True
    arrays = normal(B, T, N, H), normal(B, T, H), normal(N), normal(B, C, H)
    return arrays, jnp.asarray(index), jnp.asarray(mask)


def by_hand(arrays, mask, segments):
    """Float64, a query and a head at a time: o [B, T, N, H] and mass [B, T, C]."""
    q, kv, sinks, entries = (np.asarray(x, np.float64) for x in arrays)
    o, mass = np.zeros(q.shape), np.zeros(mask.shape)
    for b, t, n in np.ndindex(B, T, N):
        near = [s for s in range(max(0, t - WINDOW + 1), t + 1) if segments[b, s] == segments[b, t]]
        far = np.flatnonzero(mask[b, t])
        values = np.concatenate([kv[b, near], entries[b, far]])
        weights = np.exp(values @ q[b, t, n] * H**-0.5)
        weights /= weights.sum() + np.exp(sinks[n])
        o[b, t, n] = weights @ values
        mass[b, t, far] += weights[len(near) :]
    return o, mass


@pytest.mark.parametrize("pieces", ["one piece", "a block a piece"])
@pytest.mark.parametrize("packed", [False, True])
def test_both_forms_equal_the_loop_and_each_others_gradients(packed, pieces, monkeypatch):
    if pieces != "one piece":
        monkeypatch.setattr(sparse_attention, "PIECE", {"cpu": 1})
    arrays, index, mask = case()
    segments = np.ones((B, T), np.int32)
    if packed:
        segments[0, 6:], segments[1, 13:] = 2, 0
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((B, T, N, H)), jnp.float32)

    def loss(arrays, attended):
        q, kv, sinks, entries = arrays
        ids = jnp.asarray(segments) if packed else None
        o, mass = attend(q, kv, sinks, WINDOW, ids, entries, attended)
        return jnp.sum(o * weights), (o, mass)

    run = quick_jit(jax.value_and_grad(loss, has_aux=True))
    (_, (o, mass)), masked = run(arrays, mask)
    (_, (o_gathered, mass_gathered)), gathered = run(arrays, index)
    expected, expected_mass = by_hand(arrays, np.asarray(mask), segments)
    np.testing.assert_allclose(o, expected, atol=2e-6)
    np.testing.assert_allclose(mass, expected_mass, atol=2e-6)
    np.testing.assert_allclose(o_gathered, expected, atol=2e-6)
    spread = np.zeros(mask.shape)
    for row in np.ndindex(B, T):
        for slot, entry in enumerate(np.asarray(index)[row]):
            if entry >= 0:
                spread[row][entry] += mass_gathered[row][slot]
    np.testing.assert_allclose(spread, expected_mass, atol=2e-6)
    for a, b in zip(jax.tree.leaves(gathered), jax.tree.leaves(masked), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())


def test_a_range_is_the_mask_of_it():
    (q, kv, sinks, entries), _, _ = case()
    end = jnp.broadcast_to((jnp.arange(T, dtype=jnp.int32) + 1) // 3, (B, T))
    first = jnp.minimum(end, 1)
    entry = jnp.arange(C)
    mask = (entry >= first[..., None]) & (entry < end[..., None])
    for got, want in zip(
        attend(q, kv, sinks, WINDOW, None, entries, (first, end)),
        attend(q, kv, sinks, WINDOW, None, entries, mask),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


def test_an_entry_looked_up_often_gets_every_gradient():
    entries = jnp.ones((1, 4, 2))
    index = jnp.asarray([[[0, 3], [3, 3], [-1, 2]]], jnp.int32)
    gradient = jax.grad(lambda e: jnp.sum(take_entries(e, index)))(entries)
    np.testing.assert_array_equal(gradient[0, :, 0], [2, 0, 1, 3])  # -1 reads the first


def model_of(form: str, **changes) -> Transformer:
    cfg = dataclasses.replace(tiny.model(layer_types=(CSA, CSA), **changes), sparse_attention=form)
    return Transformer(cfg, rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize("dense", ["sparse", "dense, traced", "sparse, traced"])
def test_the_model_does_not_depend_on_the_form(dense):
    """Logits, index losses and every gradient, over packed samples."""
    layers = {"mlp_layer_types": ("hash_moe", "moe"), "index_n_heads": 8}
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 257, (2, 40)), jnp.int32)
    ids = jnp.asarray(np.repeat([[1, 2, 3, 0]], [17, 14, 6, 3], axis=1).repeat(2, axis=0))
    found = {}
    for form in ("masked", "gathered"):
        graphdef, params, rest = nnx.split(model_of(form, **layers), nnx.Param, ...)

        def loss(params, dense, graphdef=graphdef, rest=rest):
            out = nnx.merge(graphdef, params, rest)(tokens, ids, dense_index=dense)
            index = sum(aux["index_loss"] for aux in out.aux["layers"])
            picked = jnp.take_along_axis(jax.nn.log_softmax(out.logits), tokens[..., None], -1)
            return index - jnp.mean(picked), (out.logits, index)

        run = jax.value_and_grad(loss, has_aux=True)
        if dense == "sparse":
            found[form] = quick_jit(lambda p, run=run: run(p, False))(params)
        else:
            found[form] = quick_jit(run)(params, jnp.asarray(dense.startswith("dense")))
    for a, b in zip(*map(jax.tree.leaves, (found["gathered"], found["masked"])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(b).max(), 1e-3))


def sizes(jaxpr) -> list[int]:
    """Elements of every array that a jaxpr makes, those of inner jaxprs included."""
    found = []
    for equation in jaxpr.eqns:
        found += [math.prod(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape")]
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: x is None):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += sizes(inner)
    return found


@pytest.mark.parametrize(
    ("form", "dense"),
    [
        *(("auto", False), ("gathered", False), ("masked", False), ("masked, whole", False)),
        *(("gathered", True), ("masked", True)),
    ],
)
def test_no_array_of_heads_by_length_by_entries(form, dense, monkeypatch):
    """Forward and backward of a model at length 4,096. One of [length, entries] may exist.

    So it is with the indexer's loss, its teacher and the kept mass, which are part of it, over the
    selected entries and in the dense stage. "masked, whole" does all queries at once, which must be
    seen here.
    """
    length, whole = 4096, form == "masked, whole"
    if whole:
        monkeypatch.setattr(sparse_attention, "PIECE", {"cpu": 2**40})
        form = "masked"
    cfg = tiny.model(
        sparse_attention=form, index_n_heads=4, hc_sinkhorn_iters=1, num_nextn_predict_layers=0
    )
    graphdef, params, rest = nnx.split(abstract_model(cfg), nnx.Param, ...)
    tokens = jnp.zeros((1, length), jnp.int32)

    def loss(params, rest):
        out = nnx.merge(graphdef, params, rest)(tokens, dense_index=dense)
        kept = [aux["index_kept_mass"] for aux in out.aux["layers"]]
        index = sum(aux["index_loss"] for aux in out.aux["layers"])
        return jnp.mean(out.logits) + index, kept

    largest = max(sizes(jax.make_jaxpr(jax.grad(loss, has_aux=True))(params, rest).jaxpr))
    entries = length // 4
    assert (largest < 2 * length * entries) != whole  # two heads
    if not form.startswith("masked") and not dense:
        assert largest < length * entries


def test_the_rule():
    edge = 16 * sparse_attention.GATHER_ABOVE
    assert gathers("auto", edge + 1, 16) and not gathers("auto", edge, 16)
    assert gathers("gathered", 1, 16) and not gathers("masked", 10_000, 16)

"""What a selection keeps of the dense attention: against float64, a query and a head at a time."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.jax_model import quick_jit
from tests.training import tiny
from v4jax.config import CSA
from v4jax.layers import attention, sparse_attention
from v4jax.layers.attention import Attention
from v4jax.layers.context import make_context
from v4jax.layers.kept_mass import QUERIES, kept_mass

LENGTH, RATE, TOP_K, WINDOW = 40, 4, 3, 20  # windows that reach beyond a sample
MODEL = tiny.model(num_attention_heads=4, sliding_window=WINDOW, index_topk=TOP_K)


def by_hand(arrays, segments, chosen, queries):
    """Kept mass over visible mass of `queries`; a list of each row's chosen entries for each."""
    q, kv, sinks, entries = (np.asarray(x, np.float64) for x in arrays)
    closing = []  # of each row: the token that closes an entry's window
    for row in segments:
        ends, run = [], 0
        for t, sample in enumerate(row):
            run = run + 1 if t and sample == row[t - 1] else 1
            if sample and run % RATE == 0:
                ends.append(t)
        closing.append(ends)
    kept = whole = 0.0
    for b, t in queries:
        sample = segments[b][t]
        visible = [c for c, end in enumerate(closing[b]) if end <= t and segments[b][end] == sample]
        if not sample or len(visible) <= TOP_K:
            continue
        assert len(chosen[b][t]) == TOP_K and set(chosen[b][t]) <= set(visible)
        near = [s for s in range(max(0, t - WINDOW + 1), t + 1) if segments[b][s] == sample]
        for head in range(q.shape[2]):
            query = q[b, t, head] * q.shape[-1] ** -0.5
            mass = np.exp(entries[b] @ query)
            total = mass[visible].sum() + np.exp(kv[b, near] @ query).sum() + np.exp(sinks[head])
            kept += mass[chosen[b][t]].sum() / total
            whole += mass[visible].sum() / total
    return kept / whole if whole else 1.0


@pytest.mark.parametrize("pieces", ["one piece", "a query a piece"])
@pytest.mark.parametrize("form", ["masked", "gathered"])
def test_a_layers_kept_mass_is_that_of_the_loop(form, pieces, monkeypatch):
    """Packed rows and padding; the layer sparse and dense alike, which both say what was chosen."""
    if pieces != "one piece":
        monkeypatch.setattr(sparse_attention, "PIECE", {"cpu": 1})
    cfg = dataclasses.replace(MODEL, sparse_attention=form)
    layer = Attention(cfg, nnx.Rngs(0), CSA)
    rng = np.random.default_rng(0)
    layer.sinks[...] = jnp.asarray(rng.standard_normal(4), jnp.float32)
    graphdef, params = nnx.split(layer)
    x = jnp.asarray(rng.standard_normal((2, LENGTH, cfg.hidden_size)), jnp.float32)
    segments = np.repeat([[1, 0], [1, 2]], [LENGTH - 6, 6], axis=1)
    segments[1] = np.repeat([1, 2], [15, LENGTH - 15])

    def run(params, x, dense):
        seen = []

        def noted(*arguments, **others):
            seen.append((*arguments, others["chosen"]))
            return kept_mass(*arguments, **others)

        monkeypatch.setattr(attention, "kept_mass", noted)
        ids = jnp.asarray(segments, jnp.int32)
        ctx = make_context(cfg, ids, ids, dense_index=dense)
        _, aux = nnx.merge(graphdef, params)(x, ctx)
        ((q, kv, sinks, _, _, entries, chosen),) = seen
        return (q, kv, sinks, entries), chosen, aux["index_kept_mass"]

    run = quick_jit(run)
    queries = [(b, t) for b in range(2) for t in range(2, LENGTH, 3)]
    assert len(queries) <= 2 * QUERIES
    for dense in (False, True):
        with jax.default_matmul_precision("highest"):
            arrays, chosen, found = run(params, x, jnp.asarray(dense))
        chosen = np.asarray(chosen)
        if form == "masked":
            entries = [[np.flatnonzero(one) for one in row] for row in chosen]
        else:
            entries = [[one[one >= 0] for one in row] for row in chosen]
        expected = by_hand(arrays, segments, entries, queries)
        assert 0.2 < expected < 0.95
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        every = by_hand(arrays, segments, entries, list(np.ndindex(2, LENGTH)))
        assert abs(every - expected) > 1e-4  # it is a sample


def test_nothing_to_choose_keeps_all_and_nothing_carries_a_gradient():
    cfg = dataclasses.replace(MODEL, index_topk=LENGTH // RATE)
    graphdef, params = nnx.split(Attention(cfg, nnx.Rngs(0), CSA))

    def kept(params, x):
        ctx = make_context(cfg, jnp.zeros(x.shape[:2], jnp.int32))
        return nnx.merge(graphdef, params)(x, ctx)[1]["index_kept_mass"]

    x = jnp.ones((1, LENGTH, cfg.hidden_size))
    value, gradients = quick_jit(jax.value_and_grad(kept, (0, 1)))(params, x)
    assert value == 1 and not any(g.any() for g in jax.tree.leaves(gradients))

"""The five tests of the indexer's loss: training from V3.2, teacher in V4's form."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.jax_model import build, quick_jit, split
from tests.reference import CSA
from tests.reference_parameters import random_parameters
from tests.test_model_against_reference import BASE
from v4jax.interop import state_dict
from v4jax.layers import indexer
from v4jax.layers.context import IndexFormats
from v4jax.layers.indexer import index_loss
from v4jax.layers.sparse_attention import attend
from v4jax.numerics import MXFP4, format_named


def case(heads: int):
    """Random attention of one row over 3 window tokens, a sink and 5 entries, 7 queries."""
    rng = np.random.default_rng(heads)
    length, entries, dim = 7, 5, 8
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    attended = rng.random((1, length, entries)) < 0.6
    attended[0, :2] = False  # the first queries see no entry
    return SimpleNamespace(
        q=normal(1, length, heads, dim),
        kv=normal(1, length, dim),
        sinks=normal(heads),
        entries=normal(1, entries, dim),
        attended=jnp.asarray(attended),
        scores=normal(1, length, entries),
        valid=jnp.ones((1, length), bool),
    )


def loss_of(c, scores=None):
    _, mass = attend(c.q, c.kv, c.sinks, 3, None, c.entries, c.attended)
    return index_loss(c.scores if scores is None else scores, mass, c.attended, c.valid)


def softmax_over(logits, among):
    """float64, rows without an entry are zero."""
    weights = np.where(among, np.exp(np.asarray(logits, np.float64)), 0.0)
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)


@pytest.mark.parametrize("heads", [1, 4])
def test_teacher_sums_to_one_and_gradient_is_student_minus_teacher(heads):
    """Tests (c) and (e): dL/dI = (q - p) / n on the entries attended to and 0 elsewhere."""
    c = case(heads)
    among = np.asarray(c.attended)
    counted = among.any(axis=-1)
    gradient = np.asarray(jax.grad(lambda s: loss_of(c, s))(c.scores), np.float64)
    student = softmax_over(c.scores, among)
    teacher = student - gradient * counted.sum()
    np.testing.assert_allclose(teacher.sum(axis=-1)[counted], 1.0, atol=1e-6)
    assert not gradient[~among].any()

    # The teacher again, from the joint softmax over window, entries and sink.
    q, kv, entries = (np.asarray(x, np.float64) for x in (c.q, c.kv, c.entries))
    mass = np.zeros(among.shape)
    for t in range(q.shape[1]):
        for head in range(heads):
            window = np.exp(kv[0, max(0, t - 2) : t + 1] @ q[0, t, head] * 8**-0.5)
            far = np.exp(entries[0] @ q[0, t, head] * 8**-0.5) * among[0, t]
            mass[0, t] += far / (window.sum() + far.sum() + np.exp(float(c.sinks[head])))
    expected = mass / np.maximum(mass.sum(axis=-1, keepdims=True), 1e-300)
    np.testing.assert_allclose(teacher[counted], expected[counted], atol=1e-6)


def test_with_one_head_the_loss_is_that_of_v32():
    """Test (d). With one head, window and sink cancel: no entry's share of the rest changes."""
    c = case(1)
    among = np.asarray(c.attended)
    logits = np.einsum("BTNH,BCH->BTC", c.q, c.entries) * 8**-0.5
    p, q = softmax_over(logits, among), softmax_over(c.scores, among)
    kl = np.where(among, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))), 0.0)
    expected = kl.sum() / among.any(axis=-1).sum()
    np.testing.assert_allclose(loss_of(c), expected, rtol=1e-5)
    without = SimpleNamespace(**vars(c) | {"sinks": jnp.asarray([-1e9], jnp.float32)})
    np.testing.assert_allclose(loss_of(without), expected, rtol=1e-5)


def test_queries_without_an_entry_and_padding_count_for_nothing():
    c = case(2)
    nothing = SimpleNamespace(**vars(c) | {"attended": jnp.zeros_like(c.attended)})
    value, gradient = jax.value_and_grad(lambda s: loss_of(nothing, s))(c.scores)
    assert value == 0.0 and not gradient.any()
    valid = jnp.asarray([[True] * 5 + [False] * 2])
    padded = loss_of(SimpleNamespace(**vars(c) | {"valid": valid}))
    alone = SimpleNamespace(
        **{name: x if name in ("sinks", "entries") else x[:, :5] for name, x in vars(c).items()}
    )
    np.testing.assert_allclose(padded, loss_of(alone), rtol=1e-6)


def loss_gradients():
    """(dense_index) -> gradients of the indexers' losses and of the language model's, by name."""
    layers = {"layer_types": (CSA, CSA), "mlp_layer_types": ("hash_moe", "moe")}
    cfg = SimpleNamespace(**BASE | layers | {"hc_mult": 2, "hc_sinkhorn_iters": 1})
    model = build(cfg, random_parameters(cfg, 0))
    graphdef, params, rest = split(model)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, (1, 19)), jnp.int32)

    def losses(params, rest, dense):
        out = nnx.merge(graphdef, params, rest)(ids, dense_index=dense)
        picked = jnp.take_along_axis(jax.nn.log_softmax(out.logits[:, :-1]), ids[:, 1:, None], -1)
        return sum(aux["index_loss"] for aux in out.aux["layers"]), -jnp.mean(picked)

    run = quick_jit(jax.jacrev(losses))

    def named(dense: bool):
        flat = [
            state_dict(nnx.merge(graphdef, gradient, rest))
            for gradient in run(params, rest, jnp.asarray(dense))
        ]
        buffers = ("tid2eid", "e_score_correction_bias")
        return [{n: g for n, g in part.items() if not n.endswith(buffers)} for part in flat]

    return named


def test_each_loss_trains_its_own_parameters(subtests):
    """Tests (a) and (b): exactly zero on the other's parameters, and not zero on its own."""
    gradients = loss_gradients()
    for dense in (False, True):
        with subtests.test(dense=dense):
            index, language = gradients(dense)
            assert sum(".indexer." in name for name in index) == 12
            for name in index:
                own, other = (index, language) if ".indexer." in name else (language, index)
                assert not other[name].any(), name
                assert own[name].any(), name


def test_query_and_key_are_rotated_together_or_not_at_all():
    rng = np.random.default_rng(3)
    q, k = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 4, 2, 32), (1, 3, 32)))
    w = np.ones((1, 4, 2), np.float32)
    plain, rotated = format_named("mxfp4-plain"), MXFP4
    q2, k2, _, fmt = indexer._rotated((q, k, w), IndexFormats(plain, plain))
    assert fmt == plain and (q2 == q).all() and (k2 == k).all()
    for formats in (IndexFormats(query=rotated), IndexFormats(key=rotated)):
        q2, k2, _, fmt = indexer._rotated((q, k, w), formats)
        exact = np.einsum("BTIJ,BCJ->BTIC", q, k)
        found = np.einsum("BTIJ,BCJ->BTIC", q2, k2)  # one side rounded, both in one basis
        assert fmt is None and np.corrcoef(exact.ravel(), found.ravel())[0, 1] > 0.98

"""Scores, the hash table, and the balance terms that the model test does not reach."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.layers.router import (
    balance_loss,
    disagreement,
    hash_table,
    load_metrics,
    sqrtsoftplus,
    updated_bias,
)


def test_sqrtsoftplus_value_and_gradient():
    z = np.concatenate(
        [np.linspace(-300, 300, 2001), [-15.0, -14.999, -15.001, 0.0, -88.0, -104.0]]
    )
    z = z.astype(np.float32)
    value, gradient = jax.vmap(jax.value_and_grad(sqrtsoftplus))(jnp.asarray(z))
    double = z.astype(np.float64)
    softplus = np.where(double < -30, np.exp(double), np.logaddexp(0.0, double))
    expected = np.sqrt(softplus)
    sigmoid = np.where(double < 0, np.exp(double), 1.0) / (1.0 + np.exp(-np.abs(double)))
    # Relative: exp(z / 2) has an error of |z| eps / 2 in float32, and vanishes below -174.
    rtol = 1e-6 + np.abs(z) * 6e-8
    np.testing.assert_array_less(np.abs(value - expected), rtol * expected + 1e-37)
    np.testing.assert_array_less(
        np.abs(gradient - sigmoid / (2 * expected)), rtol * expected + 1e-37
    )
    assert np.isfinite(gradient).all() and (gradient >= 0).all()


@pytest.mark.parametrize(("vocab", "experts", "k"), [(1000, 8, 2), (1001, 8, 3), (500, 6, 6)])
@pytest.mark.parametrize("frequency", ["ids", "zipf"])
def test_hash_table(vocab, experts, k, frequency):
    counts = np.ones(vocab) if frequency == "ids" else 1e6 / np.arange(1, vocab + 1) ** 1.1
    table = hash_table(3, counts, experts, k)
    assert table.shape == (vocab, k) and table.dtype == np.int32
    assert table.min() >= 0 and table.max() < experts
    assert all(len(set(row)) == k for row in table)
    load = np.zeros(experts)
    np.add.at(load, table, counts[:, None])
    # No expert is off the mean by more than the heaviest token, which cannot be split.
    assert np.abs(load - load.mean()).max() <= counts.max()
    np.testing.assert_array_equal(hash_table(3, counts, experts, k), table)
    if k < experts:
        assert (hash_table(4, counts, experts, k) != table).any()


def test_balance_loss_is_one_under_uniform_routing():
    chosen = jnp.asarray(np.tile(np.eye(4), (1, 3, 1)))  # each of 4 experts 3 times, K = 1
    valid = jnp.ones((1, 12), bool)
    np.testing.assert_allclose(balance_loss(jnp.ones((1, 12, 4)), chosen, valid, 1), 1.0, rtol=1e-6)


def test_balance_loss_ignores_padding_and_gives_f_no_gradient():
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.random((1, 6, 4)), jnp.float32)
    chosen = jax.nn.one_hot(jnp.asarray([[0, 1, 2, 3, 3, 0]]), 4)
    valid = jnp.asarray([[True] * 4 + [False] * 2])
    padded = balance_loss(scores, chosen * valid[..., None], valid, 1)
    alone = balance_loss(scores[:, :4], chosen[:, :4], valid[:, :4], 1)
    np.testing.assert_allclose(padded, alone, rtol=1e-6)
    assert not jax.grad(balance_loss, argnums=1)(scores, chosen, valid, 1).any()


def test_updated_bias_moves_against_the_load():
    bias = updated_bias(jnp.zeros(4), jnp.asarray([0.0, 2.0, 2.0, 4.0]), 0.001)
    np.testing.assert_allclose(bias, [0.001, 0.0, 0.0, -0.001])


def test_load_metrics_by_hand():
    """Even, all on one of four, half on each of two, none at all; then a stack of layers."""
    loads = [[3, 3, 3, 3], [8, 0, 0, 0], [5, 0, 5, 0], [0, 0, 0, 0], [6, 1, 1, 0]]
    found = load_metrics(jnp.asarray(loads))
    np.testing.assert_allclose(found["load_max"], [1, 4, 2, 0, 3], rtol=1e-6)
    np.testing.assert_array_equal(found["dead_experts"], [0, 3, 2, 4, 1])
    # Of 3/4, 1/8, 1/8 in units of log 4: (3/4 log 4/3 + 1/4 log 8) / log 4.
    last = (0.75 * np.log(4 / 3) + 0.25 * np.log(8)) / np.log(4)
    np.testing.assert_allclose(found["load_entropy"], [1, 0, 0.5, 0, last], rtol=1e-6)
    one = load_metrics(jnp.asarray([7.0]))
    assert (one["load_max"], one["dead_experts"]) == (1, 0)


@pytest.mark.parametrize("padded", [False, True])
def test_disagreement_counts_choices_that_are_not_among_the_live_ones(padded):
    rng = np.random.default_rng(0)
    used, live = (rng.permuted(np.tile(np.arange(6), (2, 7, 1)), axis=-1)[..., :3] for _ in "ab")
    live[0, 0] = used[0, 0][::-1]  # the same in another order
    valid = np.ones((2, 7), bool)
    if padded:
        valid[1, 3:] = False
    other = [set(used[p]) - set(live[p]) for p in np.ndindex(2, 7) if valid[p]]
    expected = sum(map(len, other)) / (3 * len(other))
    assert 0 < expected < 1
    found = disagreement(jnp.asarray(used), jnp.asarray(live), jnp.asarray(valid))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert disagreement(jnp.asarray(used), jnp.asarray(used[..., ::-1]), jnp.asarray(valid)) == 0

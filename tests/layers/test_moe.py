"""The experts' layer: the clamp and its share, ids handed in, and that no token is dropped."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.jax_model import quick_jit
from tests.training import tiny
from v4jax import parallel
from v4jax.layers.context import make_context
from v4jax.layers.experts import MoE

ROWS, LENGTH = 8, 6
CONFIG = tiny.model(n_routed_experts=5, num_experts_per_tok=2, swiglu_limit=0.4)
SEGMENTS = np.ones((ROWS, LENGTH), np.int32)
SEGMENTS[0, 4:] = SEGMENTS[3] = 0


def layer(cfg=CONFIG):
    """(graphdef, state, x [B, T, D]); values large enough that some are beyond the limit."""
    graphdef, state = nnx.split(MoE(cfg, nnx.Rngs(0), "moe", None))
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.2, jnp.float32)  # noqa: E731
    x = jnp.asarray(rng.standard_normal((ROWS, LENGTH, cfg.hidden_size)), jnp.float32)
    return graphdef, jax.tree.map(draw, state), x


def applied(cfg, graphdef, segments=SEGMENTS):
    """(state, x, routes) -> (y, aux)."""

    def run(state, x, routes=None):
        ids = jnp.asarray(segments)
        ctx = dataclasses.replace(make_context(cfg, ids, ids, collect=True), routes=routes)
        return nnx.merge(graphdef, state)(x, ctx)

    return run


def by_hand(cfg, state, x, ids):
    """Float64, a token and an expert at a time: y [B, T, D], and share of clamped values [B, T]."""
    state = jax.tree.map(lambda v: np.asarray(v, np.float64), nnx.to_pure_dict(state))
    gate, experts, shared = state["gate"], state["experts"], state["shared_experts"]
    limit = np.inf if cfg.swiglu_limit is None else cfg.swiglu_limit

    def swiglu(g, u):
        g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
        return g / (1 + np.exp(-g)) * u

    y, clamped = np.zeros(x.shape), np.zeros(x.shape[:2])
    for at in np.ndindex(*x.shape[:2]):
        token = np.asarray(x[at], np.float64)
        scores = np.sqrt(np.logaddexp(0, gate["weight"] @ token))[ids[at]]
        for expert, weight in zip(ids[at], scores / scores.sum(), strict=True):
            g, u = np.split(experts["gate_up_proj"][expert] @ token, 2)
            hidden = experts["down_proj"][expert] @ swiglu(g, u)
            y[at] += cfg.routed_scaling_factor * weight * hidden
            clamped[at] += (g > limit).mean() / 4 + (np.abs(u) > limit).mean() / 4
        g, u = (shared[name]["weight"] @ token for name in ("gate_proj", "up_proj"))
        y[at] += shared["down_proj"]["weight"] @ swiglu(g, u)
    return y, clamped


@pytest.mark.parametrize("limit", [0.4, None])
def test_output_and_clamped_share_are_those_of_the_loop(limit):
    """The share is of valid tokens; of what the gate has below the limit nothing is clamped."""
    cfg = dataclasses.replace(CONFIG, swiglu_limit=limit)
    graphdef, state, x = layer(cfg)
    with jax.default_matmul_precision("highest"):
        y, aux = quick_jit(applied(cfg, graphdef))(state, x)
    expected, clamped = by_hand(cfg, state, x, np.asarray(aux["expert_ids"]))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert ("clamped" in aux) == (limit is not None)
    if limit is not None:
        valid = SEGMENTS > 0
        assert 0.1 < clamped[valid].mean() < 0.6
        np.testing.assert_allclose(aux["clamped"], clamped[valid].mean(), rtol=1e-6)


def some_routes(seed: int) -> np.ndarray:
    """int [B, T, 2]: two experts of five for each token, in any order."""
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(5), (ROWS, LENGTH, 1)), axis=-1)[..., :2]


def test_ids_handed_in_are_visited_with_the_weights_of_now():
    graphdef, state, x = layer()
    routes = some_routes(1)
    run = quick_jit(applied(CONFIG, graphdef))
    with jax.default_matmul_precision("highest"):
        y, aux = run(state, x, jnp.asarray(routes, jnp.int8))
        plain, live = run(state, x)
    np.testing.assert_allclose(y, by_hand(CONFIG, state, x, routes)[0], atol=1e-5)
    assert np.abs(y - plain).max() > 0.1
    valid = SEGMENTS > 0
    load = np.bincount(routes[valid].reshape(-1), minlength=5)
    np.testing.assert_array_equal(aux["expert_load"], load)
    same = [
        len({*routes[at]} & {*np.asarray(live["expert_ids"])[at]})
        for at in zip(*valid.nonzero(), strict=True)
    ]
    np.testing.assert_allclose(aux["disagreement"], 1 - np.sum(same) / (2 * len(same)), rtol=1e-6)
    assert "disagreement" not in live and float(aux["balance_loss"]) != float(live["balance_loss"])


def test_the_live_choice_handed_in_changes_no_bit():
    """Of the output, the aux or a gradient."""
    graphdef, state, x = layer()
    run = applied(CONFIG, graphdef)

    def loss(state, x, routes):
        y, aux = run(state, x, routes)
        return jnp.sum(jnp.sin(y)) + aux["balance_loss"], (y, aux)

    learn = quick_jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, (y, aux)), gradients = learn(state, x, None)
    (_, (y_again, again)), gradients_again = learn(state, x, aux["expert_ids"])
    assert again.pop("disagreement") == 0
    assert tiny.same_bits((y_again, again, gradients_again), (y, aux, gradients))


@pytest.mark.parametrize("text", [None, pytest.param("data=2,fsdp=4", marks=pytest.mark.slow)])
def test_no_token_is_dropped(text):
    """However uneven: every token to the same two experts, or all choices of a device to one."""
    graphdef, state, x = layer()
    everywhere = np.ones_like(SEGMENTS)
    mesh = text and parallel.make_mesh(text)
    run = quick_jit(applied(CONFIG, graphdef, everywhere))
    same = np.broadcast_to(np.array([3, 1]), (ROWS, LENGTH, 2))
    uneven = some_routes(2)
    uneven[:4] = [0, 4]
    if mesh:
        rows = parallel.rows_sharding(mesh)
        state, x = jax.device_put((state, x), (parallel.shardings(state, mesh), rows))
    for routes in (same, uneven):
        with jax.default_matmul_precision("highest"):
            if mesh:
                with jax.set_mesh(mesh):
                    y, aux = run(state, x, jax.device_put(jnp.asarray(routes), rows))
            else:
                y, aux = run(state, x, jnp.asarray(routes))
        load = np.bincount(routes.reshape(-1), minlength=5)
        np.testing.assert_array_equal(aux["expert_load"], load)
        assert np.sum(aux["expert_load"]) == ROWS * LENGTH * 2
        np.testing.assert_allclose(y, by_hand(CONFIG, state, x, routes)[0], atol=1e-5)

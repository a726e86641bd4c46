"""Outliers among the last steps, against a loop over a Python list; the ring of routes."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training import tiny
from v4jax.training import anticipation
from v4jax.training.losses import divergence
from v4jax.training.stability import LEAST, WINDOW, no_steps, unusual

unusual_jit = jax.jit(unusual, static_argnums=1)


def expected(history: list[tuple[float, float]], sigma: float, loss: float, norm: float) -> bool:
    if len(history) < LEAST:
        return False
    columns = np.array(history[-WINDOW:], np.float64).T
    return any(
        x > column.mean() + sigma * column.std(ddof=1)
        for x, column in zip((loss, norm), columns, strict=True)
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([3.0, 6.0]), st.integers(1, 300))
def test_outliers_are_those_of_a_plain_loop(seed, sigma, count):
    rng = np.random.default_rng(seed)
    recent, history = no_steps(), []
    for _ in range(count):
        loss, norm = rng.normal(3, 0.1, 2) + (rng.random(2) < 0.03) * rng.choice([0.2, 5.0])
        if rng.random() < 0.02:
            loss = np.nan
        loss, norm = np.float32(loss), np.float32(norm)
        found, recent = unusual_jit(recent, sigma, loss, norm)
        if np.isnan(loss):
            continue  # neither an outlier nor remembered; the step is left out anyway
        assert bool(found) == expected(history, sigma, loss, norm)
        history.append((float(loss), float(norm)))
    assert int(recent["seen"]) == len(history)


def test_the_ring_returns_what_was_put_for_each_batch_and_shape():
    model = tiny.model()
    ring = anticipation.ring(model, 2, tokens=64)
    assert ring.shape == (3, 2, 64, 2) and ring.dtype == jnp.uint8
    rng = np.random.default_rng(0)
    shapes = {7: (2, 32), 8: (4, 16), 9: (1, 16)}  # 9 fills the beginning only
    ids = {n: rng.integers(0, 4, (2, *shape, 2)) for n, shape in shapes.items()}
    for n in shapes:
        ring = anticipation.put(ring, jnp.int32(n), jnp.asarray(ids[n]))
    for n, shape in shapes.items():
        assert (anticipation.get(ring, jnp.int32(n), shape) == ids[n]).all()


def test_more_experts_than_a_byte_holds():
    ring = anticipation.ring(tiny.model(n_routed_experts=257), 0, tokens=4)
    assert ring.dtype == jnp.uint16


def test_divergence_against_float64():
    rng = np.random.default_rng(0)
    parent, student = rng.normal(0, 3, (2, 5, 7)).astype(np.float32)
    p, q = (np.exp(x.astype(np.float64)) for x in (parent, student))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    found = divergence(jnp.asarray(parent), jnp.asarray(student))
    np.testing.assert_allclose(found, (p * np.log(p / q)).sum(-1), rtol=1e-5)
    # Its gradient moves the student to the parent: q - p; the parent has none.
    grads = jax.grad(lambda *x: divergence(*x).sum(), argnums=(0, 1))(parent, student)
    np.testing.assert_allclose(grads[1], q - p, atol=1e-6)
    assert not np.any(grads[0])

"""Scores and gradients of every implementation against the equation in float64."""

from __future__ import annotations

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas import index_scores
from kernels_pallas.visibility import is_visible, visible_range
from v4jax.numerics import FORMATS, MXFP4, NVFP4, dequantize, quantize

IMPLEMENTATIONS = ("xla", "reference")
# B, T, S, I, J, ratio, offset: one block; blocks and tiles with a rest; a window of a longer row.
SHAPES = {
    "small": (2, 13, 3, 2, 32, 4, 0),
    "blocks": (3, 150, 300, 2, 32, 1, 200),
    "all seen": (1, 40, 270, 3, 64, 2, 600),
}


@pytest.fixture(autouse=True)
def in_blocks(monkeypatch):
    """However few products there are."""
    monkeypatch.setattr(sys.modules["kernels_pallas.index_scores"], "DIRECT", 0)


def operands(name: str, dtype=jnp.float32):
    batch, length, entries, heads, width, ratio, offset = SHAPES[name]
    rng = np.random.default_rng(length)
    shapes = ((batch, length, heads, width), (batch, entries, width), (batch, length, heads))
    q, k, w = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    q = q.at[0, 0].set(0)  # products of 0, where relu has no slope
    g = jnp.asarray(rng.standard_normal((batch, length, entries)), jnp.float32)
    return (q, k, w), g, {"ratio": ratio, "offset": offset}


def segments(batch: int, length: int):
    cuts = [0, length // 7, length // 2, length - length // 9, length]
    ids = np.repeat([1, 2, 3, 0], np.diff(cuts))
    return jnp.asarray(np.stack([ids if b % 2 else ids[::-1] for b in range(batch)]))


def expected(q, k, w, g, first, end):
    """scores, dq, dk, dw in float64; products of exactly 0 have no slope."""
    q, k, w, g = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, w, g))
    visible = np.asarray(is_visible(first, end, k.shape[1]))
    products = np.einsum("BTIJ,BSJ->BTIS", q, k)
    scores = np.einsum("BTIS,BTI->BTS", np.maximum(products, 0), w)
    g = np.where(visible, g, 0)
    slope = np.einsum("BTS,BTI->BTIS", g, w) * (products > 0)
    dq = np.einsum("BTIS,BSJ->BTIJ", slope, k)
    dk = np.einsum("BTIS,BTIJ->BSJ", slope, q)
    dw = np.einsum("BTS,BTIS->BTI", g, np.maximum(products, 0))
    return np.where(visible, scores, -np.inf), dq, dk, dw


def close(actual, exact, tolerance):
    actual, exact = np.asarray(actual.astype(jnp.float32), np.float64), np.asarray(exact)
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(np.isfinite(actual), finite)
    scale = np.abs(exact[finite]).max(initial=1e-30)
    np.testing.assert_allclose(actual[finite], exact[finite], rtol=0, atol=tolerance * scale)


def value_and_gradients(arrays, g, **options):
    def run(*arrays):
        scores, pull = jax.vjp(lambda *x: index_scores(*x, **options), *arrays)
        return scores, *pull(g.astype(scores.dtype))

    return jax.jit(run)(*arrays)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_value_and_gradients(implementation, name, packed):
    arrays, g, options = operands(name)
    batch, length, entries = g.shape
    if packed:
        options = {"ratio": options["ratio"], "segment_ids": segments(batch, length)}
    seen = visible_range(batch, length, entries, **options)
    found = value_and_gradients(arrays, g, implementation=implementation, **options)
    for actual, exact in zip(found, expected(*arrays, g, *seen), strict=True):
        assert actual.dtype == jnp.float32
        close(actual, exact, 2e-6)


@pytest.mark.parametrize(
    ("fmt", "implementation"),
    [
        ("mxfp4", "xla"),
        (MXFP4, "reference"),
        (NVFP4, "xla"),
        ("bf16", "xla"),
        ("bf16", "reference"),
    ],
)
def test_operands_are_rounded_and_gradients_pass(fmt, implementation):
    arrays, g, options = operands("small")
    record = FORMATS.get(fmt) if isinstance(fmt, str) else fmt

    def rounded(x):
        if record is None:
            return x.astype(jnp.bfloat16)
        return dequantize(quantize(x, record))

    q, k, w = arrays
    exact = expected(rounded(q), rounded(k), w, g, *visible_range(*g.shape, **options))
    found = value_and_gradients(arrays, g, qk_format=fmt, implementation=implementation, **options)
    for actual, value in zip(found, exact, strict=True):
        close(actual, value, 2e-6)


def test_few_products_at_once(monkeypatch):
    arrays, g, options = operands("small")
    blocks = value_and_gradients(arrays, g, qk_format="mxfp4", **options)
    monkeypatch.setattr(sys.modules["kernels_pallas.index_scores"], "DIRECT", 1 << 20)
    at_once = value_and_gradients(arrays, g, qk_format="mxfp4", **options)
    for actual, exact in zip(at_once, blocks, strict=True):
        close(actual, exact, 2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_scores_and_operands(implementation):
    arrays, g, options = operands("blocks", jnp.bfloat16)
    options["implementation"] = implementation
    scores = index_scores(*arrays, **options)
    narrow = index_scores(*arrays, score_dtype=jnp.bfloat16, **options)
    assert scores.dtype == jnp.float32 and narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        narrow.astype(jnp.float32), scores.astype(jnp.bfloat16).astype(jnp.float32)
    )
    g = g.astype(jnp.bfloat16)
    found = value_and_gradients(arrays, g, score_dtype=jnp.bfloat16, **options)
    seen = visible_range(*g.shape, options["ratio"], offset=options["offset"])
    for actual, exact in zip(found, expected(*arrays, g, *seen), strict=True):
        assert actual.dtype == jnp.bfloat16
        close(actual, exact, 2**-8)


def test_a_cotangent_where_nothing_is_seen_counts_for_nothing():
    """Be it NaN, as of -inf - -inf."""
    arrays, g, options = operands("small")
    seen = is_visible(*visible_range(*g.shape, **options), g.shape[2])
    poisoned = jnp.where(seen, g, jnp.nan)
    clean = value_and_gradients(arrays, g, **options)
    for actual, exact in zip(value_and_gradients(arrays, poisoned, **options), clean, strict=True):
        np.testing.assert_array_equal(actual, exact)


def test_no_array_over_heads_and_no_residual_but_the_operands():
    arrays, g, options = operands("blocks")
    biggest = g.size
    batch, length, heads, _ = arrays[0].shape

    def sizes(f):
        text = jax.jit(f).lower(*arrays).as_text()
        shapes = re.findall(r"tensor<((?:\d+x)+)[a-z]", text)
        return [int(np.prod([int(n) for n in shape.split("x") if n])) for shape in shapes]

    def loss(*arrays):
        return jnp.sum(jnp.where(jnp.isfinite(s := index_scores(*arrays, **options)), s, 0))

    assert max(sizes(jax.grad(loss, (0, 1, 2)))) == biggest < biggest * heads
    _, pull = jax.vjp(lambda *x: index_scores(*x, **options), *arrays)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pull) if hasattr(leaf, "size"))
    assert kept <= sum(x.size for x in arrays) + 2 * batch * length + 8


def test_transformations():
    arrays, g, options = operands("small")
    stacked = tuple(jnp.stack([x, 2 * x]) for x in arrays)

    def loss(q, k, w):
        scores = index_scores(q, k, w, **options)
        return jnp.sum(jnp.where(jnp.isfinite(scores), scores * g, 0))

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    single = [gradient(*(x[i] for x in stacked)) for i in range(2)]
    expected = [jnp.stack(pair) for pair in zip(*single, strict=True)]
    vmapped = jax.jit(jax.vmap(gradient))(*stacked)
    scanned = jax.lax.map(lambda x: jax.grad(jax.checkpoint(loss), (0, 1, 2))(*x), stacked)
    for actual in (vmapped, scanned):
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    tangents = jax.jvp(
        lambda q: index_scores(q, *arrays[1:], implementation="reference", **options),
        arrays[:1],
        (jnp.ones_like(arrays[0]),),
    )[1]
    assert np.isfinite(np.asarray(tangents)).all()


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_sharded_over_the_batch_nothing_is_gathered(packed):
    (q, k, w), _, _ = operands("blocks")
    q, k, w = (jnp.concatenate([x, x])[:4] for x in (q, k, w))
    ids = segments(4, q.shape[1]) if packed else None

    def loss(q, k, w, ids=ids):
        scores = index_scores(q, k, w, 1, ids)
        return jnp.sum(jnp.where(jnp.isfinite(scores), scores, 0))

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    mesh = Mesh(np.asarray(jax.devices()[:4]), "data")
    split = NamedSharding(mesh, PartitionSpec("data"))
    sharded = tuple(jax.device_put(x, split) for x in (q, k, w))
    compiled = run.lower(*sharded).compile()
    assert "all-gather" not in compiled.as_text()
    value, gradients = run(q, k, w)
    for a, b in zip(jax.tree.leaves(compiled(*sharded)), (value, *gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    if packed:
        return
    data = PartitionSpec("data")
    mapped = jax.shard_map(jax.grad(loss, (0, 1, 2)), mesh=mesh, in_specs=data, out_specs=data)
    for a, b in zip(jax.jit(mapped)(*sharded), gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_no_entries():
    scores = index_scores(jnp.zeros((1, 3, 2, 32)), jnp.zeros((1, 0, 32)), jnp.zeros((1, 3, 2)))
    assert scores.shape == (1, 3, 0)


Q, K, W = jnp.zeros((2, 8, 3, 32)), jnp.zeros((2, 2, 32)), jnp.zeros((2, 8, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": jnp.zeros((2, 2, 16))}, "do not fit: (2, 8, 3, 32), (2, 2, 16), (2, 8, 3)"),
        ({"q": jnp.zeros((2, 8, 3, 32), jnp.int32)}, "q int32, k float32, head_weights float32"),
        ({"ratio": 0}, "ratio=0, allowed: 1 or more"),
        ({"segment_ids": jnp.zeros((2, 7), jnp.int32)}, "segment_ids (2, 7), allowed: [B, T]"),
        (
            {"segment_ids": jnp.zeros((2, 8), jnp.int32), "offset": 4},
            "offset and segment_ids do not go together",
        ),
        ({"qk_format": "fp4"}, "qk_format='fp4', allowed: None, bf16, mxfp4"),
        ({"score_dtype": jnp.float16}, "score_dtype=float16, allowed: float32, bfloat16"),
        ({"implementation": "gpu"}, "needs a GPU, this is cpu; possible: None, xla, reference"),
        ({"implementation": "loop"}, "implementation='loop', allowed: None, "),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message):
    with pytest.raises(ValueError) as error:
        index_scores(**{"q": Q, "k": K, "head_weights": W} | arguments)
    assert str(error.value).startswith("index_scores: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_format_that_does_not_divide():
    with pytest.raises(ValueError, match=r"index_scores: q .*16.*mxfp4: axis -1") as error:
        index_scores(Q[..., :16], K[..., :16], W, qk_format="mxfp4")
    assert "\n" not in str(error.value)

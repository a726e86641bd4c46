"""The fused selection against the two operations that it stands for."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas import index_scores, index_select, select_topk
from kernels_pallas.select_topk import OUTPUTS

# B, T, S, I, J, ratio, offset, top_k. The last one selects in windows of its entries.
SHAPES = {
    "small": (2, 13, 3, 2, 32, 4, 0, 2),
    "more than there are": (2, 13, 3, 2, 32, 4, 0, 5),
    "blocks": (2, 150, 300, 2, 32, 1, 200, 40),
    "few of many": (1, 300, 1100, 1, 32, 2, 0, 3),
    "windows": (1, 600, 1100, 2, 32, 1, 450, 200),
}


@pytest.fixture(autouse=True)
def in_blocks(monkeypatch):
    """However few products there are."""
    monkeypatch.setattr(sys.modules["kernels_pallas.index_scores"], "DIRECT", 0)


def operands(name: str, ties: bool = False):
    batch, length, entries, heads, width, ratio, offset, top_k = SHAPES[name]
    rng = np.random.default_rng(length)
    shapes = ((batch, length, heads, width), (batch, entries, width), (batch, length, heads))
    q, k, w = (rng.standard_normal(shape) for shape in shapes)
    if ties:  # few values, and whole rows of zeros
        q, k, w = np.sign(q) * (rng.random(q.shape) < 0.05), np.round(k), np.round(w)
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in (q, k, w))
    return arrays, top_k, {"ratio": ratio, "offset": offset}


def packed(batch: int, length: int):
    cuts = [0, length // 5, length // 2, length - length // 9, length]
    ids = np.repeat([1, 2, 3, 0], np.diff(cuts))
    return jnp.asarray(np.stack([ids, ids[::-1]][:batch]), jnp.int32)


def both(arrays, top_k, output, by, **options):
    fused = jax.jit(
        lambda *x: index_select(*x, top_k, output=output, implementation=by, **options)
    )(*arrays)
    scores = jax.jit(lambda *x: index_scores(*x, implementation=by, **options))(*arrays)
    return fused, select_topk(scores, top_k, output=output, implementation="reference")


def equal(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_two_operations(name):
    _, top_k, options = operands(name)

    @jax.jit
    def fused(*x):
        return {
            o: index_select(*x, top_k, output=o, implementation="xla", **options) for o in OUTPUTS
        }

    @jax.jit
    def apart(*x):
        scores = index_scores(*x, implementation="xla", **options)
        return {
            o: select_topk(scores, top_k, output=o, implementation="reference") for o in OUTPUTS
        }

    for ties in (False, True):
        arrays = operands(name, ties)[0]
        equal(fused(*arrays), apart(*arrays))


def test_few_products_at_once(monkeypatch):
    monkeypatch.setattr(sys.modules["kernels_pallas.index_scores"], "DIRECT", 1 << 20)
    arrays, top_k, options = operands("small", ties=True)
    equal(*both(arrays, top_k, "indices", "xla", **options))


@pytest.mark.parametrize(
    ("implementation", "name", "fmt", "dtype"),
    [
        ("xla", "windows", "mxfp4", "bfloat16"),
        ("xla", "blocks", "nvfp4", "float32"),
        ("reference", "blocks", "bf16", "bfloat16"),
    ],
)
def test_packed_rows_rounded_operands_and_scores(implementation, name, fmt, dtype):
    arrays, top_k, options = operands(name)
    options = {"ratio": options["ratio"], "segment_ids": packed(*arrays[0].shape[:2])}
    options |= {"qk_format": fmt, "score_dtype": dtype}
    equal(*both(arrays, top_k, "ascending", implementation, **options))


def test_no_tensor_of_all_scores():
    arrays, top_k, options = operands("windows")
    run = jax.jit(lambda *x: index_select(*x, top_k, **options))
    text = run.lower(*arrays).as_text()
    assert "x1100xf32" in text and "600x1100xf32" not in text


@pytest.mark.slow
def test_transformations():
    arrays, top_k, options = operands("small")
    stacked = tuple(jnp.stack([x, -x]) for x in arrays)

    @jax.jit
    def select(q, k, w):
        return index_select(q, k, w, top_k, **options)

    expected = jnp.stack([select(*arrays), select(*(-x for x in arrays))])
    equal(jax.jit(jax.vmap(select))(*stacked), expected)
    equal(jax.lax.map(lambda x: jax.checkpoint(select)(*x), stacked), expected)

    def value(q):
        found = index_select(q, *arrays[1:], top_k, output="threshold", **options)[0]
        return jnp.sum(q) + jnp.sum(jnp.where(jnp.isfinite(found), found, 0))

    np.testing.assert_array_equal(jax.grad(value)(arrays[0]), np.ones(arrays[0].shape))


@pytest.mark.slow
def test_sharded_over_the_batch_nothing_is_gathered():
    arrays, top_k, options = operands("blocks")
    arrays = tuple(jnp.concatenate([x, -x]) for x in arrays)
    mesh = Mesh(np.asarray(jax.devices()[:4]), "data")
    split = PartitionSpec("data")
    sharded = tuple(jax.device_put(x, NamedSharding(mesh, split)) for x in arrays)

    def select(*x):
        return index_select(*x, top_k, **options)

    expected = jax.jit(select)(*arrays)
    compiled = jax.jit(select).lower(*sharded).compile()
    assert "all-gather" not in compiled.as_text()
    equal(compiled(*sharded), expected)
    mapped = jax.shard_map(select, mesh=mesh, in_specs=split, out_specs=split)
    equal(jax.jit(mapped)(*sharded), expected)


def test_no_entries():
    operands = jnp.zeros((1, 3, 2, 32)), jnp.zeros((1, 0, 32)), jnp.zeros((1, 3, 2))
    assert (index_select(*operands, 2) == -1).all()
    assert index_select(*operands, 2, output="mask").shape == (1, 3, 0)


Q, K, W = jnp.zeros((2, 8, 3, 32)), jnp.zeros((2, 2, 32)), jnp.zeros((2, 8, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": K[:1]}, "do not fit: (2, 8, 3, 32), (1, 2, 32), (2, 8, 3)"),
        ({"top_k": 0}, "top_k=0, allowed: an integer, 1 or more"),
        ({"output": "set"}, "output='set', allowed: indices, ascending, mask, threshold"),
        ({"score_dtype": "float16"}, "score_dtype=float16, allowed: float32, bfloat16"),
        ({"implementation": "tpu"}, "needs a TPU, this is cpu; possible: None, xla, reference"),
        (
            {"implementation": "tpu", "interpret": True},
            "output='indices' needs an order by score, which is not made there; possible: None, ",
        ),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message):
    with pytest.raises(ValueError) as error:
        index_select(**{"q": Q, "k": K, "head_weights": W, "top_k": 2} | arguments)
    assert str(error.value).startswith("index_select: ") and message in str(error.value)
    assert "\n" not in str(error.value)

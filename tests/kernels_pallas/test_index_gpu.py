"""The Triton kernels of the indexer against float64 and against sorting.

In Pallas' interpreter; on a GPU as they are, at sizes of real models too.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import index_gpu, select_topk_gpu
from kernels_pallas.fold import fold
from kernels_pallas.select_topk import select_topk
from v4jax.numerics import dequantize, quantize

INTERPRET = jax.default_backend() != "gpu"
# B, T, I, J, S: heads and depths that are no powers of two, tiles of entries not filled, one query.
SHAPES = {
    "heads padded": (2, 9, 3, 32, 70),
    "queries of a program": (1, 33, 16, 64, 64),
    "one query": (2, 1, 4, 96, 200),
}
if not INTERPRET:
    SHAPES["prefill"] = (1, 256, 64, 128, 8192)


def inputs(shape, kind: str):
    """Operands as the kernel takes them, and the q, k, w they stand for, float64."""
    batch, length, heads, depth, entries = SHAPES[shape]
    rng = np.random.default_rng(0)
    q, k = (
        jnp.asarray(rng.standard_normal(s), jnp.float32)
        for s in ((batch, length, heads, depth), (batch, entries, depth))
    )
    w = jnp.asarray(rng.standard_normal((batch, length, heads)), jnp.float32)
    first = rng.integers(0, entries, (batch, length))
    end = np.minimum(entries, first + rng.integers(0, entries, (batch, length)))
    first[0, 0] = end[0, 0] = entries // 2  # sees nothing
    scales = {}
    if kind == "fp8":
        (q, sq, _), (k, sk, _) = fold(quantize(q)), fold(quantize(k))
        scales = {"row_scale_q": sq, "row_scale_k": sk}
        wide = [np.asarray(x, np.float64) * np.asarray(s)[..., None] for x, s in ((q, sq), (k, sk))]
    else:
        q, k = (x.astype(kind) for x in (q, k))
        wide = [np.asarray(x, np.float64) for x in (q, k)]
    first, end = (jnp.asarray(x, jnp.int32) for x in (first, end))
    return (q, k, w, first, end), scales, (*wide, np.asarray(w, np.float64))


def exact_scores(q, k, w, first, end):
    products = np.einsum("BTIJ,BSJ->BTIS", q, k)
    scores = np.einsum("BTIS,BTI->BTS", np.maximum(products, 0), w)
    entry = np.arange(k.shape[1])
    return np.where((first[..., None] <= entry) & (entry < end[..., None]), scores, -np.inf)


CASES = [
    ("heads padded", "fp8", "bfloat16"),
    ("heads padded", "float32", "float32"),
    ("queries of a program", "fp8", "float32"),
    ("queries of a program", "bfloat16", "bfloat16"),
    ("one query", "bfloat16", "float32"),
    ("one query", "fp8", "bfloat16"),
]
if not INTERPRET:
    CASES += [("prefill", "fp8", "bfloat16"), ("prefill", "bfloat16", "float32")]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "kind", "score_dtype"), CASES)
def test_scores(shape, kind, score_dtype):
    args, scales, wide = inputs(shape, kind)
    run = functools.partial(index_gpu.scores, score_dtype=score_dtype, interpret=INTERPRET)
    actual = jax.jit(run)(*args, **scales)
    assert actual.dtype == score_dtype
    actual = np.asarray(actual, np.float64)
    exact = exact_scores(*wide, *map(np.asarray, args[3:]))
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(exact))
    largest = np.abs(exact[np.isfinite(exact)]).max()
    relative = 2**-8 if score_dtype == "bfloat16" else 0
    # On Hopper the FP8 units add with 14 bits or so.
    absolute = 2**-12 if kind == "fp8" and not INTERPRET else 1e-6
    finite = np.isfinite(exact)
    np.testing.assert_allclose(
        actual[finite], exact[finite], rtol=relative, atol=absolute * largest
    )


def test_folded_scores_are_those_of_the_fp4_values():
    args, scales, _ = inputs("queries of a program", "fp8")
    batch, length, heads, depth, entries = SHAPES["queries of a program"]
    rng = np.random.default_rng(0)
    q, k = (
        np.asarray(dequantize(quantize(jnp.asarray(rng.standard_normal(s), jnp.float32))))
        for s in ((batch, length, heads, depth), (batch, entries, depth))
    )
    exact = exact_scores(*(np.asarray(x, np.float64) for x in (q, k, args[2])), *args[3:])
    actual = index_gpu.scores(*args, **scales, score_dtype="float32", interpret=INTERPRET)
    finite = np.isfinite(exact)
    tolerance = 1e-6 if INTERPRET else 2**-12
    scale = np.abs(exact[finite]).max()
    np.testing.assert_allclose(np.asarray(actual)[finite], exact[finite], atol=tolerance * scale)


ROWS = {
    "random": lambda rng, n: rng.standard_normal(n),
    "ties": lambda rng, n: np.round(2 * rng.standard_normal(n)),
    "equal": lambda rng, n: np.full(n, 0.5),
    "zeros": lambda rng, n: np.where(rng.random(n) < 0.5, 0.0, -0.0),
    "few": lambda rng, n: np.where(np.arange(n) % 9 == 4, 1.0, -np.inf),
    "eight": lambda rng, n: np.where(np.arange(n) % (n // 8) == 1, rng.random(n), -np.inf),
    "nothing": lambda rng, n: np.full(n, -np.inf),
    "nan": lambda rng, n: np.where(rng.random(n) < 0.3, np.nan, rng.standard_normal(n)),
    "negative nan": lambda rng, n: np.where(rng.random(n) < 0.3, -np.nan, -rng.random(n)),
    "infinite": lambda rng, n: np.where(rng.random(n) < 0.1, np.inf, rng.standard_normal(n)),
    "small": lambda rng, n: rng.standard_normal(n) * 2.0**-120,
    "large": lambda rng, n: rng.standard_normal(n) * 2.0**120,
    "neighbours": lambda rng, n: (
        (1 + rng.integers(0, n, n) * 2.0**-23) * np.sign(rng.random(n) - 0.5)
    ),
}


def rows(size: int) -> np.ndarray:
    rng = np.random.default_rng(size)
    return np.stack([make(rng, size) for make in ROWS.values()]).astype(np.float32)


@pytest.mark.parametrize("output", ["indices", "ascending", "mask", "threshold"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
# The last three go through two rounds, the second of them with parts that are not filled.
@pytest.mark.parametrize(
    ("size", "top_k"),
    [
        (40, 8),
        pytest.param(64, 64, marks=pytest.mark.slow),
        pytest.param(50, 60, marks=pytest.mark.slow),
        pytest.param(256, 16, marks=pytest.mark.slow),
        (300, 20),
        (700, 31),
    ],
)
def test_selection(size, top_k, dtype, output, monkeypatch):
    monkeypatch.setattr(select_topk_gpu, "WIDTH", 64)
    scores = jnp.asarray(rows(size), dtype)
    run = functools.partial(index_gpu.select, top_k=top_k, output=output, interpret=INTERPRET)
    actual = jax.jit(lambda s: run(s))(scores)
    exact = select_topk(scores, top_k, output=output, implementation="reference")
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(exact), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.skipif(INTERPRET, reason="sizes of real models need a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "top_k"), [(8192, 512), (65536, 1024)])
def test_selection_of_real_sizes(size, top_k, dtype):
    scores = jnp.asarray(np.resize(rows(size), (64, size)), dtype)
    actual = index_gpu.select(scores, top_k, output="indices")
    exact = select_topk(scores, top_k, implementation="reference")
    np.testing.assert_array_equal(actual, exact)


def test_leading_axes_and_no_rows():
    scores = jnp.asarray(rows(40)[:6]).reshape(2, 3, 40)
    for shape in ((2, 3, 40), (0, 3, 40), (2, 3, 0)):
        part = scores[: shape[0], :, : shape[2]]
        for output, expected in (("indices", (*shape[:2], 8)), ("mask", shape)):
            out = index_gpu.select(part, 8, output=output, interpret=INTERPRET)
            assert out.shape == expected
            by = select_topk(part, 8, output=output, implementation="reference")
            np.testing.assert_array_equal(out, by)


def test_a_top_k_too_large_is_refused():
    with pytest.raises(ValueError, match="select_topk: gpu: top_k=20000, allowed: at most 16384"):
        index_gpu.select(jnp.zeros((1, 50000)), 20000, output="mask")


@pytest.mark.parametrize("output", ["indices", "mask", "threshold"])
def test_blocks_of_queries(output, monkeypatch):
    """The blocks of index_select, against both kernels at once; the last block is not full."""
    args, scales, _ = inputs("queries of a program", "fp8")
    both = {"score_dtype": "bfloat16", "interpret": INTERPRET}
    made = index_gpu.scores(*args, **scales, **both)
    exact = index_gpu.select(made, 12, output=output, interpret=INTERPRET)
    monkeypatch.setattr(index_gpu, "L2", made.nbytes // 33 * 16)
    actual = index_gpu.index_select(*args, 12, output=output, **scales, **both)
    jax.tree.map(np.testing.assert_array_equal, actual, exact)

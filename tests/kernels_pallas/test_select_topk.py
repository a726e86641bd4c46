"""Every selection against a stable sort in numpy: the exact set, in the exact order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import select_topk
from kernels_pallas.select_topk import OUTPUTS, favours_top_k

INF, NAN, TINY = float("inf"), float("nan"), 2.0**-133  # TINY: subnormal, in bfloat16 too
VALUES = [0.0, -0.0, 1.0, -1.0, 1.0 + 2**-20, 2.0, TINY, -TINY, 3e38, -3e38, INF, -INF, NAN, -NAN]
IMPLEMENTATIONS = ("bisection", "top_k", "reference")


def expected(scores: np.ndarray, k: int) -> np.ndarray:
    """int [R, k], best first, then -1: by comparing numbers, in float64."""
    found = np.full((len(scores), k), -1)
    for row, values in zip(found, scores.astype(np.float64), strict=True):
        visible = [s for s in range(len(values)) if values[s] > -INF]
        best = sorted(visible, key=lambda s: -values[s])[:k]  # a stable sort
        row[: len(best)] = best
    return found


def check(scores, k: int, implementation: str | None):
    """All outputs of one implementation."""
    scores = jnp.asarray(scores)
    rows = np.asarray(scores.astype(jnp.float32))
    best = expected(rows, k)
    found = {o: _run(scores, k, o, implementation) for o in OUTPUTS}
    assert found["indices"].dtype == found["ascending"].dtype == jnp.int32
    np.testing.assert_array_equal(found["indices"], best)
    size = rows.shape[1]
    ascending = np.sort(np.where(best < 0, size, best), axis=1)
    np.testing.assert_array_equal(found["ascending"], np.where(ascending < size, ascending, -1))
    mask = np.zeros(rows.shape, bool)
    for row, indices in zip(mask, best, strict=True):
        row[indices[indices >= 0]] = True
    np.testing.assert_array_equal(found["mask"], mask)
    value, last = (np.asarray(x) for x in found["threshold"])
    assert value.dtype == scores.dtype and last.dtype == np.int32
    value, last = value.astype(np.float64)[:, None], last[:, None]
    exact = rows.astype(np.float64)
    again = (exact > value) | ((exact == value) & (np.arange(size) <= last))
    np.testing.assert_array_equal(again, mask)
    few = (rows > -INF).sum(axis=1) <= k
    assert (value[few] == -INF).all() and (last[few] == -1).all()


_run = jax.jit(
    lambda scores, k, output, by: select_topk(scores, k, output=output, implementation=by),
    static_argnums=(1, 2, 3),
)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    st.lists(st.lists(st.sampled_from(VALUES), min_size=7, max_size=7), min_size=3, max_size=3),
    st.sampled_from([1, 3, 7, 9]),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from(IMPLEMENTATIONS),
)
def test_against_a_stable_sort(rows, k, dtype, implementation):
    check(np.asarray(rows, np.float32).astype(jnp.dtype(dtype)), k, implementation)


def kinds(rng, rows: int, size: int) -> dict[str, np.ndarray]:
    normal = rng.standard_normal((rows, size)).astype(np.float32)
    causal = np.where(np.arange(size) < np.arange(rows)[:, None] * size // rows, normal, -INF)
    return {
        "normal": normal,
        "few values": np.round(normal * 2) / 2,
        "all equal": np.full_like(normal, 0.5),
        "half invisible": np.where(rng.random((rows, size)) < 0.5, normal, -INF),
        "causal": causal.astype(np.float32),
        "37 visible": np.where(np.arange(size) % 8 == 4, normal, -INF),
        "nothing": np.full_like(normal, -INF),
        "upper halves equal": (1 + rng.integers(0, 100, (rows, size)) * 2.0**-23),
        "zeros of both signs": np.where(rng.random((rows, size)) < 0.5, 0.0, -0.0),
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_many_blocks(implementation, dtype):
    """More rows than a block, not a multiple of it; entries no multiple of the lanes."""
    rng = np.random.default_rng(0)
    for scores in kinds(rng, 70, 300).values():
        check(scores.astype(np.float32).astype(jnp.dtype(dtype)), 37, implementation)


@pytest.mark.parametrize(("size", "k"), [(1, 1), (2, 1), (129, 128), (300, 300), (300, 400)])
def test_small_and_full_selections(size, k):
    rng = np.random.default_rng(size)
    for name, scores in kinds(rng, 5, size).items():
        if name in ("normal", "few values", "half invisible"):
            check(scores.astype(np.float32), k, "bisection")


def test_more_entries_than_16_bits_count():
    scores = jnp.asarray(np.random.default_rng(1).integers(0, 9, (2, 40_000)), jnp.float32)
    check(scores, 20_000, "bisection")


def test_as_many_entries_as_16_bits_count():
    """All of them selected: the largest count of all is one more than the largest place."""
    for size in (0x7FFF, 0x8000, 0x8001):
        found = select_topk(jnp.zeros((1, size)), size, implementation="bisection")
        np.testing.assert_array_equal(found[0], np.arange(size))


def test_more_indices_than_the_sort_takes_are_refused_or_sorted_otherwise():
    scores = jnp.asarray(np.random.default_rng(2).permutation(70_000)[None], jnp.float32)
    best = np.argsort(-np.asarray(scores), axis=1)[:, :66_000]
    np.testing.assert_array_equal(select_topk(scores, 66_000), best)
    with pytest.raises(ValueError, match="'indices' of top_k=66000, allowed: at most 65536"):
        select_topk(scores, 66_000, implementation="bisection")


def test_none_takes_the_faster_one():
    assert favours_top_k(2048, 16, "indices") and not favours_top_k(2048, 512, "indices")
    assert favours_top_k(2048, 4, "mask") and not favours_top_k(2048, 64, "mask")
    for k in (2, 37):
        check(np.random.default_rng(0).standard_normal((3, 300)).astype(np.float32), k, None)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_transformations(implementation):
    """Any leading axes; vmap, scan and remat; no gradient."""
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5, 40)), jnp.float32)

    def select(x):
        return select_topk(x, 7, implementation=implementation)

    whole = jax.jit(select)(scores)
    np.testing.assert_array_equal(
        np.asarray(whole).reshape(-1, 7), expected(np.asarray(scores).reshape(-1, 40), 7)
    )
    np.testing.assert_array_equal(select(scores[0, 0, 0]), whole[0, 0, 0])
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.vmap(select)))(scores), whole)
    np.testing.assert_array_equal(jax.lax.map(jax.checkpoint(select), scores), whole)

    def best(x):
        value, _ = select_topk(x, 7, output="threshold", implementation=implementation)
        return jnp.sum(x) + jnp.sum(value)

    np.testing.assert_array_equal(jax.grad(best)(scores), np.ones(scores.shape))


def test_no_scores_at_all():
    for output, shape in (("indices", (3, 2)), ("ascending", (3, 2)), ("mask", (3, 0))):
        found = select_topk(jnp.zeros((3, 0)), 2, output=output)
        assert found.shape == shape and (output == "mask" or (found == -1).all())
    value, last = select_topk(jnp.zeros((3, 0)), 2, output="threshold")
    assert (value == -INF).all() and (last == -1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": jnp.zeros(())}, "select_topk: scores (), allowed: [..., S]"),
        (
            {"scores": jnp.zeros(3, jnp.float16)},
            "select_topk: scores of float16, allowed: float32, bfloat16",
        ),
        ({"top_k": 0}, "select_topk: top_k=0, allowed: an integer, 1 or more"),
        (
            {"output": "set"},
            "select_topk: output='set', allowed: indices, ascending, mask, threshold",
        ),
        ({"implementation": "gpu"}, "cannot run: needs a GPU, this is cpu; possible: None, bisec"),
        ({"implementation": "sort"}, "implementation='sort', allowed: None, gpu, bisection, top_k"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message):
    with pytest.raises(ValueError) as error:
        select_topk(**{"scores": jnp.zeros((2, 3)), "top_k": 2} | arguments)
    assert message in str(error.value) and "\n" not in str(error.value)

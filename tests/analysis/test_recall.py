"""Recall and mass of index selections: against loops that say the same."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from tests import reference
from tests.numerics import brute_force
from v4jax.analysis import recall
from v4jax.analysis.recall import Kept, all_comparisons, keeps

T, C, RATIO = 20, 9, 2


def exact_operands(seed, b=2, i=3, j=64):
    """q, k, w: small dyadic numbers, so that float32 is exact and many scores are equal, and 64
    channels, so that the Hadamard matrix is exact too."""
    rng = np.random.default_rng(seed)
    q = rng.integers(-2, 3, (b, T, i, j)) * (rng.random((b, T, i, j)) < 0.2)
    k = rng.integers(-2, 3, (b, C, j)) * (rng.random((b, C, j)) < 0.2)
    k[:, C // 2] = k[:, 1]
    w = rng.choice([-1, -0.5, 0.25, 1, 2], (b, T, i))
    return q.astype(np.float32), k.astype(np.float32), w.astype(np.float32)


def fp4(x, rotate: bool) -> np.ndarray:
    """MXFP4 of one vector of 64, rotated before by Sylvester's matrix from parities of indices."""
    signs = [[(-1) ** (m & n).bit_count() for n in range(64)] for m in range(64)]
    x = np.array(signs) @ x / 8 if rotate else x
    return brute_force.quantize(np.asarray(x, np.float32), "mxfp4").values


def scores_by_hand(q, k, w, scoring) -> list[float]:
    """Of one query q [I, J], w [I] with keys k [C, J]."""
    if scoring.query == "bf16":
        q, k = (x.astype(ml_dtypes.bfloat16).astype(np.float64) for x in (q, k))
    elif scoring.query is not None:
        q, k = (np.array([fp4(row, scoring.rotate) for row in x]) for x in (q, k))
    found = [sum(w[i] * max(float(q[i] @ key), 0.0) for i in range(len(w))) / 8 for key in k]
    return [float(ml_dtypes.bfloat16(s)) for s in found] if scoring.scores != "float32" else found


def kept_by_hand(q, k, w, visible: int, top_k: int, of, against) -> tuple[float, float]:
    """(recall, mass) of one query that sees the first `visible` entries; NaN if it counts not."""
    if visible <= top_k:
        return math.nan, math.nan
    a, b = (scores_by_hand(q, k, w, scoring)[:visible] for scoring in (of, against))
    best_a, best_b = (set(reference.top_k(scores, top_k)) for scores in (a, b))
    p = np.exp(b)
    return len(best_a & best_b) / top_k, sum(p[list(best_a)]) / sum(p[list(best_b)])


@pytest.mark.parametrize("top_ks", [(1, 4), (6,)])
def test_all_comparisons_against_brute_force(top_ks):
    q, k, w = exact_operands(sum(top_ks))
    q += np.where(q == 2, 2**-9, 0).astype(np.float32)  # BF16 loses it
    compared = all_comparisons()
    found = keeps((q, k, w), RATIO, top_ks, compared)
    assert list(found) == list(top_ks)
    for top_k in top_ks:
        for name, of, against in compared:
            wanted = [
                [
                    kept_by_hand(q[b, t], k[b], w[b, t], (t + 1) // RATIO, top_k, of, against)
                    for t in range(T)
                ]
                for b in range(2)
            ]
            wanted = np.moveaxis(np.minimum(wanted, np.inf), -1, 0)
            np.testing.assert_allclose(found[top_k][name], wanted, rtol=1e-5, err_msg=name)
            assert np.isnan(wanted).any() and np.isfinite(wanted).any()
            assert np.nanmax(wanted) <= 1 + 1e-12
        assert np.nanmin(found[top_k]["qk"].recall) < 1  # FP4 does change selections here


def test_a_query_at_an_offset_sees_all_entries():
    found = keeps(exact_operands(0), RATIO, (4,), recall.comparisons(), offset=RATIO * C)
    assert np.isfinite(found[4]["qk"].recall).all() and np.isfinite(found[4]["score"].mass).all()


def test_a_selection_keeps_all_of_itself():
    scoring = recall.Scoring()
    compared = (recall.Comparison("same", scoring, scoring),)
    found = keeps(exact_operands(1), RATIO, (3,), compared)[3]["same"]
    assert np.nanmin(found.recall) == np.nanmin(found.mass) == np.nanmax(found.mass) == 1


def test_the_table():
    nan = math.nan
    counted = np.array([[True, True, True], [True, True, False]])
    first = np.array([[nan, 0.5, 1.0], [0.25, 1.0, 0.0]])  # the last one is not counted
    second = np.array([[nan, 1.0, 1.0], [0.75, 0.5, 0.0]])
    none = np.full((2, 3), nan)
    layers = [{"qk": Kept(x, x**2), "score": Kept(none, none)} for x in (first, second)]
    values = np.array([0.5, 1.0, 0.25, 1.0, 1.0, 1.0, 0.75, 0.5])
    assert recall.table(layers, counted) == {
        "qk": {
            "mean": 0.75,
            "min": 0.25,
            "p5": float(np.percentile(values, 5)),
            "per_layer": [0.6875, 0.8125],
            "per_layer_min": [0.25, 0.5],
            "per_layer_p5": [float(np.percentile(v, 5)) for v in (values[:4], values[4:])],
            "queries": 8,
            "mass": {
                "mean": float((values**2).mean()),
                "min": 0.0625,
                "p5": float(np.percentile(values**2, 5)),
            },
        },
        "score": None,
    }
    assert recall.table([], counted) == {}
    assert recall.table(layers)["qk"]["min"] == 0.0

"""Index queries and keys of made-up data: what a selection must cope with, without a model.

Random data are the worst case: no gap in the scores sets the best entries apart.
"""

import numpy as np

KINDS = {
    "gaussian": "q, k and head weights normal",
    "positive": "the same, head weights above 0",
    "outliers": "the same as gaussian, 4 channels of q and k 20 times as large",
    "clustered": "each key and query head one of 64 normal centres, plus 0.1 of a normal vector",
    "near_duplicates": "keys in groups of 8, each the group's normal vector plus 0.02 of another",
}
"""Name -> what it is."""

Operands = tuple[np.ndarray, np.ndarray, np.ndarray]


def operands(
    kind: str, queries: int, entries: int, heads: int = 16, width: int = 128, seed: int = 0
) -> Operands:
    """q [1, T, I, J], k [1, C, J], w [1, T, I], float32; `kind` is one of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"synthetic data: unknown kind {kind!r}, allowed: {', '.join(KINDS)}")
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    q, k = rng.standard_normal((queries, heads, width)), rng.standard_normal((entries, width))
    w = rng.standard_normal((queries, heads))
    if kind == "positive":
        w = np.abs(w)
    elif kind == "outliers":
        loud = np.where(np.arange(width) < 4, 20, 1)[rng.permutation(width)]
        q, k = q * loud, k * loud
    elif kind == "clustered":
        centres = rng.standard_normal((64, width))
        q = centres[rng.integers(0, 64, (queries, heads))] + 0.1 * q
        k = centres[rng.integers(0, 64, entries)] + 0.1 * k
    elif kind == "near_duplicates":
        groups = rng.standard_normal((-(-entries // 8), width))
        k = np.repeat(groups, 8, axis=0)[rng.permutation(8 * len(groups))[:entries]] + 0.02 * k
    q, k, w = (x.astype(np.float32) for x in (q, k, w * heads**-0.5))
    return q[None], k[None], w[None]

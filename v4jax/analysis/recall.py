"""How much of the best selection of index entries a cheaper one keeps.

    recall of a against b   |top-k of a  intersect  top-k of b| / k
    mass of a against b     sum of p over the top-k of a / sum of p over the top-k of b,
                            p = softmax of b's scores over the visible entries

Over queries with more than k visible entries, lowest index first among equal scores in both. The
report gives a recall but does not define it; this is our definition. Its claim (5.2.1) is about
BF16 scores; what FP4 query and key cost is told apart from that:

    R_qk      a: FP4 query and key        b: the same activations unrounded    float32 scores both
    R_score   a: BF16 scores              b: float32 scores                    same operands both

The mass may be taken of scores below 0 too. It is what the indexer itself says about attention:
its loss trains the softmax of its scores towards the attention that its layer gives the entries.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels_pallas import index_scores, select_topk
from v4jax.numerics import MXFP4, Format, fake_quantize, hadamard


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How scores arise from query and key.

    query, key: a format, "bf16", or None: as they are. rotate: by the Hadamard matrix before that.
    scores: "float32" or "bfloat16".
    """

    query: Format | str | None = None
    key: Format | str | None = None
    rotate: bool = False
    scores: str = "float32"

    def __call__(self, operands: tuple[Array, Array, Array], ratio: int, offset: int = 0) -> Array:
        """q [B, T, I, J], k [B, C, J], w [B, T, I] -> scores [B, T, C], -inf where not visible."""
        q, k, w = operands
        if self.rotate:
            q, k = hadamard(q), hadamard(k)
        return index_scores(
            _rounded(q, self.query),
            _rounded(k, self.key),
            w * q.shape[-1] ** -0.5,
            ratio,
            score_dtype=self.scores,
            offset=offset,
        )


def _rounded(x: Array, fmt: Format | str | None) -> Array:
    if fmt == "bf16":  # not a cast there and back, which a compiler may drop
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x if fmt is None else fake_quantize(x, fmt)


class Comparison(NamedTuple):
    """The selection by `of` against that by `against`."""

    name: str
    of: Scoring
    against: Scoring


def comparisons(query: Format = MXFP4, key: Format = MXFP4) -> tuple[Comparison, ...]:
    """The two recalls with the formats of query and key, as the model rounds them: rotated."""
    exact, rotated = Scoring(), Scoring(query, key, rotate=True)
    bf16 = dataclasses.replace(rotated, scores="bfloat16")
    return Comparison("qk", rotated, exact), Comparison("score", bf16, rotated)


def all_comparisons(query: Format = MXFP4, key: Format = MXFP4) -> tuple[Comparison, ...]:
    """Those, each of them without the rotation, both roundings at once, and each to BF16 alone."""
    (_, rotated, exact), (_, both, _) = comparisons(query, key)
    plain = Scoring(query, key)
    return (
        *comparisons(query, key),
        Comparison("qk_unrotated", plain, exact),
        Comparison("score_unrotated", dataclasses.replace(plain, scores="bfloat16"), plain),
        Comparison("both", both, exact),
        Comparison("score_alone", Scoring(scores="bfloat16"), exact),
        Comparison("qk_bf16", Scoring("bf16", "bf16"), exact),
    )


class Kept(NamedTuple):
    """recall and mass of one comparison, NaN for queries that do not count."""

    recall: Array | np.ndarray
    mass: Array | np.ndarray


Keeps = dict[int, dict[str, Kept]]
"""k -> name of the comparison -> what is kept, each [B, T]."""


@functools.partial(jax.jit, static_argnames=("ratio", "top_ks", "compared", "offset"))
def keeps(
    operands: tuple[Array, Array, Array],
    ratio: int,
    top_ks: tuple[int, ...],
    compared: tuple[Comparison, ...],
    offset: int = 0,
) -> Keeps:
    """What each comparison keeps for each k.

    operands: q [B, T, I, J], k [B, C, J], w [B, T, I], unrounded. ratio, offset: which entries are
    visible to a query, as `kernels_pallas.index_scores` says.
    """
    scorings = {scoring for one in compared for scoring in (one.of, one.against)}
    scores = {scoring: scoring(operands, ratio, offset) for scoring in scorings}
    mass = {s: jax.nn.softmax(x, -1, where=x > -jnp.inf) for s, x in scores.items()}
    found: Keeps = {}
    for top_k in top_ks:
        chosen = {s: select_topk(x, top_k, output="mask") for s, x in scores.items()}
        found[top_k] = {
            name: _kept(chosen[a], chosen[b], scores[b] > -jnp.inf, mass[b], top_k)
            for name, a, b in compared
        }
    return found


def _kept(a: Array, b: Array, visible: Array, mass: Array, top_k: int) -> Kept:
    counts = jnp.sum(visible, axis=-1) > top_k
    best = jnp.sum(mass, axis=-1, where=b)
    shares = jnp.sum(a & b, axis=-1) / top_k, jnp.sum(mass, axis=-1, where=a) / best
    return Kept(*(jnp.where(counts, share, jnp.nan) for share in shares))


def table(layers: Sequence[Mapping[str, Kept]], counted: np.ndarray | None = None) -> dict:
    """Comparison -> mean, minimum and 5th percentile over queries, in all and per layer.

    layers: what each layer keeps at one k, [W, T] each. counted: bool [W, T], the queries that are
    real. A comparison is None where no query has more than k visible entries.
    """
    found: dict[str, dict | None] = {}
    for name in layers[0] if layers else ():
        of_layers = [_finite(layer[name].recall, counted) for layer in layers]
        recall = np.concatenate(of_layers)
        if not len(recall):
            found[name] = None
            continue
        mass = np.concatenate([_finite(layer[name].mass, counted) for layer in layers])
        found[name] = {
            "mean": float(recall.mean()),
            "min": float(recall.min()),
            "p5": float(np.percentile(recall, 5)),
            "per_layer": [float(values.mean()) for values in of_layers],
            "per_layer_min": [float(values.min()) for values in of_layers],
            "per_layer_p5": [float(np.percentile(values, 5)) for values in of_layers],
            "queries": len(recall),
            "mass": {
                "mean": float(mass.mean()),
                "min": float(mass.min()),
                "p5": float(np.percentile(mass, 5)),
            },
        }
    return found


def _finite(values, counted: np.ndarray | None) -> np.ndarray:
    """The values of queries that count, float64 [n]."""
    values = np.asarray(values, np.float64)
    values = values.ravel() if counted is None else values[counted]
    return values[np.isfinite(values)]

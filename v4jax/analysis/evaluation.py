"""What a model does on held-out text: loss, index recall, router agreement; and how sure that is.

Every arm is measured on the same windows in the same order, so that arms are compared in pairs.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from v4jax.layers.context import IndexFormats
from v4jax.layers.indexer import index_scores, select
from v4jax.quantization import NO_QUANTIZATION, Quantization, quantize_params, resolve
from v4jax.training.data import EvalWindows
from v4jax.training.step import Program


class Evaluator:
    """Evaluates parameter sets of one program on one set of windows, `batch_size` at a time."""

    def __init__(self, program: Program, windows: EvalWindows, batch_size: int):
        self.program, self.windows, self.batch_size = program, windows, batch_size
        self._nll = jax.jit(self._batch_nll, static_argnums=0)
        self._choices = jax.jit(self._batch_choices, static_argnums=0)

    def _batches(self, count: int | None):
        """Padded batches of the first `count` windows, and how many rows of each are real."""
        tokens, mask = self.windows.tokens[:count], self.windows.mask[:count]
        for start in range(0, len(tokens), self.batch_size):
            rows, real = (
                tokens[start : start + self.batch_size],
                mask[start : start + self.batch_size],
            )
            pad = ((0, self.batch_size - len(rows)), (0, 0))
            yield np.pad(rows, pad), np.pad(real, pad), len(rows)

    def _rounded(self, params, quantization: Quantization):
        resolved = resolve(quantization, params)
        return quantize_params(params, resolved.weights), resolved.index

    def _batch_nll(self, index, params, variables, tokens, mask):
        logits = self.program.bind(params, variables, index)(tokens[:, :-1]).logits
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.sum(nll * mask, axis=1)

    def nll(self, params, variables, quantization=NO_QUANTIZATION, count=None) -> np.ndarray:
        """Negative log-likelihood of each window, nats summed over its counted tokens: float64 [W].

        The forward pass is exactly the one that training under `quantization` runs. count: only
        the first so many windows.
        """
        rounded, index = self._rounded(params, quantization)
        sums = [
            np.asarray(self._nll(index, rounded, variables, tokens, mask), np.float64)[:real]
            for tokens, mask, real in self._batches(count)
        ]
        return np.concatenate(sums)

    def _batch_choices(self, index, params, variables, tokens):
        out = self.program.bind(params, variables, index)(tokens[:, :-1], collect=True)
        layers = out.aux["layers"]
        top_k = self.program.config.index_topk
        recalls = [_recall(layer["index"], index, top_k) for layer in layers if "index" in layer]
        return recalls, [layer["expert_ids"] for layer in layers]

    def choices(self, params, variables, quantization, count: int) -> "Choices":
        """What the first `count` windows make the indexers and routers choose."""
        rounded, index = self._rounded(params, quantization)
        recalls, ids, masks = [], [], []
        for tokens, mask, real in self._batches(count):
            batch = self._choices(index, rounded, variables, tokens)
            batch = jax.tree.map(lambda x, real=real: np.asarray(x)[:real], batch)
            recalls.append(batch[0])
            ids.append(batch[1])
            masks.append(mask[:real])
        join = lambda *parts: np.concatenate(parts)  # noqa: E731
        return Choices(
            recalls=jax.tree.map(join, *recalls),
            expert_ids=jax.tree.map(join, *ids),
            mask=np.concatenate(masks),
        )


class Choices(NamedTuple):
    """recalls: a dict for each CSA layer of float [W, T], NaN for queries that do not count.
    expert_ids: int [W, T, K] for each layer. mask: bool [W, T], counted tokens."""

    recalls: list[dict[str, np.ndarray]]
    expert_ids: list[np.ndarray]
    mask: np.ndarray


def _recall(collected: dict, formats: IndexFormats, top_k: int) -> dict[str, jax.Array]:
    """Recalls of one CSA layer, each [B, T], NaN where no more than top_k entries are visible.

    qk: selection from FP4 query and key against that from the same activations unrounded, both
    with float32 scores. score: BF16 scores against float32 scores of the same FP4 operands.
    """
    operands, visible = collected["operands"], collected["visible"]
    rounded = dataclasses.replace(formats, scores=None)
    exact = index_scores(operands)
    coarse = index_scores(operands, rounded)
    bf16 = index_scores(operands, dataclasses.replace(rounded, scores="bf16"))
    counts = jnp.sum(visible, axis=-1) > top_k
    chosen = {
        name: select(scores, visible, top_k)
        for name, scores in (("exact", exact), ("coarse", coarse), ("bf16", bf16))
    }

    def share(a, b):
        both = jnp.sum(chosen[a] & chosen[b], axis=-1) / top_k
        return jnp.where(counts, both, jnp.nan)

    return {"qk": share("coarse", "exact"), "score": share("bf16", "coarse")}


def recall_table(choices: Choices) -> dict[str, dict | None]:
    """`qk` and `score` -> mean, minimum and 5th percentile over queries, in all and per layer.

    |top-k of one  intersect  top-k of the other| / k over queries with more than k visible
    entries, lowest index first among equal scores. The report does not define its recall; this is
    our definition. None where no query has more than k visible entries.
    """
    found: dict[str, dict | None] = {}
    for name in ("qk", "score"):
        layers = [layer[name][choices.mask] for layer in choices.recalls]
        layers = [values[np.isfinite(values)] for values in layers]
        every = np.concatenate(layers) if layers else np.zeros(0)
        if not len(every):
            found[name] = None
            continue
        found[name] = {
            "mean": float(every.mean()),
            "min": float(every.min()),
            "p5": float(np.percentile(every, 5)),
            "per_layer": [float(values.mean()) for values in layers],
            "per_layer_min": [float(values.min()) for values in layers],
            "per_layer_p5": [float(np.percentile(values, 5)) for values in layers],
            "queries": len(every),
        }
    return found


def router_agreement(a: Choices, b: Choices, layers: list[int]) -> dict:
    """Share of expert choices in common, |ids_a intersect ids_b| / K: mean, and per given layer."""
    shares = []
    for layer in layers:
        same = a.expert_ids[layer][..., :, None] == b.expert_ids[layer][..., None, :]
        shares.append(float(np.mean(np.any(same, axis=-1)[a.mask])))
    return {"mean": float(np.mean(shares)) if shares else None, "per_layer": shares}


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with a 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0 <= self.high


class Paired:
    """Paired comparisons on the same windows: nats a token, resampling whole documents.

    Documents are resampled, not windows, as windows of one document are not independent.
    """

    RESAMPLES = 2000

    def __init__(self, windows: EvalWindows, count: int | None = None, seed: int = 0):
        _, document = np.unique(windows.document[:count], return_inverse=True)
        self._document, documents = document, int(document.max()) + 1
        tokens = windows.mask[:count].sum(axis=1)
        self._tokens = np.bincount(document, tokens, documents)
        rng = np.random.default_rng(seed)
        self._weights = rng.multinomial(documents, [1 / documents] * documents, self.RESAMPLES)
        self.documents = documents

    def _by_document(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self._document, values, len(self._tokens))

    def difference(self, a: np.ndarray, b: np.ndarray) -> Interval:
        """a - b, nats a token; a, b: nats summed over each window, [W]."""
        d = self._by_document(a - b)
        samples = (self._weights @ d) / (self._weights @ self._tokens)
        return Interval(float(d.sum() / self._tokens.sum()), *_percentiles(samples))

    def gap_closed(self, control, ptq, qat) -> Interval | None:
        """(PTQ - QAT) / (PTQ - control); None where the gap's own interval holds 0."""
        if self.difference(ptq, control).holds_zero:
            return None
        won, gap = self._by_document(ptq - qat), self._by_document(ptq - control)
        samples = (self._weights @ won) / (self._weights @ gap)
        return Interval(float(won.sum() / gap.sum()), *_percentiles(samples))


def _percentiles(samples: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def per_token(nll: np.ndarray, windows: EvalWindows) -> float:
    """Nats a token of all windows."""
    return float(nll.sum() / windows.mask.sum())


def bits_per_byte(nll: np.ndarray, windows: EvalWindows) -> float:
    """Bits a byte of all windows."""
    return float(nll.sum() / math.log(2) / windows.num_bytes.sum())

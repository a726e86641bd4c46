"""What a model does on held-out text: loss, index recall, router agreement; and how sure that is.

Every arm is measured on the same windows in the same order, so that arms are compared in pairs.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from v4jax import distributed
from v4jax.analysis import recall
from v4jax.layers.context import IndexFormats
from v4jax.numerics import MXFP4
from v4jax.quantization import NO_QUANTIZATION, Quantization, quantize_params, resolve
from v4jax.training.data import EvalWindows
from v4jax.training.step import Program


class Evaluator:
    """Evaluates parameter sets of one program on one set of windows, `batch_size` at a time."""

    def __init__(self, program: Program, windows: EvalWindows, batch_size: int):
        self.program, self.windows, self.batch_size = program, windows, batch_size
        self._nll = jax.jit(self._batch_nll, static_argnums=(0, 1))
        self._tokens = jax.jit(self._batch_tokens, static_argnums=(0, 1))
        self._collect = jax.jit(self._batch_collect, static_argnums=0)

    def _batches(self, count: int | None):
        """Padded batches of the first `count` windows, and how many rows of each are real."""
        tokens, mask = self.windows.tokens[:count], self.windows.mask[:count]
        for start in range(0, len(tokens), self.batch_size):
            distributed.end_if_preempted("during the evaluation")
            rows, real = (
                tokens[start : start + self.batch_size],
                mask[start : start + self.batch_size],
            )
            pad = ((0, self.batch_size - len(rows)), (0, 0))
            yield np.pad(rows, pad), np.pad(real, pad), len(rows)

    def _rounded(self, params, quantization: Quantization):
        resolved = resolve(quantization, params)
        return quantize_params(params, resolved.weights), resolved.index

    def _batch_nll(self, index, dense_index, params, variables, tokens, mask):
        model = self.program.bind(params, variables, index)
        logits = model(tokens[:, :-1], dense_index=dense_index).logits
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.sum(nll * mask, axis=1)

    def nll(
        self,
        params,
        variables,
        quantization: Quantization = NO_QUANTIZATION,
        count: int | None = None,
        index: IndexFormats | None = None,
        dense_index: bool = False,
    ) -> np.ndarray:
        """Negative log-likelihood of each window, nats summed over its counted tokens: float64 [W].

        The forward pass is exactly the one that training under `quantization` runs. count: only
        the first so many windows. index: the indexer's formats instead of the quantization's.
        dense_index: CSA attends to every visible entry, and the indexer chooses nothing.
        """
        rounded, own = self._rounded(params, quantization)
        arrays = rounded, variables
        sums = [
            np.asarray(self._nll(index or own, dense_index, *arrays, tokens, mask), np.float64)[
                :real
            ]
            for tokens, mask, real in self._batches(count)
        ]
        return np.concatenate(sums)

    def _batch_tokens(self, index, dense_index, params, variables, tokens):
        model = self.program.bind(params, variables, index)
        logits = model(tokens[:, :-1], dense_index=dense_index).logits
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return nll, jnp.argmax(logits, axis=-1) == tokens[:, 1:]

    def tokens(
        self,
        params,
        variables,
        quantization: Quantization = NO_QUANTIZATION,
        dense_index: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Nats of every target, float64 [W, T], and whether it was the likeliest, bool [W, T].

        Targets that do not count are there too: see the windows' mask. As `nll` otherwise.
        """
        rounded, index = self._rounded(params, quantization)
        parts = [
            [np.asarray(x)[:real] for x in self._tokens(index, dense_index, rounded, variables, t)]
            for t, _, real in self._batches(None)
        ]
        nll, right = (np.concatenate(part) for part in zip(*parts, strict=True))
        return nll.astype(np.float64), right

    def _batch_collect(self, index, params, variables, tokens):
        out = self.program.bind(params, variables, index)(tokens[:, :-1], collect=True)
        layers = out.aux["layers"]
        operands = [layer["index"]["operands"] for layer in layers if "index" in layer]
        return operands, [layer["expert_ids"] for layer in layers]

    def choices(
        self,
        params,
        variables,
        quantization: Quantization,
        count: int,
        top_ks: tuple[int, ...] = (),
        compare=recall.comparisons,
    ) -> "Choices":
        """What the first `count` windows make the indexers and routers choose.

        top_ks: the k of the recalls, by default the model's own alone. compare: formats of query
        and key -> comparisons; the formats are those of `quantization`, or MXFP4.
        """
        rounded, index = self._rounded(params, quantization)
        compared = compare(index.query or MXFP4, index.key or MXFP4)
        config = self.program.config
        ratio = config.compress_rates.compressed_sparse_attention
        top_ks = top_ks or (config.index_topk,)
        parts, masks = [], []
        for tokens, mask, real in self._batches(count):
            operands, ids = self._collect(index, rounded, variables, tokens)
            found = [recall.keeps(layer, ratio, top_ks, compared) for layer in operands]
            parts.append(jax.tree.map(lambda x, real=real: np.asarray(x)[:real], (found, ids)))
            masks.append(mask[:real])
        join = lambda *parts: np.concatenate(parts)  # noqa: E731
        keeps, ids = jax.tree.map(join, *parts)
        return Choices(keeps, ids, np.concatenate(masks))


class Choices(NamedTuple):
    """keeps: for each CSA layer k -> comparison -> what is kept, [W, T], NaN for queries that do
    not count. expert_ids: int [W, T, K] for each layer. mask: bool [W, T], counted tokens."""

    keeps: list[recall.Keeps]
    expert_ids: list[np.ndarray]
    mask: np.ndarray

    def recalls(self, top_k: int) -> dict[str, dict | None]:
        """`recall.table` of all layers at one k."""
        return recall.table([layer[top_k] for layer in self.keeps], self.mask)


def router_agreement(a: Choices, b: Choices, layers: list[int]) -> dict:
    """Share of expert choices in common, |ids_a intersect ids_b| / K: mean, and per given layer."""
    shares = []
    for layer in layers:
        same = a.expert_ids[layer][..., :, None] == b.expert_ids[layer][..., None, :]
        shares.append(float(np.mean(np.any(same, axis=-1)[a.mask])))
    return {"mean": float(np.mean(shares)) if shares else None, "per_layer": shares}


def per_token(nll: np.ndarray, windows: EvalWindows) -> float:
    """Nats a token of all windows."""
    return float(nll.sum() / windows.mask.sum())


def bits_per_byte(nll: np.ndarray, windows: EvalWindows) -> float:
    """Bits a byte of all windows."""
    return float(nll.sum() / math.log(2) / windows.num_bytes.sum())

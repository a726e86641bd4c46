"""Byte-level context models of order 0 to 3: the yardstick for a trained model's bits per byte.

Interpolated Witten-Bell smoothing. With c(h, b) how often byte b followed the context h (the k
bytes before it) in the training text, c(h) their sum over b, and t(h) the number of different bytes
seen after h,

  p_k(b | h) = (c(h, b) + t(h) p_{k-1}(b | h')) / (c(h) + t(h)),      p_{-1}(b) = 1 / 256,

where h' is h without its oldest byte; for an unseen context p_k = p_{k-1}. Each p_k sums to one
over the 256 bytes. A document starts in a context of zero bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

ORDERS = ("unigram", "order1", "order2", "order3")
_MAX_ORDER = len(ORDERS) - 1


@dataclasses.dataclass(frozen=True, eq=False)
class _Counts:
    """Counts of one order. A context is its bytes as one uint32, the newest lowest; a pair is
    (context << 8) | byte.

    pairs uint32 [P] sorted, pair_counts int64 [P]: c(h, b).
    contexts uint32 [C] sorted, totals int64 [C]: c(h), distinct int64 [C]: t(h).
    """

    pairs: np.ndarray
    pair_counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    distinct: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class ContextModels:
    """The models of order 0 to 3 of one training text; built by `fit`."""

    counts: tuple[_Counts, ...]

    @classmethod
    def fit(cls, documents: Sequence[bytes]) -> ContextModels:
        """Counts documents. Peak memory is about 12 bytes a byte of text."""
        codes = _codes(documents)
        return cls(tuple(_count(codes, order) for order in range(_MAX_ORDER + 1)))

    def probabilities(self, documents: Sequence[bytes]) -> np.ndarray:
        """float64 [4, n]: each model's probability of each byte of the documents, in order."""
        codes = _codes(documents)
        below = np.full(len(codes), 1 / 256)
        result = []
        for order, counts in enumerate(self.counts):
            pairs = _suffix(codes, order)
            seen = _lookup(counts.pairs, counts.pair_counts, pairs)
            total = _lookup(counts.contexts, counts.totals, pairs >> 8)
            distinct = _lookup(counts.contexts, counts.distinct, pairs >> 8)
            smoothed = (seen + distinct * below) / np.maximum(total + distinct, 1)
            below = np.where(total > 0, smoothed, below)
            result.append(below)
        return np.stack(result)

    def bits_per_byte(self, documents: Sequence[bytes]) -> dict[str, float]:
        """Mean -log2 p over all bytes of the documents, by model: "unigram", "order1", ...

        Raises ValueError when there are no bytes.
        """
        probabilities = self.probabilities(documents)
        if not probabilities.shape[1]:
            raise ValueError("documents: no bytes to evaluate the context models on")
        bits = -np.log2(probabilities).mean(axis=1)
        return dict(zip(ORDERS, bits.tolist(), strict=True))


def _codes(documents: Sequence[bytes]) -> np.ndarray:
    """uint32 [n]: each byte (lowest) with the three before it, zeros before a document's start."""
    gap = bytes(_MAX_ORDER)
    text = np.frombuffer(gap + gap.join(documents), np.uint8)
    codes = text[_MAX_ORDER:].astype(np.uint32)
    for back in range(1, _MAX_ORDER + 1):
        codes |= text[_MAX_ORDER - back : len(text) - back].astype(np.uint32) << (8 * back)
    lengths = np.array([len(document) for document in documents], np.int64)
    keep = np.ones(len(codes), bool)  # all but the gaps between documents
    for end in (np.cumsum(lengths + _MAX_ORDER) - _MAX_ORDER)[:-1].tolist():
        keep[end : end + _MAX_ORDER] = False
    return codes[keep]


def _suffix(codes: np.ndarray, order: int) -> np.ndarray:
    """The (context, byte) pairs of an order: the lowest order + 1 bytes of the codes."""
    return codes & np.uint32(2 ** (8 * (order + 1)) - 1)


def _count(codes: np.ndarray, order: int) -> _Counts:
    pairs, pair_counts = np.unique(_suffix(codes, order), return_counts=True)
    contexts, starts, distinct = np.unique(pairs >> 8, return_index=True, return_counts=True)
    totals = np.add.reduceat(pair_counts, starts) if len(starts) else pair_counts
    return _Counts(pairs, pair_counts, contexts, totals, distinct)


def _lookup(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """values at the queries' places in the sorted keys, 0 where a query is absent; int64 [n]."""
    if not len(keys):
        return np.zeros(len(queries), np.int64)
    place = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[place] == queries, values[place], 0)

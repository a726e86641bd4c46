"""How sure a paired difference of two arms is: held-out documents and seeds, resampled.

Knows numpy alone: what only reads and draws numbers need not start JAX.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np


class Windows(Protocol):
    """What the windows' losses are weighted by; `v4jax.training.data.EvalWindows` is one.

    document: int [W], the document that a window is of. mask: bool [W, T], tokens that count.
    """

    @property
    def document(self) -> np.ndarray: ...
    @property
    def mask(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with a 95% interval."""

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
    DRAWS = 20
    """Of the seeds' part, for each resample."""

    def __init__(self, windows: Windows, count: int | None = None, seed: int = 0):
        _, document = np.unique(windows.document[:count], return_inverse=True)
        self._document, documents = document, int(document.max()) + 1
        tokens = windows.mask[:count].sum(axis=1)
        self._tokens = np.bincount(document, tokens, documents)
        self._rng = np.random.default_rng(seed)
        self._weights = self._rng.multinomial(
            documents, [1 / documents] * documents, self.RESAMPLES
        )
        self.documents = documents

    def _by_document(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self._document, values, len(self._tokens))

    def _resampled(self, d: np.ndarray) -> np.ndarray:
        return (self._weights @ d) / (self._weights @ self._tokens)

    def difference(self, a: np.ndarray, b: np.ndarray) -> Interval:
        """a - b, nats a token; a, b: nats summed over each window, [W]."""
        d = self._by_document(a - b)
        return Interval(float(d.sum() / self._tokens.sum()), *percentiles(self._resampled(d)))

    def of_seeds(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a - b, nats a token, of each seed [S]; a, b [S, W], a row a seed."""
        return (a - b).sum(axis=1) / self._tokens.sum()

    def over_seeds(self, a: np.ndarray, b: np.ndarray) -> Interval:
        """The mean of a - b over seeds, nats a token; a, b: nats of each window [S, W], row by row
        of the same seed.

        Documents are resampled, the same for all seeds. To each resample the seeds' own error is
        added, drawn from Student's t with S - 1 degrees of freedom and the scale s / sqrt(S): two
        or three values are too few to resample, their bootstrap is far too narrow. One seed: the
        interval is that of its own weights, as `difference` has it.
        """
        seeds = self.of_seeds(a, b)
        found = self.difference(np.mean(a, axis=0), np.mean(b, axis=0))
        if len(seeds) == 1:
            return found
        samples = self._resampled(self._by_document(np.mean(a - b, axis=0)))
        scale = np.std(seeds, ddof=1) / np.sqrt(len(seeds))
        error = self._rng.standard_t(len(seeds) - 1, (len(samples), self.DRAWS))
        return Interval(found.mean, *percentiles(samples[:, None] + scale * error))

    def gap_closed(self, control, ptq, qat) -> Interval | None:
        """(PTQ - QAT) / (PTQ - control); None where the gap's own interval holds 0."""
        if self.difference(ptq, control).holds_zero:
            return None
        won, gap = self._by_document(ptq - qat), self._by_document(ptq - control)
        samples = (self._weights @ won) / (self._weights @ gap)
        return Interval(float(won.sum() / gap.sum()), *percentiles(samples))


def percentiles(samples: np.ndarray) -> tuple[float, float]:
    """The 2.5th and the 97.5th of all samples."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)

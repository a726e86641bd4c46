"""How well a model recalls in a generated task: accuracy and nats of the answers, by distance.

Only the answers' tokens count (`v4jax.training.tasks.answers`), each a byte of a value. Chance is a
tenth, ln 10 nats; a model that only knows which values a document mentions is a little better.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from v4jax.analysis.evaluation import Evaluator
from v4jax.quantization import NO_QUANTIZATION, Quantization
from v4jax.training import tasks
from v4jax.training.data import EvalWindows


class Recalled(NamedTuple):
    """One entry an answer's token, in order of the windows.

    nats: float64 [N]. right: bool [N], it was the likeliest token. distance: int64 [N], tokens from
    the value's mention. window: int64 [N], for pairs.
    """

    nats: np.ndarray
    right: np.ndarray
    distance: np.ndarray
    window: np.ndarray


def distances(windows: EvalWindows, documents: Sequence[tuple[str, str]]) -> np.ndarray:
    """How far back each target was mentioned, int64 [W, T] in tokens; 0 where it is no answer.

    documents: (name, text) of those that `windows` were cut from. Answers whose mention lies in an
    earlier window do not count. Raises ValueError, one line, where tokens are not bytes or nothing
    is asked.
    """
    if not np.array_equal(windows.num_bytes, windows.mask.sum(axis=1)):
        raise ValueError("tokenizer: the answers of a task need --tokenizer=bytes")
    found = np.zeros(windows.mask.shape, np.int64)
    begun = np.zeros(len(documents), np.int64)  # bytes of each document in windows so far
    for row, document, count in zip(found, windows.document, windows.num_bytes, strict=True):
        start = begun[document]
        for answer in tasks.answers(documents[document][1]):
            first, last = answer.start - start, answer.end - start
            if answer.distance <= first and last <= count:
                row[first:last] = answer.distance
        begun[document] += count
    if not found.any():
        raise ValueError("data: these documents ask for nothing within a window: see task:recall")
    return found


def recalled(
    evaluator: Evaluator,
    documents: Sequence[tuple[str, str]],
    params,
    variables,
    quantization: Quantization = NO_QUANTIZATION,
    dense_index: bool = False,
) -> Recalled:
    """What the model says to every answer in the evaluator's windows of `documents`."""
    distance = distances(evaluator.windows, documents)
    nats, right = evaluator.tokens(params, variables, quantization, dense_index)
    asked = distance > 0
    return Recalled(nats[asked], right[asked], distance[asked], np.nonzero(asked)[0])


def summary(found: Recalled, width: int = 32) -> dict:
    """JSON-able: answers, accuracy and nats, and the same "by_distance" in steps of `width`."""

    def numbers(chosen: np.ndarray) -> dict:
        return {
            "answers": int(chosen.sum()),
            "accuracy": float(found.right[chosen].mean()),
            "nats": float(found.nats[chosen].mean()),
        }

    steps = found.distance // width
    return numbers(np.ones_like(found.right)) | {
        "by_distance": [
            {"from": int(step) * width, "below": (int(step) + 1) * width} | numbers(steps == step)
            for step in np.unique(steps)
        ]
    }

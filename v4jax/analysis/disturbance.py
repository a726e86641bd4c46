"""A run that is made to spike, and what is read off it: height, steps lost, what it cost."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Callable

import numpy as np

from v4jax.training.data import Batch
from v4jax.training.journal import read_events, read_undone
from v4jax.training.metrics import read_metrics

Rows = Callable[[int, int], Batch]


def disturbed(rows: Rows, first: int, count: int, vocab_size: int) -> Rows:
    """`rows`, of which `count` from row `first` on hold tokens at random, one document each.

    They are so wherever they are asked for: a run that goes back and skips them is rid of them.
    """

    def noisy(start: int, size: int) -> Batch:
        batch = rows(start, size)
        at = np.arange(start, start + size)
        wrong = (first <= at) & (at < first + count)
        if not wrong.any():
            return batch
        drawn = [
            np.random.default_rng(row).integers(0, vocab_size, batch.tokens.shape[1]) for row in at
        ]
        tokens = np.where(wrong[:, None], np.stack(drawn), batch.tokens)
        segments = np.where(wrong[:, None], 1, batch.segment_ids)
        return Batch(tokens.astype(np.int32), segments.astype(np.int32))

    return noisy


def trace(folder: pathlib.Path, first: int, last: int) -> list[tuple[float, float]]:
    """(step, loss) of the logged steps from `first` to `last`, in the run as it ended."""
    lines = read_metrics(folder)
    return [(line["step"], line["loss"]) for line in lines if first <= line["step"] <= last]


def numbers(folder: pathlib.Path, shock: int, length: int, window: int = 20) -> dict[str, float]:
    """What a run shows whose updates after `shock` were disturbed for `length` steps.

    height: nats, the largest logged loss from there on, undone lines too, over the median of
    `window` lines before. after: the same of what came after the disturbed steps, in the run as it
    ended. lost_steps: trained again. left_out: not applied. rollbacks. active: share of the steps
    with older routes; disagreement: mean share of their choices that live ones were not. clamped:
    largest share of SwiGLU's values. milliseconds_plain, milliseconds_active: a step, medians.
    """
    lines, undone, events = read_metrics(folder), read_undone(folder), read_events(folder)
    before = [line["loss"] for line in lines if line["step"] <= shock][-window:]
    level = statistics.median(before)
    jumped = [line["loss"] for line in [*lines, *undone] if line["step"] > shock]
    after = [line["loss"] for line in lines if line["step"] > shock + length]
    routed = [line for line in lines if "routing_lag" in line]
    plain = [line for line in lines if "routing_lag" not in line]
    back = [event for event in events if "to" in event]
    found = {
        "height": max(jumped) - level,
        "after": max(after) - level,
        "lost_steps": sum(event["step"] + 1 - event["to"] for event in back),
        "left_out": sum(not line["applied"] for line in lines),
        "rollbacks": len(back),
        "active": len(routed) / len(lines),
        "clamped": max(line.get("swiglu_clamped", 0.0) for line in lines),
        "milliseconds_plain": 1e3 * statistics.median(x["seconds_per_step"] for x in plain[1:]),
    }
    if routed:
        found["disagreement"] = statistics.fmean(line["routing_disagreement"] for line in routed)
        found["milliseconds_active"] = 1e3 * statistics.median(
            line["seconds_per_step"] for line in routed
        )
    return {name: float(value) for name, value in found.items()}

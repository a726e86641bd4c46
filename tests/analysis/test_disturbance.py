"""A run's disturbance: which tokens are drawn anew, and what is read off the files of a run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from v4jax.analysis import disturbance
from v4jax.training.data import Batch


def rows(first: int, count: int) -> Batch:
    """Every token of row r is r."""
    tokens = np.repeat(np.arange(first, first + count, dtype=np.int32)[:, None], 5, axis=1)
    return Batch(tokens, 7 + tokens)


@pytest.mark.parametrize("size", [1, 3, 4, 10])
def test_the_same_rows_are_noise_however_they_are_asked_for(size):
    noisy = disturbance.disturbed(rows, first=12, count=8, vocab_size=50)
    whole = noisy(0, 40)
    parts = [noisy(start, size) for start in range(0, 40, size) if start + size <= 40]
    tokens = np.concatenate([part.tokens for part in parts])
    np.testing.assert_array_equal(tokens, whole.tokens[: len(tokens)])
    changed = (whole.tokens != rows(0, 40).tokens).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(changed), np.arange(12, 20))
    drawn = whole.tokens[12:20]
    assert drawn.min() >= 0 and drawn.max() < 50 and len(np.unique(drawn)) > 20
    assert len(np.unique(drawn, axis=0)) == 8  # no row is another's
    np.testing.assert_array_equal(whole.segment_ids[12:20], 1)  # a document each
    np.testing.assert_array_equal(whole.segment_ids[:12], 7 + whole.tokens[:12])


def write(folder, name, lines):
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_a_run_shows(tmp_path):
    """Disturbed for 2 steps after 30. The spike was seen at 31 and undone back to 28."""

    def line(step, loss, **more):
        return {"step": step, "loss": loss, "applied": 1.0, "seconds_per_step": 0.1} | more

    ended = [line(s, 3.0 + 0.1 * (s % 2)) for s in range(1, 29)]
    routed = {"routing_lag": 2, "routing_disagreement": 0.25, "seconds_per_step": 0.3}
    ended += [line(s, 3.5, **routed) for s in (29, 30, 31, 32)]
    ended += [line(33, 4.05, applied=0.0), line(34, 3.2, swiglu_clamped=0.125), line(35, 3.0)]
    write(tmp_path, "metrics.jsonl", ended)
    write(tmp_path, "undone.jsonl", [line(29, 3.0), line(30, 3.0), line(31, 9.05)])
    events = [{"step": 31, "event": "spike", "onset": 31, "z": 9.0, "loss": 9.05}]
    write(tmp_path, "events.jsonl", [*events, {"step": 31, "event": "anticipate", "to": 28}])
    found = disturbance.numbers(tmp_path, shock=30, length=2)
    level = 3.1  # the median of lines 11 to 30: nine of 3.0, nine of 3.1, two of 3.5
    assert found == pytest.approx(
        {
            "height": 9.05 - level,
            "after": 4.05 - level,
            "lost_steps": 4,
            "left_out": 1,
            "rollbacks": 1,
            "active": 4 / 35,
            "clamped": 0.125,
            "milliseconds_plain": 100,
            "disagreement": 0.25,
            "milliseconds_active": 300,
        }
    )
    assert disturbance.trace(tmp_path, 32, 34) == [(32, 3.5), (33, 4.05), (34, 3.2)]

"""What a query sees, against a loop over samples and against the model's own windows."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kernels_pallas.visibility import is_visible, joint_range, visible_range
from v4jax.layers.context import sample_positions
from v4jax.layers.windows import Windows

LENGTH = 24


def by_a_loop(segments: np.ndarray, ratio: int) -> np.ndarray:
    """bool [T, T // ratio] of one row of ids: a run of equal ones is a sample."""
    length = len(segments)
    visible = np.zeros((length, length // ratio), bool)
    entry = start = 0
    for token in range(length):
        if token and segments[token] != segments[token - 1]:
            start = token
        if (token + 1 - start) % ratio == 0:
            end = token
            while end < length and segments[end] == segments[token]:
                visible[end, entry] = True
                end += 1
            entry += 1
    return visible


# Runs of ids: samples 1, 2, ... with padding (0) before, between and after them.
runs = st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=12)


def row(runs) -> np.ndarray:
    ids = []
    for number, (length, padding) in enumerate(runs, 1):
        ids += [0 if padding else number] * length
    ids += [len(runs) + 1] * LENGTH
    return np.asarray(ids[:LENGTH], np.int32)


@given(st.lists(runs, min_size=2, max_size=2), st.sampled_from([1, 2, 3, 4, 8]))
def test_ranges_of_packed_rows(rows, ratio):
    segments = np.stack([row(runs) for runs in rows])
    entries = LENGTH // ratio
    first, end = visible_range(2, LENGTH, entries, ratio, jnp.asarray(segments))
    assert first.dtype == end.dtype == jnp.int32 and (first <= end).all()
    actual = np.asarray(is_visible(first, end, entries))
    np.testing.assert_array_equal(actual, [by_a_loop(ids, ratio) for ids in segments])
    # The entries are those that the windows make: seen first by the token that closes them.
    windows = Windows.make(ratio, sample_positions(jnp.asarray(segments)), jnp.asarray(segments))
    for b, c in np.argwhere(np.asarray(windows.last) < LENGTH):
        closes = int(windows.last[b, c])
        assert actual[b, closes, c] and not actual[b, :closes, c].any()
        assert (segments[b, actual[b, :, c]] == segments[b, closes]).all()


def test_a_row_of_one_sample():
    first, end = visible_range(2, 10, 3, 3)
    np.testing.assert_array_equal(first, np.zeros((2, 10)))
    np.testing.assert_array_equal(end[1], [0, 0, 1, 1, 1, 2, 2, 2, 3, 3])
    np.testing.assert_array_equal(
        visible_range(1, 10, 3, 3, jnp.ones((1, 10), jnp.int32))[1], end[:1]
    )


def test_queries_may_begin_later():
    first, end = visible_range(2, 4, 5, 4, offset=jnp.asarray([6, 30]))
    np.testing.assert_array_equal(end, [[1, 2, 2, 2], [5, 5, 5, 5]])
    np.testing.assert_array_equal(visible_range(1, 4, 5, 4, offset=6)[1], end[:1])
    assert not first.any()


def test_the_joint_range_of_rows():
    first = jnp.asarray([[2, 0, 1], [1, 4, 1]], jnp.int32)
    end = jnp.asarray([[2, 3, 1], [5, 6, 1]], jnp.int32)  # query 2 sees nothing anywhere
    low, high = joint_range(first, end)
    np.testing.assert_array_equal(low[0, :2], [1, 0])
    np.testing.assert_array_equal(high, [[5, 6, 1]])
    assert low[0, 2] > high[0, 2]

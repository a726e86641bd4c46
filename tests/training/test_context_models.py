"""Context models against a loop over dicts in exact fractions, and as probability models."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4jax.training.context_models import ORDERS, ContextModels

TRAIN = [b"abracadabra, the quick brown fox\n" * 3, b"", b"a", b"\xff\x00\x00\xffabab", b"the the"]
EVAL = [b"the fox \xfe", b"", b"ab", b"abracadabra"]


def reference_probabilities(train, documents, order):
    """Witten-Bell by the formula, one byte at a time."""

    def contexts(document):
        padded = b"\0\0\0" + document
        return [(padded[i : i + 3], padded[i + 3]) for i in range(len(document))]

    def probability(history, byte, k):
        if k < 0:
            return Fraction(1, 256)
        context = history[3 - k :]
        following = counts[k].get(context, Counter())
        below = probability(history, byte, k - 1)
        if not following:
            return below
        distinct = len(following)
        return (following[byte] + distinct * below) / (sum(following.values()) + distinct)

    counts = [{} for _ in range(4)]
    for document in train:
        for history, byte in contexts(document):
            for k in range(4):
                counts[k].setdefault(history[3 - k :], Counter())[byte] += 1
    return [probability(h, b, order) for document in documents for h, b in contexts(document)]


@pytest.mark.parametrize("order", range(4))
def test_probabilities_equal_the_formula(order):
    expected = reference_probabilities(TRAIN, EVAL, order)
    actual = ContextModels.fit(TRAIN).probabilities(EVAL)
    assert actual.shape == (4, len(expected))
    np.testing.assert_allclose(actual[order], np.array(expected, float), rtol=1e-12)


@given(
    train=st.lists(st.binary(max_size=12), max_size=5),
    documents=st.lists(st.lists(st.sampled_from(b"ab\0\xff"), max_size=8).map(bytes), max_size=4),
)
def test_any_bytes_equal_the_formula(train, documents):
    actual = ContextModels.fit(train).probabilities(documents)
    for order in range(4):
        expected = reference_probabilities(train, documents, order)
        np.testing.assert_allclose(actual[order], np.array(expected, float), rtol=1e-12)


@pytest.mark.parametrize("history", [b"", b"t", b"the", b"bra", b"\xff\x00\x00", b"zzz", b"ezb"])
def test_probabilities_sum_to_one(history):
    models = ContextModels.fit(TRAIN)
    last = models.probabilities([history + bytes([b]) for b in range(256)])
    last = last.reshape(4, 256, len(history) + 1)[:, :, -1]
    assert (last > 0).all()
    np.testing.assert_allclose(last.sum(axis=1), 1, rtol=1e-12)


def test_bits_per_byte_is_the_mean_over_bytes():
    bits = ContextModels.fit(TRAIN).bits_per_byte(EVAL)
    assert tuple(bits) == ORDERS
    for order, name in enumerate(ORDERS):
        expected = [-math.log2(p) for p in reference_probabilities(TRAIN, EVAL, order)]
        assert bits[name] == pytest.approx(sum(expected) / len(expected), rel=1e-12)


def test_untrained_models_are_uniform_and_nothing_to_evaluate_raises():
    models = ContextModels.fit([])
    assert models.bits_per_byte([b"abc"]) == dict.fromkeys(ORDERS, 8.0)
    for nothing in ([], [b""]):
        with pytest.raises(ValueError, match="^documents: no bytes"):
            models.bits_per_byte(nothing)


def test_higher_orders_win_on_text_of_their_own_order():
    """A seeded order-2 source over four letters: the models approach its entropy from above."""
    generator = np.random.default_rng(0)
    table = generator.dirichlet([0.3] * 4, size=(4, 4))
    letters = [0, 0]
    cumulative = table.cumsum(axis=-1)
    for uniform in generator.random(60_000):
        row = cumulative[letters[-2], letters[-1]]
        letters.append(min(int(np.searchsorted(row, uniform)), 3))
    text = bytes(65 + letter for letter in letters)
    tail = np.array(letters[40_000:])
    true = -np.log2(table[tail[:-2], tail[1:-1], tail[2:]]).mean()
    bits = ContextModels.fit([text[:40_000]]).bits_per_byte([text[40_000:]])
    assert bits["unigram"] > bits["order1"] > bits["order2"]
    assert bits["order2"] == pytest.approx(true, abs=0.02)
    assert bits["order3"] == pytest.approx(true, abs=0.02)

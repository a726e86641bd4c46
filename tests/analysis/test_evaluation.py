"""Held-out loss, bootstrap intervals, recall, router agreement: against loops that say the same."""

from __future__ import annotations

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference
from tests.jax_model import build
from tests.reference_parameters import random_parameters
from tests.training import tiny
from v4jax.analysis.comparison import expert_bytes
from v4jax.analysis.evaluation import (
    Choices,
    bits_per_byte,
    per_token,
    router_agreement,
)
from v4jax.analysis.paired import Interval, Paired
from v4jax.quantization import NO_QUANTIZATION, PAPER
from v4jax.training.data import EvalWindows
from v4jax.training.step import Program, split_model

CONFIG = tiny.model()
T, K = tiny.LENGTH, CONFIG.index_topk
COUNTS = (32, 20, 32, 7, 1)  # predicted tokens of each window
DOCUMENTS = (4, 4, 0, 2, 2)


def held_out() -> EvalWindows:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (len(COUNTS), T + 1)).astype(np.int32)
    mask = np.zeros((len(COUNTS), T), bool)
    for window, count in enumerate(COUNTS):
        tokens[window, count + 1 :] = 256
        mask[window, :count] = True
    return EvalWindows(tokens, mask, np.array(DOCUMENTS), np.array([40, 30, 32, 7, 2]))


@pytest.fixture(scope="module")
def model():
    raw = random_parameters(CONFIG, 3)
    model = build(CONFIG, raw)
    params, variables = split_model(model)
    return SimpleNamespace(raw=raw, program=Program.of(model), params=params, variables=variables)


@pytest.fixture(scope="module")
def by_reference(model):
    """The reference's run of each window, without what follows its last counted token."""
    windows = held_out()
    return [
        reference.forward(CONFIG, model.raw, tokens[: count + 1])
        for tokens, count in zip(windows.tokens, COUNTS, strict=True)
    ]


# ---- loss ----


@pytest.mark.parametrize("batch_size", [2, 5])
def test_nll_is_that_of_every_window_alone(model, by_reference, batch_size):
    """Whatever the batch: a last one that is padded, what follows a window's end."""
    evaluator = tiny.QuickEvaluator(model.program, held_out(), batch_size)
    found = evaluator.nll(model.params, model.variables)
    assert found.dtype == np.float64 and found.shape == (len(COUNTS),)
    wanted = [np.nansum(run.token_loss) for run in by_reference]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    some = evaluator.nll(model.params, model.variables, NO_QUANTIZATION, 3)
    assert np.array_equal(some, found[:3])
    assert np.array_equal(evaluator.nll(model.params, model.variables, count=99), found)


def test_nats_a_token_and_bits_a_byte():
    nll = np.array([32.0, 10.0, 50.0, 7.0, 1.0])
    assert math.isclose(per_token(nll, held_out()), 100 / 92)
    assert math.isclose(bits_per_byte(nll, held_out()), 100 / 111 / math.log(2))


# ---- intervals ----


def many_windows(documents: int, seed: int):
    """Windows of `documents` documents, some long; and two arms whose windows of one document go
    together, so that resampling windows would give intervals that are too narrow."""
    rng = np.random.default_rng(seed)
    document = np.repeat(rng.permutation(documents) * 7, rng.integers(1, 9, documents))
    counts = rng.integers(5, T + 1, len(document))
    windows = EvalWindows(
        np.zeros((len(document), T + 1), np.int32), np.arange(T) < counts[:, None], document, counts
    )
    effect = rng.normal(0.02, 0.05, documents)[np.unique(document, return_inverse=True)[1]]
    a = counts * rng.normal(2, 0.1, len(document))
    return windows, a, a + counts * (effect + rng.normal(0, 0.01, len(document)))


def resampled(windows, statistic, resamples=4000):
    """Values of statistic(indices of windows) over draws of whole documents, one by one."""
    rng = np.random.default_rng(99)
    names = sorted(set(windows.document.tolist()))
    members = {name: np.flatnonzero(windows.document == name) for name in names}
    return np.array(
        [
            statistic(np.concatenate([members[names[i]] for i in draw]))
            for draw in rng.integers(0, len(names), (resamples, len(names)))
        ]
    )


def assert_interval(found: Interval, samples, exact: float):
    """Within a fifth of the standard error: two random samples of one distribution."""
    assert math.isclose(found.mean, exact, rel_tol=1e-12)
    low, high = np.percentile(samples, [2.5, 97.5])
    close = 0.2 * samples.std()
    assert abs(found.low - low) < close and abs(found.high - high) < close
    assert found.low < found.mean < found.high


@pytest.mark.parametrize("documents", [6, 40])
def test_intervals_resample_documents(documents):
    windows, a, b = many_windows(documents, 1)
    tokens, d = windows.mask.sum(axis=1), b - a
    paired = Paired(windows)
    samples = resampled(windows, lambda w: d[w].sum() / tokens[w].sum())
    found = paired.difference(b, a)
    assert_interval(found, samples, d.sum() / tokens.sum())
    back = paired.difference(a, b)
    assert math.isclose(back.low, -found.high) and math.isclose(back.high, -found.low)
    assert Paired(windows).difference(b, a) == found  # the same draws every time
    assert paired.documents == documents
    windowwise = d.std() / tokens.mean() / math.sqrt(len(d))
    assert samples.std() > 1.3 * windowwise  # else this test could not tell


def test_some_windows_are_compared_alone():
    windows, a, b = many_windows(30, 2)
    some = EvalWindows(*(field[:50] for field in vars(windows).values()))
    assert Paired(windows, 50).difference(a[:50], b[:50]) == Paired(some).difference(a[:50], b[:50])


def test_one_document_has_no_spread():
    windows = held_out()
    alone = Paired(EvalWindows(windows.tokens, windows.mask, np.full(5, 3), windows.num_bytes))
    found = alone.difference(np.arange(5.0), np.zeros(5))
    assert math.isclose(found.low, 10 / 92) and math.isclose(found.high, 10 / 92)


def test_the_gap_closed_is_a_ratio_of_resampled_sums():
    windows, control, other = many_windows(40, 3)
    ptq = control + np.abs(other - control) + 0.5
    qat = ptq - 0.3 * (ptq - control) + 0.05 * (other - control)
    paired = Paired(windows)
    samples = resampled(windows, lambda w: (ptq - qat)[w].sum() / (ptq - control)[w].sum())
    found = paired.gap_closed(control, ptq, qat)
    assert_interval(found, samples, (ptq - qat).sum() / (ptq - control).sum())
    assert paired.gap_closed(control, ptq, control) == Interval(1.0, 1.0, 1.0)
    assert paired.gap_closed(control, ptq, ptq) == Interval(0.0, 0.0, 0.0)
    assert math.isclose(paired.gap_closed(control, ptq, 2 * control - ptq).mean, 2.0)


def test_no_share_of_a_gap_that_may_be_none():
    windows, control, _ = many_windows(40, 4)
    noise = np.random.default_rng(5).normal(0, 1, len(control))
    paired = Paired(windows)
    gap = paired.difference(control + noise, control)
    assert gap.low < 0 < gap.high and gap.holds_zero
    assert paired.gap_closed(control, control + noise, control) is None
    assert paired.gap_closed(control, control, control - 1) is None  # no gap at all
    assert paired.gap_closed(control, control + noise + 3, control) is not None
    assert not Interval(1, 0.5, 2).holds_zero and not Interval(-1, -2, -0.5).holds_zero
    assert Interval(1, 0, 2).holds_zero and Interval(-1, -2, 0).holds_zero


# ---- choices ----


def test_choices_of_a_model(model, by_reference):
    """Expert ids are the reference's, and recall counts the queries with more than k entries."""
    evaluator = tiny.QuickEvaluator(model.program, held_out(), 2)
    found = evaluator.choices(model.params, model.variables, NO_QUANTIZATION, 5)
    (ids,) = found.expert_ids
    assert ids.shape == (5, T, CONFIG.num_experts_per_tok)
    assert np.array_equal(found.mask, held_out().mask)
    for window, run in enumerate(by_reference):
        count = COUNTS[window]
        assert np.array_equal(ids[window, :count], run.router_choices[0][:count])
    entries = (np.arange(T) + 1) // CONFIG.compress_rates.compressed_sparse_attention
    (layer,) = found.keeps
    for kept in layer[K]["qk"]:
        assert np.array_equal(np.isfinite(kept), np.broadcast_to(entries > K, (5, T)))
    found = evaluator.choices(model.params, model.variables, PAPER, 4)
    assert len(found.mask) == 4
    table = found.recalls(K)
    assert table["qk"]["queries"] == sum((entries[:count] > K).sum() for count in COUNTS[:4])
    assert 1 / K <= table["qk"]["min"] <= table["qk"]["p5"] <= table["qk"]["mean"] < 1


def test_router_agreement_against_loops():
    rng = np.random.default_rng(0)
    mask = rng.random((4, T)) < 0.7

    def choices():
        picks = [np.argsort(rng.random((4, T, 6)), axis=-1)[..., :3] for _ in range(3)]
        return Choices([], picks, mask)

    a, b = choices(), choices()
    found = router_agreement(a, b, [0, 2])
    wanted = []
    for layer in (0, 2):
        pairs = [
            (set(x.tolist()), set(y.tolist()))
            for x, y in zip(a.expert_ids[layer][mask], b.expert_ids[layer][mask], strict=True)
        ]
        wanted.append(sum(len(x & y) for x, y in pairs) / 3 / len(pairs))
    np.testing.assert_allclose(found["per_layer"], wanted)
    assert math.isclose(found["mean"], np.mean(wanted))
    assert router_agreement(a, a, [1]) == {"mean": 1.0, "per_layer": [1.0]}
    assert router_agreement(a, b, []) == {"mean": None, "per_layer": []}


# ---- bytes ----


def test_bytes_of_experts(model):
    size = 2 * 4 * (2 * 32 * 32 + 32 * 32)  # a layer's and MTP's four experts
    assert expert_bytes(model.program.bind(model.params, model.variables)) == {
        "bf16": 2 * size,
        "fp4": size // 2 + size // 32,
        "ratio": 64 / 17,
    }
    assert jax.tree.leaves(model.params)[0].dtype == jnp.float32

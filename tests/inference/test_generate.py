"""Sampling: greedy against whole forward passes of the reference, windows, bans, draws."""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import reference
from tests.jax_model import build
from tests.reference_parameters import random_parameters
from tests.training import tiny
from v4jax.inference.generate import generate

VOCAB = 11


class Clock(nnx.Module):
    """The likeliest token is a function of the last one and of where it stands in the window."""

    def __init__(self, logits=None):
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self.fixed = nnx.data(None if logits is None else jnp.asarray(logits))

    def __call__(self, tokens):
        if self.fixed is not None:
            shape = (*tokens.shape, VOCAB)
            return SimpleNamespace(logits=jnp.broadcast_to(self.fixed, shape))
        best = (3 * tokens + jnp.arange(tokens.shape[1])) % VOCAB
        distance = (jnp.arange(VOCAB) - best[..., None]) % VOCAB
        return SimpleNamespace(logits=-distance.astype(jnp.float32))


def clock(prompt, count, length):
    """What Clock says, the older half of a full window being dropped before each token."""
    context, produced = list(prompt[-length:]), []
    for _ in range(count):
        if len(context) == length:
            context = context[length // 2 :]
        token = (3 * context[-1] + len(context) - 1) % VOCAB
        context.append(token)
        produced.append(token)
    return produced


@pytest.mark.parametrize("length", [2, 5, 8, 30])
@pytest.mark.parametrize("prompt", [[4], [1, 2, 3, 4, 5], list(range(10)) * 4])
def test_windows_slide(length, prompt):
    found = generate(Clock(), np.array(prompt, np.int32), 25, length=length)
    assert found.dtype == np.int32 and found.tolist() == clock(prompt, 25, length)


def test_greedy_is_the_argmax_of_whole_forward_passes():
    """With compressed entries and an indexer: what stands behind the last token is not seen."""
    config = tiny.model(num_nextn_predict_layers=0)
    params = random_parameters(config, 3)
    rng = np.random.default_rng(0)
    prompt, length = rng.integers(0, 257, 7).astype(np.int32), 16
    found = generate(build(config, params), prompt, 13, length=length)
    context, wanted = prompt.tolist(), []
    for _ in range(13):
        if len(context) == length:
            context = context[length // 2 :]
        token = int(reference.forward(config, params, context).logits[-1].argmax())
        context.append(token)
        wanted.append(token)
    assert found.tolist() == wanted and len(set(wanted)) > 3


def test_forbidden_tokens_never_come():
    model = Clock(np.linspace(0, 3, VOCAB, dtype=np.float32))
    prompt = np.array([0], np.int32)
    assert set(generate(model, prompt, 5, length=8).tolist()) == {10}
    assert set(generate(model, prompt, 5, length=8, forbid=(10, 9)).tolist()) == {8}
    drawn = generate(model, prompt, 100, length=8, temperature=5.0, forbid=tuple(range(1, 10)))
    assert set(drawn.tolist()) == {0, 10}


def test_draws_follow_the_seed_and_the_temperature():
    logits = np.log(np.array([6, 3, 1] + [1e-9] * (VOCAB - 3), np.float32))
    prompt = np.array([0], np.int32)

    def draw(seed, temperature=1.0):
        model = Clock(logits)
        return generate(model, prompt, 300, length=8, temperature=temperature, seed=seed)

    first = draw(0)
    assert np.array_equal(first, draw(0)) and not np.array_equal(first, draw(1))
    shares = np.bincount(first, minlength=3)[:3] / 300
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], atol=0.08)
    cold = np.bincount(draw(0, 0.25), minlength=3)[:3] / 300
    np.testing.assert_allclose(cold, np.array([1296, 81, 1]) / 1378, atol=0.05)


def test_an_empty_prompt_is_refused():
    with pytest.raises(
        ValueError, match="^generate: the prompt is empty; give at least one token$"
    ):
        generate(Clock(), np.zeros(0, np.int32), 3, length=8)

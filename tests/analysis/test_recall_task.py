"""Answers of a generated task: which targets they are, and what a model says to them."""

from __future__ import annotations

import numpy as np
import pytest
from flax import nnx

from tests.jax_model import build, quick_jit
from tests.reference_parameters import random_parameters
from tests.training import tiny
from v4jax.analysis import recall_task
from v4jax.analysis.recall_task import Recalled
from v4jax.quantization import PAPER
from v4jax.training.corpus import Corpus, load_corpus, split
from v4jax.training.data import evaluation_windows
from v4jax.training.step import Program, split_model
from v4jax.training.tokenizer import get_tokenizer

SPECS = (
    "task:recall:documents=30,length=96,keys=8,letters=9",
    "task:needles:documents=30,length=96,keys=4,gap=9",
)
BYTES = get_tokenizer("bytes", Corpus((), ""))


def documents(spec=SPECS[0]):
    return split(load_corpus(spec), 0.3)[1].documents


def by_hand(text: str) -> dict[int, int]:
    """Place of an answer's byte -> how far back it was mentioned."""
    seen, found = {}, {}
    for i in range(1, len(text)):
        if text[i].isdigit():
            key = text[i - 1]
            if key in seen:
                found[i] = i - seen[key]
            seen[key] = i
    return found


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("length", [96, 95, 200, 84])
def test_answers_are_found_in_windows_of_any_length(spec, length):
    held_out = documents(spec)
    windows = evaluation_windows(held_out, BYTES, length)
    found = recall_task.distances(windows, held_out)
    seen, count = dict.fromkeys(range(len(held_out)), 0), 0
    for row, (tokens, document) in enumerate(zip(windows.tokens, windows.document, strict=True)):
        start, answers = seen[int(document)], by_hand(held_out[document][1])
        for t in range(length):
            wanted = answers.get(start + t, 0) if windows.mask[row, t] else 0
            wanted = wanted if t >= wanted else 0  # its mention lies in the window before
            assert found[row, t] == wanted
            if wanted:
                assert tokens[t + 1] == tokens[t + 1 - wanted] and chr(tokens[t + 1]).isdigit()
                count += 1
        seen[int(document)] += int(windows.num_bytes[row])
    whole = sum(len(by_hand(text)) for _, text in held_out)
    assert count == whole if length >= 95 else 0 < count < whole


def test_only_bytes_and_documents_that_ask():
    held_out = documents()
    bpe = get_tokenizer("bpe", load_corpus(SPECS[0]), 300)
    with pytest.raises(ValueError, match="^tokenizer: the answers of a task need --tokenizer=byte"):
        recall_task.distances(evaluation_windows(held_out, bpe, 96), held_out)
    plain = (("a", "no question is here"),)
    with pytest.raises(ValueError, match="^data: these documents ask for nothing"):
        recall_task.distances(evaluation_windows(plain, BYTES, 96), plain)


def test_numbers_by_distance():
    found = Recalled(
        np.array([1.0, 2.0, 3.0, 6.0]), np.array([True, False, True, True]),
        np.array([10, 31, 32, 70]), np.array([0, 0, 1, 2]),
    )  # fmt: skip
    assert recall_task.summary(found) == {
        "answers": 4, "accuracy": 0.75, "nats": 3.0,
        "by_distance": [
            {"from": 0, "below": 32, "answers": 2, "accuracy": 0.5, "nats": 1.5},
            {"from": 32, "below": 64, "answers": 1, "accuracy": 1.0, "nats": 3.0},
            {"from": 64, "below": 96, "answers": 1, "accuracy": 1.0, "nats": 6.0},
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def model():
    config = tiny.model(num_nextn_predict_layers=0)
    return build(config, random_parameters(config, 3))


def test_what_a_model_says(model):
    """Of every token, rounded and dense: the sums are those of `nll`; and the answers' alone."""
    held_out = documents()
    windows = evaluation_windows(held_out, BYTES, 96)
    evaluator = tiny.QuickEvaluator(Program.of(model), windows, 4)
    arguments = *split_model(model), PAPER
    nats, right = evaluator.tokens(*arguments, dense_index=True)
    sums = evaluator.nll(*arguments, dense_index=True)
    np.testing.assert_allclose((nats * windows.mask).sum(axis=1), sums, rtol=1e-5)
    found = recall_task.recalled(evaluator, held_out, *arguments, dense_index=True)
    distance = recall_task.distances(windows, held_out)
    wanted = [
        (nats[w, t], right[w, t], distance[w, t], w)
        for w in range(len(windows.tokens)) for t in range(96) if distance[w, t]
    ]  # fmt: skip
    for column, values in zip(found, zip(*wanted, strict=True), strict=True):
        np.testing.assert_array_equal(column, values)


def test_tokens_are_those_of_the_logits(model):
    windows = evaluation_windows(documents(), BYTES, 96, 5)
    params, variables = split_model(model)
    found, likeliest = tiny.QuickEvaluator(Program.of(model), windows, 4).tokens(params, variables)
    graphdef, state = nnx.split(model)
    run = quick_jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens).logits)
    logits = np.asarray(run(state, windows.tokens[:4, :-1]), np.float64)
    logs = np.log(np.exp(logits).sum(-1))
    picked = np.take_along_axis(logits, windows.tokens[:4, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(found[:4], logs - picked, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(likeliest[:4], logits.argmax(-1) == windows.tokens[:4, 1:])
    assert found.shape == (5, 96)

"""Generated tasks, read again character by character; what they promise, and wrong specs."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest

from v4jax.training import tasks
from v4jax.training.corpus import load_corpus, split
from v4jax.training.data import Dataset, evaluation_windows
from v4jax.training.tokenizer import get_tokenizer

NEEDLES = {
    "default": "task:needles:documents=200",
    "short": "task:needles:documents=60,length=128,keys=5,letters=26",
    "long": "task:needles:documents=99,length=301,keys=9,letters=3,key_bytes=3,value_bytes=2,gap=9",
}
RECALL = {
    "default": "task:recall:documents=200",
    "long": "task:recall:documents=200,length=300,keys=20,letters=5,key_bytes=2,value_bytes=3",
}


def read(text: str, size: int) -> list[tuple[str, str, int]]:
    """(key, value, place of the value) of every record, found without a pattern."""
    found, i = [], 0
    while i < len(text):
        key = value = ""
        while i < len(text) and text[i].isupper():
            key, i = key + text[i], i + 1
        place = i
        while key and i < len(text) and text[i].isdigit():
            value, i = value + text[i], i + 1
        if value:
            assert text[i : i + 2] == ", " and len(key + value) + 2 == size
            found.append((key, value, place))
        i += 1
    return found


def halves(task, text):
    """Mentions and questions, (key, value, place of the value) each."""
    records = read(text, task.record_bytes)
    count = len({key for key, _, _ in records})
    mentions, questions = records[:count], records[count:]
    value = {key: value for key, value, _ in mentions}
    assert len(value) == count and all(value[key] == asked for key, asked, _ in questions)
    assert {*"".join(value)} <= {*"ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: task.letters]}
    assert len(text.encode()) == task.length - 1
    return mentions, questions


@pytest.mark.parametrize("name", NEEDLES)
def test_needles_lie_in_filler_and_are_asked_for_at_the_end(name):
    task = tasks.parse(NEEDLES[name])
    counts, distances, apart = set(), set(), set()
    for _, text in tasks.documents(task):
        mentions, questions = halves(task, text)
        assert len(questions) == len(mentions)
        assert text.endswith("".join(f"{key}{value}, " for key, value, _ in questions))
        place = {key: place for key, _, place in mentions}
        wanted = [(at, at + task.value_bytes, at - place[key]) for key, _, at in questions]
        assert tasks.answers(text) == wanted
        assert min(distance for *_, distance in wanted) > task.gap
        distances |= {distance for *_, distance in wanted}
        counts.add(len(mentions))
        apart |= {b - a for a, b in itertools.pairwise(place.values())}
        fillers = text[: questions[0][2] - task.key_bytes]
        for key, value, _ in mentions:
            fillers = fillers.replace(f"{key}{value}, ", "", 1)
        assert fillers in tasks._FILLER * 9
    assert counts == set(range(1, task.keys + 1)) and len(distances) > 20 and len(apart) > 5


@pytest.mark.parametrize("name", RECALL)
def test_recall_is_rounds_of_all_keys(name):
    task = tasks.parse(RECALL[name])
    counts, farthest = set(), 0
    for _, text in tasks.documents(task):
        mentions, questions = halves(task, text)
        count, asked = len(mentions), [key for key, _, _ in questions]
        assert len(mentions + questions) == (task.length - 1) // task.record_bytes
        for start in range(0, len(asked), count):
            keys = asked[start : start + count]
            assert len(set(keys)) == len(keys)
        last = {key: place for key, _, place in mentions}
        for (key, value, place), answer in zip(questions, tasks.answers(text), strict=True):
            assert answer == (place, place + len(value), place - last[key])
            assert answer.distance < 2 * count * task.record_bytes
            farthest, last[key] = max(farthest, answer.distance), place
        counts.add(count)
    assert counts == set(range(1, task.keys + 1))
    assert farthest > 1.5 * task.keys * task.record_bytes


def test_values_and_orders_are_random():
    """Nothing but the mention tells a value: not the key, nor the place in the order."""
    task = tasks.parse("task:recall:documents=1500,length=101,keys=8,letters=8")
    mentioned, asked = [], []
    for _, text in tasks.documents(task):
        mentions, questions = halves(task, text)
        mentioned += [(key, i, int(value)) for i, (key, value, _) in enumerate(mentions)]
        if len(mentions) == task.keys:
            order = [key for key, _, _ in mentions]
            asked += [order.index(key) for key, _, _ in questions[:1]]
    values = np.array([value for *_, value in mentioned])
    for column in (0, 1):
        group = np.array([one[column] for one in mentioned])
        for one in np.unique(group):
            assert_even(values[group == one], 10)
    assert_even(np.array(asked), task.keys)


def assert_even(found: np.ndarray, kinds: int) -> None:
    """Counts of 0 .. kinds - 1 are within 5 standard deviations of each other's mean."""
    shares = np.bincount(found, minlength=kinds) / len(found)
    assert (np.abs(shares - 1 / kinds) < 5 * np.sqrt((1 - 1 / kinds) / kinds / len(found))).all()


def test_a_document_is_its_name():
    """Of how many there are nothing depends, of every other setting all does; and it stays so."""
    few, many = (tasks.parse(f"task:recall:documents={n}") for n in (3, 300))
    assert tasks.documents(many)[:3] == tasks.documents(few)
    other = tasks.parse("task:recall:documents=3,letters=17")
    assert not {t for _, t in tasks.documents(other)} & {t for _, t in tasks.documents(few)}
    stored = hashlib.sha256(tasks.text(few, "recall/000001").encode()).hexdigest()
    assert stored[:16] == "eb8114d8543d43e0"


def test_the_pipeline_takes_it_a_document_a_row():
    corpus = load_corpus("task:recall:documents=200,length=64,keys=2")
    assert tasks.parse(corpus.source) == tasks.parse("task:recall:documents=200,length=64,keys=2")
    train, held_out = split(corpus)
    tokenizer = get_tokenizer("bytes", train)
    batch = Dataset.build(train.documents, tokenizer).batches(64, 2, seed=0)(0)
    texts = {text for _, text in train.documents}
    for tokens in batch.tokens:
        assert tokens[0] == tokenizer.bos_id and tokenizer.decode(tokens[1:64]) in texts
    windows = evaluation_windows(held_out.documents, tokenizer, 64)
    assert len(windows.tokens) == len(held_out.documents)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("task:sorting", "no task 'sorting', allowed: recall, needles"),
        ("task:recall:keys", "'keys' is not FIELD=INTEGER of ['documents', 'length'"),
        ("task:recall:keys=-1", "'keys=-1' is not FIELD=INTEGER"),
        ("task:recall:kind=1", "'kind=1' is not"),
        ("task:recall:keys=0", "task:recall: keys: got 0, allowed: an integer >= 1"),
        ("task:recall:keys=17", "keys: got 17, allowed: <= letters ** key_bytes"),
        ("task:recall:letters=27", "letters: got 27, allowed: <= 26"),
        ("task:needles:length=160", "task:needles: length: got 160, allowed: >= 161 with so"),
        ("task:recall:length=128", "task:recall: length: got 128, allowed: >= 129 with so"),
    ],
)
def test_wrong_specs_are_one_line(spec, message):
    with pytest.raises(ValueError) as error:
        load_corpus(spec)
    assert str(error.value).startswith("data: ") and message in str(error.value)
    assert "\n" not in str(error.value)

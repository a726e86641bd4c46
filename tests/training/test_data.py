"""Rows, batches and evaluation windows against hand-made packing and brute force."""

from __future__ import annotations

import collections
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from v4jax.training.corpus import Corpus
from v4jax.training.data import Batch, Dataset, _Rows, evaluation_windows, predicted
from v4jax.training.tokenizer import Tokenizer, get_tokenizer

TEXTS = ["def f():\r\n", "", "é😀", "x" * 50, "a", "the end " * 9, "\x00\x01", "0123456789" * 3]
DOCUMENTS = tuple((f"name{i}", text) for i, text in enumerate(TEXTS))
CORPUS = Corpus(DOCUMENTS, "")
BOS = 256  # of the bytes tokenizer


@pytest.fixture(scope="module", params=["bytes", "bpe", "words"])
def tokenizer(request):
    if request.param != "words":
        return get_tokenizer(request.param, CORPUS, 270)
    backend = Backend(models.WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(backend)


def numbered(lengths):
    """A dataset in which every token is unlike any other; ids start at 1, BOS is 0."""
    ids = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    documents = tuple(np.split(ids, np.cumsum(lengths)[:-1]))
    names = tuple(f"d{i}" for i in range(len(lengths)))
    return Dataset(names, documents, bos_id=0, vocab_size=sum(lengths) + 1)


def epoch(dataset, sequence_length, seed=0, number=0):
    """The rows of an epoch, in order."""
    batches = dataset.batches(sequence_length, 1, seed)
    steps = range(number * batches.epoch_rows, (number + 1) * batches.epoch_rows)
    return [Batch(*(field[0] for field in batches(step))) for step in steps]


def assert_batches_equal(first, second):
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(first.segment_ids, second.segment_ids)


def test_rows_equal_a_hand_made_packing():
    stream = np.array([0, 11, 12, 13, 14, 15, 16, 0, 21, 0, 0, 31, 32, 0], np.int32)
    rows = _Rows(stream, sequence_length=5, bos_id=0)
    expected = [
        ([0, 11, 12, 13, 14, 15], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1]),
        ([15, 16, 0, 21, 0, 0], [1, 1, 2, 2, 3, 4], [1, 0, 1, 0, 0]),
        ([0, 31, 32, 0, 0, 0], [1, 1, 1, 2, 0, 0], [1, 1, 0, 0, 0]),
    ]
    assert len(rows) == len(expected)
    for row, (tokens, segments, counts) in zip(rows, expected, strict=False):
        np.testing.assert_array_equal(row.tokens, tokens)
        np.testing.assert_array_equal(row.segment_ids, segments)
        np.testing.assert_array_equal(predicted(row.segment_ids), np.array(counts, bool))
        np.testing.assert_array_equal(predicted(jnp.asarray(row.segment_ids)), counts)
    # One token less, and the last row holds no second segment; 5 T + 1 tokens fill rows exactly.
    assert [len(_Rows(stream[:n], 5, 0)) for n in (1, 2, 6, 7, 11, 12, 13)] == [0, 1, 1, 2, 2, 3, 3]


@pytest.mark.slow
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(sum),
    sequence_length=st.integers(1, 9),
    seed=st.integers(0, 5),
)
def test_an_epoch_predicts_every_token_once_after_its_own_past(lengths, sequence_length, seed):
    dataset = numbered(lengths)
    before = {}  # each token's predecessor in its document, BOS at the start
    for ids in dataset.documents:
        before.update(zip(ids.tolist(), [0, *ids.tolist()], strict=False))
    for number in range(2):
        seen = {}
        for row in epoch(dataset, sequence_length, seed, number):
            assert row.tokens.shape == row.segment_ids.shape == (sequence_length + 1,)
            counts = predicted(row.segment_ids)
            for i in np.flatnonzero(counts):
                target = int(row.tokens[i + 1])
                assert target not in seen and target != 0
                seen[target] = int(row.tokens[i])
            # Segments are 1, 2, .. in order, one for each document in the row, then padding.
            used = row.segment_ids[row.segment_ids > 0]
            assert used[0] == 1 and set(np.diff(used)) <= {0, 1}
            assert (row.segment_ids[len(used) :] == 0).all()
            starts = row.tokens[1 : len(used)] == 0
            np.testing.assert_array_equal(np.diff(used) == 1, starts)
        assert seen == before
    assert dataset.num_tokens == len(before)


def test_stream_holds_whole_documents_in_a_seeded_order_of_names():
    dataset = numbered([3, 0, 2, 5, 1, 4, 2, 2])

    def parts(stream):
        starts = np.flatnonzero(stream == 0)
        assert starts[0] == 0
        return [tuple(part.tolist()) for part in np.split(stream[:], starts[1:])]

    orders = [parts(dataset.stream(seed)) for seed in range(4)]
    expected = sorted((0, *ids.tolist()) for ids in dataset.documents)
    assert all(sorted(order) == expected for order in orders)
    assert len(set(map(tuple, orders))) == 4
    # The order of the documents given does not matter.
    turned = Dataset(dataset.names[::-1], dataset.documents[::-1], 0, dataset.vocab_size)
    np.testing.assert_array_equal(turned.stream(1), dataset.stream(1))
    # Pinned: no version of anything may change it, or old runs would not continue.
    names = tuple("abcdefgh")
    pinned = Dataset(names, tuple(np.array([i], np.int32) for i in range(1, 9)), 0, 9)
    assert pinned.stream(0)[1::2].tolist() == [7, 8, 1, 5, 2, 6, 3, 4]


def test_batches_are_the_rows_in_a_new_order_each_epoch():
    dataset = numbered([50, 30, 2, 1, 7])
    rows = _Rows(dataset.stream(0), 4, 0)
    expected = sorted(tuple(rows[i].tokens.tolist()) for i in range(len(rows)))
    orders = [[tuple(r.tokens.tolist()) for r in epoch(dataset, 4, number=n)] for n in range(3)]
    assert all(sorted(order) == expected for order in orders)
    assert len(set(map(tuple, orders))) == 3
    # A batch of B rows is B consecutive rows of that endless order, across the end of an epoch.
    flat = [row for order in orders for row in order]
    batches = dataset.batches(4, 7, seed=0)
    assert batches.epoch_rows == len(rows) and batches.epoch_steps == len(rows) / 7
    for step in range(len(flat) // 7):
        assert list(map(tuple, batches(step).tokens.tolist())) == flat[7 * step : 7 * step + 7]


def test_a_batch_is_a_pure_function_of_seed_and_step():
    dataset = numbered([40, 3, 25, 1, 60])
    batches = dataset.batches(8, 4, seed=5)
    forward = [batches(step) for step in range(12)]
    for step in np.random.default_rng(0).permutation(12):
        assert_batches_equal(batches(step), forward[step])
        assert_batches_equal(
            numbered([40, 3, 25, 1, 60]).batches(8, 4, seed=5)(step), forward[step]
        )
    one = numbered([200])  # whose stream has one order: the seed also shuffles the rows
    assert (one.batches(8, 4, seed=6)(0).tokens != one.batches(8, 4, seed=5)(0).tokens).any()
    other = dataset.batches(8, 4, seed=6)
    assert any((other(step).tokens != forward[step].tokens).any() for step in range(12))
    far = batches(10**9)
    assert far.tokens.shape == (4, 9) and far.tokens.dtype == far.segment_ids.dtype == np.int32
    # What is returned is the caller's: writing into it changes nothing.
    batches(3).tokens[:] = -1
    assert_batches_equal(batches(3), forward[3])


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_processes_take_contiguous_slices_of_one_global_batch(count):
    dataset = numbered([40, 3, 25, 1, 60])
    whole = dataset.batches(6, 8, seed=2)
    shares = [dataset.batches(6, 8, 2, index, count) for index in range(count)]
    for step in (0, 1, 17):
        parts = [share(step) for share in shares]
        assert all(part.tokens.shape == (8 // count, 7) for part in parts)
        joined = Batch(*(np.concatenate(field) for field in zip(*parts, strict=True)))
        assert_batches_equal(joined, whole(step))


def test_the_cache_of_ids_is_used_and_keyed_by_texts_and_tokenizer(tmp_path, tokenizer):
    plain = Dataset.build(DOCUMENTS, tokenizer)
    for _ in range(2):
        kept = Dataset.build(DOCUMENTS, tokenizer, tmp_path)
        assert kept.hash == plain.hash
        for a, b in zip(kept.documents, plain.documents, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    assert len(list(tmp_path.iterdir())) == 1
    with mock.patch.object(Tokenizer, "encode_batch", side_effect=AssertionError):
        Dataset.build(DOCUMENTS, tokenizer, tmp_path)
        renamed = tuple((f"other {name}", text) for name, text in DOCUMENTS)
        assert Dataset.build(renamed, tokenizer, tmp_path).names[0].startswith("other")
    larger = get_tokenizer("bpe", CORPUS, 280)
    for documents, other in ((DOCUMENTS[1:], tokenizer), (DOCUMENTS, larger)):
        assert (
            Dataset.build(documents, other, tmp_path).hash == Dataset.build(documents, other).hash
        )
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_cache_of_ids_is_made_again(tmp_path, tokenizer):
    plain = Dataset.build(DOCUMENTS, tokenizer, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-4], whole[:70] + b"\x07" + whole[71:], b""):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is damaged; making it again"):
            assert Dataset.build(DOCUMENTS, tokenizer, tmp_path).hash == plain.hash
        assert path.read_bytes() == whole


def test_the_data_hash_sees_what_batches_depend_on():
    tokenizer = get_tokenizer("bytes", CORPUS)
    base = Dataset.build(DOCUMENTS, tokenizer)
    renamed = (("other", TEXTS[0]), *DOCUMENTS[1:])
    changed = (("name0", "def g():\r\n"), *DOCUMENTS[1:])
    bpe = get_tokenizer("bpe", CORPUS, 270)
    others = [Dataset.build(renamed, tokenizer), Dataset.build(changed, tokenizer)]
    others += [Dataset.build(DOCUMENTS[1:], tokenizer), Dataset.build(DOCUMENTS, bpe)]
    assert base.hash == Dataset.build(DOCUMENTS, tokenizer).hash
    assert len({dataset.hash for dataset in [base, *others]}) == 5


def test_token_counts(tokenizer):
    dataset = Dataset.build(DOCUMENTS, tokenizer)
    counts = dataset.token_counts()
    assert counts.dtype == np.int64 and counts.shape == (tokenizer.vocab_size,)
    expected = collections.Counter(dataset.stream(0).tolist())
    assert {i: n for i, n in enumerate(counts.tolist()) if n} == dict(expected)
    assert counts[tokenizer.bos_id] == len(DOCUMENTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 0), "sequence_length: 0 is below 1"),
        ((4, 0, 0), "batch_size: 0 is not a positive multiple of 1 processes"),
        ((4, 6, 0, 0, 4), "batch_size: 6 is not a positive multiple of 4 processes"),
        ((4, 4, 0, 4, 4), r"process_index: 4 is not in 0\.\.3"),
        ((4, 4, 0, -1, 4), r"process_index: -1 is not in 0\.\.3"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        numbered([5]).batches(*arguments)


def test_no_tokens_and_negative_steps_end_in_one_line():
    with pytest.raises(ValueError, match="^data: the training part has no tokens$"):
        Dataset(("a",), (np.zeros(0, np.int32),), 0, 1).batches(4, 1, 0)
    with pytest.raises(ValueError, match="^step: -1 is below 0$"):
        numbered([5]).batches(4, 1, 0)(-1)


def test_windows_equal_a_hand_made_cut():
    windows = evaluation_windows(
        (("a", "abcdefg"), ("b", "xyz")), get_tokenizer("bytes", CORPUS), 4
    )
    a, b = map(list, (b"abcdefg", b"xyz"))
    expected = {
        0: ([[BOS, *a[:4]], [*a[3:7], BOS]], [[1, 1, 1, 1], [1, 1, 1, 0]], [4, 3]),
        1: ([[BOS, *b, BOS]], [[1, 1, 1, 0]], [3]),
    }
    assert sorted(windows.document[:2]) == [0, 1] and windows.document[2] == 0
    for document, (tokens, mask, num_bytes) in expected.items():
        chosen = windows.document == document
        np.testing.assert_array_equal(windows.tokens[chosen], tokens)
        np.testing.assert_array_equal(windows.mask[chosen], np.array(mask, bool))
        np.testing.assert_array_equal(windows.num_bytes[chosen], num_bytes)


@pytest.mark.parametrize("max_windows", [1, 3, 7, 12, None])
@pytest.mark.parametrize("length", [1, 5, 16, 1000])
def test_windows_count_each_byte_once_round_robin(tokenizer, length, max_windows):
    whole = evaluation_windows(DOCUMENTS, tokenizer, length)
    windows = evaluation_windows(DOCUMENTS, tokenizer, length, max_windows)
    for field in ("tokens", "mask", "document", "num_bytes"):
        np.testing.assert_array_equal(getattr(windows, field), getattr(whole, field)[:max_windows])
    count = len(windows.tokens)
    assert windows.tokens.shape == (count, length + 1) and windows.tokens.dtype == np.int32
    assert windows.mask.shape == (count, length) and windows.mask.dtype == bool
    predictions = collections.defaultdict(list)
    order = []
    for tokens, mask, document in zip(windows.tokens, windows.mask, windows.document, strict=True):
        before = predictions[int(document)]
        assert tokens[0] == (before[-1] if before else tokenizer.bos_id)
        order.append((len(before), int(document)))
        assert mask.any() and (np.diff(mask.astype(int)) <= 0).all()
        before += tokens[1:][mask].tolist()
    assert [rank for rank, _ in order] == sorted(rank for rank, _ in order)
    covered = windows.covered(DOCUMENTS)
    for i, (_, text) in enumerate(DOCUMENTS):
        ids, widths = tokenizer.encode_with_bytes(text)
        assert predictions.get(i, []) == ids[: len(predictions[i])].tolist()
        num_bytes = windows.num_bytes[windows.document == i].sum()
        assert num_bytes == widths[: len(predictions[i])].sum()
        assert covered[i] == text.encode()[:num_bytes]
        if max_windows is None and len(ids):
            assert covered[i] == text.encode()


def test_windows_do_not_depend_on_the_order_of_documents():
    tokenizer = get_tokenizer("bytes", CORPUS)
    first = evaluation_windows(DOCUMENTS, tokenizer, 8, 6)
    second = evaluation_windows(DOCUMENTS[::-1], tokenizer, 8, 6)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(first.document, len(DOCUMENTS) - 1 - second.document)


def test_bad_windows_end_in_one_line():
    tokenizer = get_tokenizer("bytes", CORPUS)
    with pytest.raises(ValueError, match="^sequence_length: 0 is below 1$"):
        evaluation_windows(DOCUMENTS, tokenizer, 0)
    with pytest.raises(ValueError, match="^max_windows: 0 is below 1$"):
        evaluation_windows(DOCUMENTS, tokenizer, 4, 0)
    with pytest.raises(ValueError, match="^data: the held-out documents have no tokens$"):
        evaluation_windows((("a", ""),), tokenizer, 4)

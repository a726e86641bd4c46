"""Documents to batches, and to windows for evaluation.

Training: BOS and the tokens of every document, in a seeded order, form one stream; row r of length
T + 1 is stream[r T : r T + T + 1], so that rows overlap by one token and an epoch predicts every
token of every document exactly once. Short documents share a row, long ones span several. A step
takes the next rows of Grain's endless shuffle of them (a new order each epoch): rows step B ..
step B + B - 1 where every batch has B rows, else those that `stages.rows_before` says. They are a
pure function of (data hash, seed, first row): the data position is the number of rows taken, and
processes take slices of the same global batch. Where training begins with shorter rows, `cut`
makes several of each, of the very same targets.

Grain is used by random access only, without workers: its order then depends on nothing but seed and
index, and no absl flag needs to be parsed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from v4jax.training.cache import cached
from v4jax.training.corpus import Document, name_fraction
from v4jax.training.tokenizer import Tokenizer


class Batch(NamedTuple):
    """One process's slice of a global batch.

    tokens int32 [B, T+1]: inputs are [:, :-1], targets [:, 1:].
    segment_ids int32 [B, T+1]: 1, 2, .. count the documents inside a row; 0 is padding (only at
    the end of the stream's last row, with BOS as token).
    """

    tokens: np.ndarray
    segment_ids: np.ndarray


def predicted(segment_ids: Any) -> Any:
    """bool [..., T] for segment_ids [..., T+1] (NumPy or JAX): which targets count in the loss.

    A target counts when it continues its input's document; so BOS and padding never do.
    """
    return (segment_ids[..., 1:] == segment_ids[..., :-1]) & (segment_ids[..., 1:] > 0)


def cut(batch: Batch, length: int) -> Batch:
    """Each row of T predicted tokens as T / length rows of `length`, overlapping by one token.

    [B, T+1] -> [B T / length, length+1]; a row's pieces follow each other. Every target is there
    once, after its own input, but what lies before a piece is out of its sight. Segments of each
    piece count from 1 again, padding stays 0. Raises ValueError where `length` does not divide T.
    """
    whole = batch.tokens.shape[1] - 1
    if length < 1 or whole % length:
        raise ValueError(f"length: {length} does not divide rows of {whole} tokens")
    if length == whole:
        return batch
    places = np.arange(0, whole, length)[:, None] + np.arange(length + 1)  # [T / length, length+1]
    tokens, segments = (field[:, places].reshape(-1, length + 1) for field in batch)
    return Batch(tokens, np.where(segments > 0, segments - segments[:, :1] + 1, 0))


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Tokenized documents.

    `documents` holds int32 ids [n] of each document, without BOS; `names` are theirs.
    """

    names: tuple[str, ...]
    documents: tuple[np.ndarray, ...]
    bos_id: int
    vocab_size: int

    @classmethod
    def build(
        cls,
        documents: Sequence[Document],
        tokenizer: Tokenizer,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Dataset:
        """Tokenizes (name, text) documents, on all cores; keeps the ids in `cache_dir` if given."""
        texts = [text for _, text in documents]
        if cache_dir is None:
            ids = tokenizer.encode_batch(texts)
        else:
            key = hashlib.sha256(tokenizer.hash.encode())
            for text in texts:
                key.update(hashlib.sha256(text.encode()).digest())
            path = pathlib.Path(cache_dir) / f"tokens-{key.hexdigest()[:32]}"
            ids = _from_bytes(cached(path, lambda: _to_bytes(tokenizer.encode_batch(texts))))
        names = tuple(name for name, _ in documents)
        return cls(names, tuple(ids), tokenizer.bos_id, tokenizer.vocab_size)

    @functools.cached_property
    def hash(self) -> str:
        """sha256 (hex) over names, token ids and BOS: what the batches depend on, but the seed."""
        digest = hashlib.sha256(f"{self.bos_id} {self.vocab_size}".encode())
        for name, ids in zip(self.names, self.documents, strict=True):
            digest.update(f"\n{len(name)} {len(ids)} {name}".encode("utf-8", "surrogateescape"))
            digest.update(ids.astype("<i4").tobytes())
        return digest.hexdigest()

    @property
    def num_tokens(self) -> int:
        """Tokens predicted in an epoch: all but the documents' BOS."""
        return sum(len(ids) for ids in self.documents)

    def token_counts(self) -> np.ndarray:
        """int64 [V]: how often each token occurs in an epoch's stream, BOS included."""
        counts = np.zeros(self.vocab_size, np.int64)
        for ids in self.documents:
            counts += np.bincount(ids, minlength=self.vocab_size)
        counts[self.bos_id] += len(self.documents)
        return counts

    def stream(self, seed: int) -> np.ndarray:
        """int32 [n]: BOS and tokens of every document, documents in the seed's order."""
        order = _order(self.names, f"stream {seed}")
        bos = np.array([self.bos_id], np.int32)
        return np.concatenate([part for i in order for part in (bos, self.documents[i])])

    def batches(
        self,
        sequence_length: int,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Batches:
        """Batches of `batch_size` rows over all processes, and this process's share of them.

        sequence_length is T in tokens; rows hold T + 1. Raises ValueError with one line naming
        the argument.
        """
        if sequence_length < 1:
            raise ValueError(f"sequence_length: {sequence_length} is below 1")
        if batch_size < 1 or process_count < 1 or batch_size % process_count:
            raise ValueError(
                f"batch_size: {batch_size} is not a positive multiple of {process_count} processes"
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index: {process_index} is not in 0..{process_count - 1}")
        rows = _Rows(self.stream(seed), sequence_length, self.bos_id)
        return Batches(rows, batch_size, seed, process_index, process_count)


def _to_bytes(documents: Sequence[np.ndarray]) -> bytes:
    """Their number, their lengths and their ids, as little-endian int64 and int32."""
    lengths = np.array([len(documents), *map(len, documents)], "<i8")
    return b"".join(array.tobytes() for array in (lengths, *(d.astype("<i4") for d in documents)))


def _from_bytes(content: bytes) -> list[np.ndarray]:
    count = int(np.frombuffer(content, "<i8", 1)[0])
    lengths = np.frombuffer(content, "<i8", count, offset=8)
    ids = np.frombuffer(content, "<i4", offset=8 * (1 + count)).astype(np.int32)
    return np.split(ids, np.cumsum(lengths)[:-1]) if count else []


def _order(names: Sequence[str], salt: str) -> list[int]:
    """Indices of names, shuffled by hash: no library's generator can change the order."""
    return sorted(range(len(names)), key=lambda i: (name_fraction(names[i], salt), i))


class _Rows:
    """Random access to the rows of a stream, as a Grain source: row r is a Batch of [T+1]."""

    def __init__(self, stream: np.ndarray, sequence_length: int, bos_id: int):
        self._stream = stream
        self._sequence_length = sequence_length
        self._bos_id = bos_id

    def __len__(self) -> int:
        return -(-(len(self._stream) - 1) // self._sequence_length)

    def __getitem__(self, row: int) -> Batch:
        start = row * self._sequence_length
        tokens = self._stream[start : start + self._sequence_length + 1]
        segments = np.cumsum(tokens == self._bos_id, dtype=np.int32)
        segments += 1 - segments[0]  # a row that starts inside a document starts with segment 1
        padding = (0, self._sequence_length + 1 - len(tokens))
        return Batch(
            np.pad(tokens, padding, constant_values=self._bos_id), np.pad(segments, padding)
        )


class Batches:
    """Batches of a run; built by `Dataset.batches`.

    `epoch_rows` is the number of rows in an epoch, `epoch_steps` the same in (fractional) steps of
    the whole batch size.
    """

    def __init__(
        self, rows: _Rows, batch_size: int, seed: int, process_index: int, process_count: int
    ):
        if len(rows) < 1:
            raise ValueError("data: the training part has no tokens")
        self._rows = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
        self._batch_size = batch_size
        self._process_index, self._process_count = process_index, process_count
        self.epoch_rows = len(rows)
        self.epoch_steps = len(rows) / batch_size

    def __call__(self, step: int) -> Batch:
        """This process's rows of global batch `step` (>= 0): [B / process_count, T+1] each."""
        if step < 0:
            raise ValueError(f"step: {step} is below 0")
        return self.rows(int(step) * self._batch_size, self._batch_size)

    def rows(self, first: int, count: int) -> Batch:
        """This process's slice of rows `first` .. `first + count - 1` of the endless order.

        [count / process_count, T+1] each. Raises ValueError, one line, where `first` is below 0
        or `count` is no positive multiple of the processes.
        """
        if first < 0:
            raise ValueError(f"first: {first} is below 0")
        if count < 1 or count % self._process_count:
            raise ValueError(
                f"count: {count} is not a positive multiple of {self._process_count} processes"
            )
        share = count // self._process_count
        start = int(first) + self._process_index * share
        rows = [self._rows[start + i] for i in range(share)]
        return Batch(*(np.stack(field) for field in zip(*rows, strict=True)))


@dataclasses.dataclass(frozen=True, eq=False)
class EvalWindows:
    """Windows over held-out documents; W windows of T predicted tokens each.

    tokens int32 [W, T+1]: inputs [:, :-1], targets [:, 1:]; one document a window, so the model
      needs no segment_ids. BOS fills the end of a document's last window.
    mask bool [W, T]: targets that count.
    document int64 [W]: index of the window's document in the documents given.
    num_bytes int64 [W]: bytes of text that the counted targets stand for. Each byte of a document
      belongs to exactly one of its windows (BOS is only ever an input).
    """

    tokens: np.ndarray
    mask: np.ndarray
    document: np.ndarray
    num_bytes: np.ndarray

    def covered(self, documents: Sequence[Document]) -> list[bytes]:
        """What the windows cover of each document: a prefix of its UTF-8 bytes, maybe empty.

        Windows are taken in order from a document's start, so their bytes are always a prefix.
        """
        lengths = np.zeros(len(documents), np.int64)
        np.add.at(lengths, self.document, self.num_bytes)
        return [text.encode()[:n] for (_, text), n in zip(documents, lengths.tolist(), strict=True)]


def evaluation_windows(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    sequence_length: int,
    max_windows: int | None = None,
) -> EvalWindows:
    """Cuts documents into windows of `sequence_length` predicted tokens, overlapping by one token.

    The first windows of all documents come first, then the second ones and so on, up to
    `max_windows` (None: all), so that few windows still cover many documents. Documents are
    taken in an order of their names' hashes, so that few windows are a fair sample of them; the
    result does not depend on the order given, apart from `document`. Every window is complete
    but a document's last. Raises ValueError when there is nothing to predict.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length: {sequence_length} is below 1")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows: {max_windows} is below 1")
    encoded = []
    for i in _order([name for name, _ in documents], "evaluation"):
        ids, widths = tokenizer.encode_with_bytes(documents[i][1])
        if len(ids):
            encoded.append((i, ids, widths))
        if len(encoded) == max_windows:
            break
    places = sorted(
        (start, rank)
        for rank, (_, ids, _) in enumerate(encoded)
        for start in range(0, len(ids), sequence_length)
    )[:max_windows]
    if not places:
        raise ValueError("data: the held-out documents have no tokens")
    shape = (len(places), sequence_length + 1)
    tokens = np.full(shape, tokenizer.bos_id, np.int32)
    mask = np.zeros((shape[0], sequence_length), bool)
    num_bytes = np.zeros(shape[0], np.int64)
    document = np.zeros(shape[0], np.int64)
    for window, (start, rank) in enumerate(places):
        document[window], ids, widths = encoded[rank]
        end = min(start + sequence_length, len(ids))
        tokens[window, 0] = ids[start - 1] if start else tokenizer.bos_id
        tokens[window, 1 : 1 + end - start] = ids[start:end]
        mask[window, : end - start] = True
        num_bytes[window] = widths[start:end].sum()
    return EvalWindows(tokens, mask, document, num_bytes)

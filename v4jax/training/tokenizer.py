"""Tokenizers: a byte-level BPE trained on the training part, plain bytes, or any tokenizer.json.

All three are one class around a `tokenizers.Tokenizer`, so a run saves and loads any of them as the
file `tokenizer.json` in its folder.

The document start (BOS) is a special token that text never produces: its literal spelling inside a
text is encoded as ordinary characters. It stands for no bytes.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from v4jax.training.cache import cached
from v4jax.training.corpus import Corpus
from v4jax.training.files import as_path, write_whole

BOS = "<|bos|>"
# Special tokens that a foreign tokenizer.json may already have for the start of a document.
_KNOWN_BOS = (BOS, "<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>", "<bos>", "<|endoftext|>")
_FILE = "tokenizer.json"
_CHUNK_BYTES = 1 << 22
# Whatever normalisers, prefix spaces and lossy splits would change.
_PROBE = "a  b\tc\r\ne\u0301\u00e9 \ufb01 中\U0001f600\x01 It's 007\n\n    x "


class Tokenizer:
    """Text to int32 ids and back.

    Attributes: `vocab_size` (ids are below it, the added BOS included), `bos_id`, `name`
    ("bytes" or "<kind>-<vocab_size>"), `exact` (every id is a fixed byte string and a text's
    tokens are its bytes: true for byte-level tokenizers, whose round trip is therefore exact).
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        """Takes over `backend`: adds BOS if it has none, and switches off padding and the like."""
        backend.no_padding()
        backend.no_truncation()
        special = {
            token.content: id
            for id, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        bos = next((token for token in _KNOWN_BOS if token in special), BOS)
        if bos not in special:
            backend.add_special_tokens([AddedToken(bos, normalized=False, special=True)])
            special[bos] = backend.get_vocab()[bos]
        backend.encode_special_tokens = True  # a special token's spelling in a text is just text
        self._backend = backend
        self._table = _byte_table(backend)
        self._lengths = np.array([len(entry or b"") for entry in self._table], np.int64)
        self.bos_id = special[bos]
        self.vocab_size = len(self._table)
        self._is_bytes = self._table == [bytes([i]) for i in range(256)] + [b""]
        kind = type(backend.model).__name__.lower()
        self.name = "bytes" if self._is_bytes else f"{kind}-{self.vocab_size}"
        self.exact = True
        self.exact = self._reproduces_probe()

    @functools.cached_property
    def hash(self) -> str:
        """sha256 (hex) of the tokenizer and of the library's version: what its ids depend on."""
        content = f"{tokenizers.__version__} {self._backend.to_str()}"
        return hashlib.sha256(content.encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """int32 ids [n] of a text, without BOS or other special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts, on all cores."""
        if self._is_bytes:
            return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) for t in texts]
        ids = []
        # In chunks: an encoding takes some 100 bytes a token until its ids are copied out.
        for chunk in _chunks(texts):
            encodings = self._backend.encode_batch_fast(chunk, add_special_tokens=False)
            ids += [np.array(encoding.ids, np.int32) for encoding in encodings]
        return ids

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [n], bytes of the text that each token stands for, int64 [n]).

        The bytes sum to the text's UTF-8 bytes for every tokenizer (unless a lossy one makes no
        token at all of it). Where a tokenizer is not exact they come from character offsets:
        what a token's predecessors did not reach counts with it, and an unreached end of the
        text with the last token.
        """
        if self.exact:
            ids = self.encode(text)
            return ids, self.token_bytes(ids)
        text.encode()  # raises for lone surrogates, with a clearer message than the backend's
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        if not len(ids):
            return ids, np.zeros(0, np.int64)
        codepoints = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        widths = 1 + sum((codepoints > top).astype(np.int64) for top in (0x7F, 0x7FF, 0xFFFF))
        byte_at = np.concatenate([[0], np.cumsum(widths)])
        ends = np.array([end for _, end in encoding.offsets])
        ends[-1] = len(codepoints)
        return ids, np.diff(byte_at[ends], prepend=0)

    def token_bytes(self, ids: np.ndarray) -> np.ndarray:
        """Bytes of each token, int64 in the shape of ids; they sum to the bytes of the text.

        Raises ValueError for a tokenizer that is not exact, where a token's bytes depend on the
        text around it: use `encode_with_bytes`.
        """
        if not self.exact:
            raise ValueError(f"tokenizer: {self.name} is not byte-level: use encode_with_bytes")
        return self._lengths[ids]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of ids; exactly the encoded text's for an exact tokenizer. BOS has none.

        Raises ValueError for an id outside the vocabulary.
        """
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ids.size and not (0 <= ids.min() and ids.max() < self.vocab_size):
            top = self.vocab_size - 1
            raise ValueError(f"ids: {ids.min()}..{ids.max()} is not within 0..{top}")
        if not self.exact:
            return self._backend.decode(ids.tolist(), skip_special_tokens=True).encode()
        return b"".join(self._table[i] or b"" for i in ids.tolist())

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; bytes that are no valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` into a folder (made if absent), atomically."""
        write_whole(as_path(folder) / _FILE, self._backend.to_str().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads a tokenizer.json, or the one in a folder.

        Raises ValueError with one line when there is none or it is damaged.
        """
        path = as_path(path)
        file = path / _FILE if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"tokenizer: no file {file}")
        return cls(_parse(file.read_bytes(), str(file)))

    def _reproduces_probe(self) -> bool:
        ids = self.encode(_PROBE)
        known = all(self._table[i] is not None for i in ids.tolist())
        return known and self.decode_bytes(ids) == _PROBE.encode()


def get_tokenizer(
    spec: str | None,
    corpus_train: Corpus,
    vocab_size: int = 2048,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Tokenizer:
    """The tokenizer that `spec` asks for.

    None or "bpe": a byte-level BPE of `vocab_size` entries (256 bytes and BOS among them) trained
    on `corpus_train`; a small corpus may give fewer. It is kept in `cache_dir`, if given, under
    the corpus hash, the size and the version of the tokenizers library; a damaged cache file is
    trained again with a warning. "bytes": ids are bytes, 256 is BOS. Anything else: the path of a
    tokenizer.json or of a folder with one. Raises ValueError with one line for anything else.
    """
    if spec == "bytes":
        return Tokenizer(_byte_level(models.BPE(vocab=_byte_vocabulary(), merges=[]), regex=False))
    if spec not in (None, "bpe"):
        if not Path(spec).exists():
            raise ValueError(f"tokenizer: {spec!r} is not bpe, bytes or the path of a {_FILE}")
        return Tokenizer.load(spec)
    if vocab_size < 257:
        raise ValueError(f"vocab_size: {vocab_size} is below 257 (256 bytes and document start)")
    if cache_dir is None:
        return Tokenizer(_train(corpus_train, vocab_size))
    version = tokenizers.__version__
    name = f"bpe-{corpus_train.hash[:16]}-{vocab_size}-tokenizers-{version}.json"
    path = Path(cache_dir) / name
    content = cached(path, lambda: _train(corpus_train, vocab_size).to_str().encode())
    return Tokenizer(_parse(content, str(path)))


def _train(corpus: Corpus, vocab_size: int) -> tokenizers.Tokenizer:
    backend = _byte_level(models.BPE(), regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(BOS, normalized=False, special=True)],
        initial_alphabet=list(_byte_vocabulary()),
        show_progress=False,
    )
    backend.train_from_iterator((text for _, text in corpus.documents), trainer)
    return backend


def _byte_level(model: models.Model, regex: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_vocabulary() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else from U+0100 up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {chr(b if b in printable else next(others)): b for b in range(256)}


def _byte_table(backend: tokenizers.Tokenizer) -> list[bytes | None]:
    """Bytes of each id below the vocabulary's size.

    None where a token is not spelled in the byte alphabet or an id is not used; special tokens
    have no bytes.
    """
    alphabet = _byte_vocabulary()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    table: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for token, id in vocabulary.items():
        if all(c in alphabet for c in token):
            table[id] = bytes(alphabet[c] for c in token)
    for id, added in backend.get_added_tokens_decoder().items():
        table[id] = b"" if added.special else added.content.encode()
    return table


def _chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text.encode())  # raises UnicodeEncodeError, a ValueError, for lone surrogates
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _parse(content: bytes, where: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"tokenizer: {where} is not a valid tokenizer.json: {error}") from error

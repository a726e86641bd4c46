"""Tokenizers: exact round trips, bytes per token, determinism, the cache, foreign files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from v4jax.training import tokenizer as tokenizer_module
from v4jax.training.corpus import Corpus
from v4jax.training.tokenizer import BOS, Tokenizer, get_tokenizer

LINES = "".join(
    f"    def method_{i % 17}(self, x):\n        return x + {i}\n\n" for i in range(300)
)
CORPUS = Corpus(
    (("a.py", LINES), ("b.txt", "naïve café 中文 😀 " * 20), ("c.py", "x = 1\r\n" * 9)), ""
)


@pytest.fixture(scope="module")
def bpe():
    return get_tokenizer("bpe", CORPUS, 300)


@pytest.fixture(scope="module")
def plain_bytes():
    return get_tokenizer("bytes", CORPUS)


@pytest.fixture(scope="module", params=["bpe", "bytes", "foreign"])
def exact_tokenizer(request):
    if request.param == "foreign":
        return Tokenizer(byte_level())
    return get_tokenizer(request.param, CORPUS, 300)


def byte_level(normalizer=None, add_prefix_space=False):
    """A foreign byte-level tokenizer with no BOS of ours."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # its own order of ids
    vocabulary = {"[UNK]": 0} | {c: i + 1 for i, c in enumerate(alphabet)} | {"ab": 257}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    return backend


def word_piece():
    words = {"[UNK]": 0, "the": 1, "cat": 2, "##s": 3, "é": 4, "ca": 5}
    backend = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def metaspace():
    pieces = [("<unk>", 0.0), ("▁", -1.0), ("▁a", -1.5), ("a", -2.0), ("b", -2.0), ("😀", -2.0)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


FOREIGN = {
    "exact": (byte_level, True),
    "nfc": (lambda: byte_level(normalizers.NFC()), False),
    "prefix": (lambda: byte_level(add_prefix_space=True), False),
    "word_piece": (word_piece, False),
    "metaspace": (metaspace, False),
}


@given(text=st.text())
@example(text="")
@example(text="\r\n\r\n \t\x00\x7f")
@example(text="e\u0301 \u00e9 \ufeff \u2028 \U0010ffff 👩‍👩‍👧")
@example(text=f"a {BOS} b<s>{BOS}")
@example(text="def f(x):\n    return x  \n")
def test_round_trip_is_exact(exact_tokenizer, text):
    tokenizer = exact_tokenizer
    assert tokenizer.exact
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.token_bytes(ids).sum() == len(text.encode())
    assert (ids >= 0).all() and (ids < tokenizer.vocab_size).all()
    assert tokenizer.bos_id not in ids  # not even where the text spells it
    with_bytes, widths = tokenizer.encode_with_bytes(text)
    np.testing.assert_array_equal(with_bytes, ids)
    np.testing.assert_array_equal(widths, [len(tokenizer.decode_bytes([i])) for i in ids])


def test_bytes_are_bytes(plain_bytes):
    assert (plain_bytes.name, plain_bytes.vocab_size, plain_bytes.bos_id) == ("bytes", 257, 256)
    np.testing.assert_array_equal(plain_bytes.encode("é\x00"), [0xC3, 0xA9, 0])
    for byte in range(256):
        assert plain_bytes.decode_bytes([byte]) == bytes([byte])
    # The fast path agrees with the backend that a saved file holds.
    text = "".join(map(chr, range(300)))
    slow = plain_bytes._backend.encode(text, add_special_tokens=False).ids
    np.testing.assert_array_equal(plain_bytes.encode(text), slow)


def test_bpe_has_the_asked_size_all_bytes_and_bos(bpe):
    assert (bpe.vocab_size, bpe.name) == (300, "bpe-300")
    assert bpe.token_bytes(np.array([bpe.bos_id])) == 0
    assert bpe.decode([bpe.bos_id, *bpe.encode("x"), bpe.bos_id]) == "x"
    assert sorted(bpe.decode_bytes([i]) for i in range(300) if bpe._lengths[i] == 1) == [
        bytes([b]) for b in range(256)
    ]
    assert len(bpe.encode(LINES)) < len(LINES) / 2
    # Part of a character is bytes, and U+FFFD as text.
    first = bpe.encode("\U000e0101")[:1]
    assert bpe.decode_bytes(first) == b"\xf3" and bpe.decode(first) == "\ufffd"


def test_batches_equal_single_texts(bpe, plain_bytes, monkeypatch):
    texts = [LINES[i : i + 97] for i in range(0, 3000, 97)] + ["", "é"]
    for chunk in (64, 1 << 22):
        monkeypatch.setattr(tokenizer_module, "_CHUNK_BYTES", chunk)
        for tokenizer in (bpe, plain_bytes):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert bpe.encode_batch([]) == []


def test_training_is_deterministic(bpe):
    again = get_tokenizer(None, CORPUS, 300)
    assert again._backend.to_str() == bpe._backend.to_str()


def test_text_without_utf8_form_raises_value_error(bpe, plain_bytes):
    for tokenizer in (bpe, plain_bytes, Tokenizer(word_piece())):
        for encode in (tokenizer.encode, tokenizer.encode_with_bytes):
            with pytest.raises(ValueError, match="surrogates not allowed"):
                encode("a\ud800")


@pytest.mark.parametrize("ids", [[-1], [0, 300]])
def test_foreign_ids_raise(bpe, ids):
    with pytest.raises(ValueError, match=r"^ids: .* is not within 0..299$"):
        bpe.decode(ids)


@pytest.mark.parametrize("kind", ["bpe", "plain_bytes", *FOREIGN])
def test_save_and_load(kind, request, tmp_path):
    tokenizer = Tokenizer(FOREIGN[kind][0]()) if kind in FOREIGN else request.getfixturevalue(kind)
    tokenizer.save(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["tokenizer.json"]
    for path in (tmp_path / "run", tmp_path / "run" / "tokenizer.json"):
        loaded = get_tokenizer(str(path), CORPUS)
        for field in ("name", "vocab_size", "bos_id", "exact"):
            assert getattr(loaded, field) == getattr(tokenizer, field)
        text = f"The cats ab {BOS} é"
        np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))


@pytest.mark.parametrize("kind", FOREIGN)
def test_any_tokenizer_file_gets_bos_and_bytes(kind):
    backend, exact = FOREIGN[kind][0](), FOREIGN[kind][1]
    size = backend.get_vocab_size()
    tokenizer = Tokenizer(backend)
    assert tokenizer.exact == exact
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (size, size + 1)
    for text in ("ab a  b", "the Cats é", "  e\u0301e\u0301 😀 a\n\n", "😀😀ab", "q"):
        ids, widths = tokenizer.encode_with_bytes(text)
        assert widths.dtype == np.int64 and widths.shape == ids.shape
        assert widths.sum() == len(text.encode()) and (widths >= 0).all()
        assert isinstance(tokenizer.decode(ids), str)
    if not exact:
        with pytest.raises(ValueError, match="is not byte-level: use encode_with_bytes"):
            tokenizer.token_bytes(ids)


def test_bytes_of_an_inexact_tokenizer_follow_its_offsets():
    tokenizer = Tokenizer(word_piece())
    ids, widths = tokenizer.encode_with_bytes("  THE cats\t\u00e9!é ")
    # "  THE", " cat", "s", "\té" (accents are stripped: unknown), "!", "é " with the unreached end.
    assert tokenizer.decode(ids[:3]) == "the cats"
    np.testing.assert_array_equal(widths, [5, 4, 1, 3, 1, 3])
    assert [len(part) for part in tokenizer.encode_with_bytes(" \n ")] == [0, 0]


def test_own_bos_and_padding_of_a_foreign_file():
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<pad>", special=True)])
    backend.enable_padding(length=50, pad_token="<pad>", pad_id=259)
    backend.enable_truncation(2)
    tokenizer = Tokenizer(backend)
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (258, 260)
    ids = tokenizer.encode("<s>xyz<pad>")
    assert len(ids) == 11 and tokenizer.decode(ids) == "<s>xyz<pad>"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not bpe, bytes or the path"), ("{", "not a valid"), ('{"a": 1}', "not a valid")],
)
def test_bad_tokenizer_files_end_in_one_line(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError) as error:
        get_tokenizer(str(path), CORPUS)
    assert str(error.value).startswith("tokenizer: ") and message in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="^tokenizer: no file"):
        Tokenizer.load(tmp_path / "nowhere")


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ValueError, match="^vocab_size: 256 is below 257"):
        get_tokenizer("bpe", CORPUS, 256)
    assert get_tokenizer("bpe", CORPUS, 257).vocab_size == 257


def test_the_cache_is_used_and_keyed(tmp_path, bpe, monkeypatch):
    cached = get_tokenizer(None, CORPUS, 300, tmp_path / "cache")
    other = Corpus((("a", "other"),), "")
    for corpus, size in ((CORPUS, 290), (other, 300)):
        get_tokenizer(None, corpus, size, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3  # and no temporary file
    monkeypatch.setattr(tokenizer_module, "_train", None)
    again = get_tokenizer("bpe", CORPUS, 300, tmp_path / "cache")
    for tokenizer in (cached, again):
        np.testing.assert_array_equal(tokenizer.encode(LINES), bpe.encode(LINES))
        assert (tokenizer.bos_id, tokenizer.name) == (bpe.bos_id, bpe.name)


def test_a_damaged_cache_file_is_trained_again_with_a_warning(tmp_path, bpe):
    get_tokenizer(None, CORPUS, 300, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damaged = [b"", b"\n", whole[:30], whole[: len(whole) // 2], whole[:-1], whole + b" "]
    generator = np.random.default_rng(0)
    for place in [0, 64, 65, *generator.integers(len(whole), size=10)]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << generator.integers(8)
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        with pytest.warns(UserWarning, match="cache file .* is damaged; making it again"):
            tokenizer = get_tokenizer(None, CORPUS, 300, tmp_path)
        np.testing.assert_array_equal(tokenizer.encode(LINES), bpe.encode(LINES))
        assert path.read_bytes() == whole


def test_saved_file_is_an_ordinary_tokenizer_json(bpe, tmp_path):
    bpe.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    np.testing.assert_array_equal(backend.encode(LINES).ids, bpe.encode(LINES))

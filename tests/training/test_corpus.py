"""Corpora: the default listing, every kind of file, the split, and one-line errors."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4jax.training.corpus import Corpus, load_corpus, split


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def test_default_corpus_is_the_standard_library_without_its_tests():
    corpus = load_corpus()
    names = [name for name, _ in corpus.documents]
    assert names == sorted(set(names)) and len(names) > 400
    assert {"json/decoder.py", "asyncio/events.py", "argparse.py"} <= set(names)
    for name in names:
        assert name.endswith(".py") and not name.startswith("_sysconfigdata")
        folders = set(name.split("/")[:-1])
        assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert 8e6 < corpus.num_bytes < 20e6
    stored = Path(json.decoder.__file__).read_bytes()
    assert dict(corpus.documents)["json/decoder.py"].encode() == stored
    assert platform.python_version() in corpus.description
    assert corpus.hash[:12] in corpus.description
    assert load_corpus().hash == corpus.hash
    train, held_out = split(corpus)
    assert len(train.documents) + len(held_out.documents) == len(names)
    assert 0.05 < len(held_out.documents) / len(names) < 0.15


def test_folder_of_all_kinds_is_read_exactly_and_in_order(tmp_path):
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    (tmp_path / "sub" / "b.py").write_bytes(b"x = 1\r\ny = '\xc3\xa9'\n")
    (tmp_path / "sub" / ".git" / "config").write_text("hidden")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "z.md").write_bytes("\ufeffbyte order mark 😀".encode())
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "binary.bin").write_bytes(b"\x00\x01")
    # U+2028 inside a JSON string is no end of line; blank lines and \r\n are fine.
    first = json.dumps({"text": "one\u2028two", "id": 1}, ensure_ascii=False)
    lines = [first, "", '{"text":"\\r\\n"}\r', '{"text":"\\ud800"}']
    (tmp_path / "c.jsonl").write_bytes("\n".join(lines).encode())
    write_parquet(tmp_path / "a.parquet", text=["p", "q 中"], other=[1, 2])
    corpus = load_corpus(str(tmp_path))
    assert corpus.documents == (
        ("a.parquet:1", "p"),
        ("a.parquet:2", "q 中"),
        ("c.jsonl:1", "one\u2028two"),
        ("c.jsonl:3", "\r\n"),
        ("sub/b.py", "x = 1\r\ny = 'é'\n"),
        ("z.md", "\ufeffbyte order mark 😀"),
    )
    assert corpus.skipped == 3 and "3 skipped" in corpus.description
    moved = tmp_path.rename(tmp_path.parent / (tmp_path.name + "-moved"))
    assert load_corpus(str(moved)).hash == corpus.hash


def test_single_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    write_parquet(tmp_path / "a.parquet", text=["one", "two"])
    for name in ("a.jsonl", "a.parquet"):
        documents = load_corpus(str(tmp_path / name)).documents
        assert documents == ((f"{name}:1", "one"), (f"{name}:2", "two"))


def test_a_single_text_is_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i} \u00e9\r\n" for i in range(20_000))
    (tmp_path / "a.txt").write_bytes(text.encode())
    corpus = load_corpus(str(tmp_path / "a.txt"))
    parts = [part for _, part in corpus.documents]
    assert "".join(parts) == text
    assert all(part.endswith("\r\n") for part in parts)
    assert all(16_384 <= len(part.encode()) < 16_500 for part in parts[:-1])
    assert len(dict(corpus.documents)) == len(parts)
    split(corpus)
    # In a folder, files are documents.
    (tmp_path / "b.txt").write_text("b")
    assert [name for name, _ in load_corpus(str(tmp_path)).documents] == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "a.jsonl line 1 is not valid JSON"),
        ("a.jsonl", b'\n{"content": "a"}', 'a.jsonl line 2 has no string field "text"'),
        ("a.jsonl", b'{"text": null}', 'a.jsonl line 1 has no string field "text"'),
        ("a.jsonl", b'["text"]', 'a.jsonl line 1 has no string field "text"'),
        ("a.parquet", b"PAR1 nonsense", "a.parquet is not a readable Parquet file"),
        ("a.parquet", b"", "a.parquet is not a readable Parquet file"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\xff\xfe", "holds no text (1 files are not UTF-8 text)"),
    ],
)
def test_bad_files_end_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for data in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError) as error:
            load_corpus(str(data))
        assert one_line(error).startswith("data: ") and message in one_line(error)


def test_bad_parquet_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", content=["a"], id=[1])
    with pytest.raises(ValueError) as error:
        load_corpus(str(tmp_path))
    assert 'a.parquet has no column "text" (columns: content, id)' in one_line(error)
    for bad in (["a", None], [1, 2]):
        write_parquet(tmp_path / "a.parquet", text=bad)
        with pytest.raises(ValueError, match="a.parquet row . has no string"):
            load_corpus(str(tmp_path))


def test_truncated_parquet(tmp_path):
    write_parquet(tmp_path / "whole.parquet", text=[f"text {i}" * 50 for i in range(100)])
    content = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "whole.parquet").unlink()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError) as error:
        load_corpus(str(tmp_path))
    assert "a.parquet is not a readable Parquet file" in one_line(error)


def test_missing_pyarrow_and_missing_path(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", text=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError) as error:
        load_corpus(str(tmp_path))
    assert "a.parquet needs pyarrow (pip install pyarrow)" in one_line(error)
    with pytest.raises(ValueError, match="^data: no such file or folder: .*nowhere$"):
        load_corpus(str(tmp_path / "nowhere"))


def test_the_hash_sees_names_contents_and_borders():
    documents = (("a", "bc"), ("d", "e"))
    variants = [
        documents,
        (("ab", "c"), ("d", "e")),
        (("a", "bcd"), ("", "e")),
        (("a", "bc"), ("d", "f")),
        (("d", "e"), ("a", "bc")),
        (("a", "bc"),),
    ]
    assert len({Corpus(variant, "").hash for variant in variants}) == len(variants)
    assert Corpus(documents, "one").hash == Corpus(documents, "other", skipped=1).hash


@given(names=st.sets(st.text(max_size=5), min_size=30, max_size=60), data=st.data())
def test_split_depends_on_name_and_seed_only(names, data):
    documents = [(name, "text") for name in sorted(names)]
    seed = data.draw(st.integers(0, 3))
    train, held_out = split(Corpus(tuple(documents), ""), 0.4, seed)
    assert sorted(train.documents + held_out.documents) == documents
    fewer = data.draw(st.permutations(documents))[:25]
    sides = set(train.documents), set(held_out.documents)
    if sides[0] & set(fewer) and sides[1] & set(fewer):
        for part, side in zip(split(Corpus(tuple(fewer), ""), 0.4, seed), sides, strict=True):
            assert part.documents == tuple(d for d in fewer if d in side)


def test_split_shares_and_seeds():
    corpus = Corpus(tuple((f"file{i}", "x") for i in range(10_000)), "")
    for share in (0.1, 0.5):
        _, held_out = split(corpus, share, seed=1)
        assert abs(len(held_out.documents) / 10_000 - share) < 0.02
    assert split(corpus, seed=1)[1].hash != split(corpus, seed=2)[1].hash


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("share", [1e-6, 1 - 1e-6])
def test_an_empty_part_ends_in_one_line(count, share):
    corpus = Corpus(tuple((f"file{i}", "x") for i in range(count)), "here")
    with pytest.raises(ValueError) as error:
        split(corpus, share)
    part = "training" if share > 0.5 else "held-out"
    assert one_line(error).startswith(f"data: the {part} part of here is empty")


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_a_bad_share_ends_in_one_line(share):
    with pytest.raises(ValueError, match="^held_out: .* is not a share between 0 and 1$"):
        split(Corpus((("a", "b"),), ""), share)


def test_corpus_tokenizer_and_context_models_leave_jax_alone():
    program = (
        "import sys, v4jax.training.context_models, v4jax.training.tokenizer; "
        "sys.exit('jax' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0

"""Documents to train on: local files, the Python standard library when none are named, or tasks.

A document is a (name, text) pair. Names are unique paths relative to what was given (with the line
or row inside JSONL and Parquet), so that moving a folder changes neither the hash nor the split.
Texts are kept exactly as stored: no newline translation, no normalisation.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from v4jax.training import tasks

Document = tuple[str, str]

# The standard library's own tests, installed packages, and files that the build of an interpreter
# generates (they hold paths of the machine that built it).
_STDLIB_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_STDLIB_GENERATED = ("_sysconfigdata", "config-")
_PART_BYTES = 16_384


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, and where they came from.

    `source` is for people; `skipped` counts what was left out because it is not UTF-8 text.
    """

    documents: tuple[Document, ...]
    source: str
    skipped: int = 0

    @functools.cached_property
    def hash(self) -> str:
        """sha256 (hex) over all names and contents, in order."""
        digest = hashlib.sha256()
        for document in self.documents:
            for part in document:
                data = part.encode("utf-8", "surrogateescape")  # file names may hold any byte
                digest.update(len(data).to_bytes(8, "little"))
                digest.update(data)
        return digest.hexdigest()

    @functools.cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(len(text.encode()) for _, text in self.documents)

    @property
    def description(self) -> str:
        """One line to print: source, documents, bytes, what was skipped, hash."""
        skipped = f", {self.skipped} skipped (not UTF-8 text)" if self.skipped else ""
        return (
            f"{self.source}: {len(self.documents):,} documents, {self.num_bytes:,} bytes{skipped}, "
            f"sha256 {self.hash[:12]}"
        )


def load_corpus(data: str | None = None) -> Corpus:
    """Reads `data`: a text, JSONL or Parquet file, a folder of these, "task:..." or None.

    None is the embedded default, the source text of this Python's standard library without its
    tests. `.jsonl` files hold one object a line with the text under "text", `.parquet` files a
    string column "text"; every other file is one UTF-8 document. A folder is read recursively,
    sorted by path, without hidden files. A file that is a single document is cut at line ends into
    parts of about 16 KiB, because one document could not be split into training and held-out.
    Files that are not UTF-8 text (or hold NUL bytes) and empty documents are left out; the former
    are counted. "task:recall" and the like are generated (`v4jax.training.tasks`).

    Raises ValueError with one line when `data` does not exist, holds no document, or a JSONL or
    Parquet file is not as described.
    """
    if data is not None and data.startswith(tasks.PREFIX):
        task = tasks.parse(data)
        return Corpus(tasks.documents(task), task.spec)
    if data is None:
        root = Path(sysconfig.get_path("stdlib"))
        names = [name for name in _walk(root, _STDLIB_EXCLUDED) if _in_default_corpus(name)]
        source = f"Python {platform.python_version()} standard library"
        if not names:
            raise ValueError(f"data: no Python source under {root}: name text files with --data")
    else:
        root = Path(data)
        source = str(data)
        if root.is_dir():
            names = list(_walk(root, {"__pycache__"}))
        elif root.is_file():
            root, names = root.parent, [root.name]
        else:
            raise ValueError(f"data: no such file or folder: {data}")
    read = [document for name in names for document in _read(root / name, name)]
    documents = tuple((name, text) for name, text in read if text)
    skipped = sum(text is None for _, text in read)
    if not documents:
        raise ValueError(f"data: {source} holds no text ({skipped} files are not UTF-8 text)")
    if data is not None and Path(data).is_file() and len(read) == 1:
        documents = tuple(_parts(*documents[0]))
    return Corpus(documents, source, skipped)


def split(corpus: Corpus, held_out: float = 0.1, seed: int = 0) -> tuple[Corpus, Corpus]:
    """Splits by document into (training, held-out) parts.

    A document's side depends on (seed, its name) alone, never on order or on other documents:
    it is held out if its hash, read as a fraction, is below `held_out`. So the held-out share of
    documents is `held_out` on average only. Raises ValueError when a part would be empty.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: {held_out} is not a share between 0 and 1")
    sides: tuple[list[Document], list[Document]] = ([], [])
    for name, text in corpus.documents:
        sides[name_fraction(name, f"split {seed}") < held_out].append((name, text))
    for side, part in zip(sides, ("training", "held-out"), strict=True):
        if not side:
            raise ValueError(
                f"data: the {part} part of {corpus.source} is empty ({len(corpus.documents)} "
                f"documents, held_out {held_out}, seed {seed}): give more documents or another "
                "share or seed"
            )
    train, held = (
        Corpus(tuple(side), f"{corpus.source}, {part} part")
        for side, part in zip(sides, ("training", "held-out"), strict=True)
    )
    return train, held


def name_fraction(name: str, salt: str) -> float:
    """A number in [0, 1) from sha256 of salt and name: the same on every machine and version."""
    digest = hashlib.sha256(f"{salt}/{name}".encode("utf-8", "surrogateescape")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # exact in float64, never 1


def _in_default_corpus(name: str) -> bool:
    generated = any(part.startswith(_STDLIB_GENERATED) for part in name.split("/"))
    return name.endswith(".py") and not generated


def _walk(root: Path, excluded: set[str]) -> Iterator[str]:
    """Paths of files below root, relative to it, with forward slashes, sorted as strings."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in excluded and not s.startswith(".")]
        names += [(Path(folder) / f).relative_to(root).as_posix() for f in files if f[0] != "."]
    yield from sorted(names)


def _read(path: Path, name: str) -> Iterator[tuple[str, str | None]]:
    """The documents of one file; None stands for a text that is not valid UTF-8 text."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path, name)
        return
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"data: cannot read {name}: {error.strerror}") from error
    if path.suffix == ".jsonl":
        yield from _read_jsonl(raw, name)
        return
    yield name, _decode(raw)


def _decode(raw: bytes) -> str | None:
    try:
        return None if b"\0" in raw else raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _read_jsonl(raw: bytes, name: str) -> Iterator[tuple[str, str | None]]:
    # Split at \n only: str.splitlines would also cut at U+2028, which JSON strings may hold.
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise ValueError(f"data: {name} line {number} is not valid JSON: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise ValueError(f'data: {name} line {number} has no string field "text"')
        # A lone surrogate ("\ud800") is valid JSON, but no text: it has no UTF-8 form.
        yield f"{name}:{number}", _decode(entry["text"].encode("utf-8", "surrogatepass"))


def _read_parquet(path: Path, name: str) -> Iterator[tuple[str, str | None]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"data: reading {name} needs pyarrow (pip install pyarrow)") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                raise ValueError(f'data: {name} has no column "text" (columns: {columns})')
            texts = file.read(columns=["text"]).column("text").to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"data: {name} is not a readable Parquet file: {reason}") from error
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise ValueError(f'data: {name} row {number} has no string in its column "text"')
        yield f"{name}:{number}", _decode(text.encode("utf-8", "surrogatepass"))


def _parts(name: str, text: str) -> Iterator[Document]:
    """Cuts a text at line ends into parts of at least 16 KiB (the last may be shorter)."""
    lines: list[str] = []
    size = number = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line.encode())
        if size >= _PART_BYTES:
            yield f"{name}#{number}", "".join(lines)
            lines, size, number = [], 0, number + 1
    if lines:
        yield f"{name}#{number}", "".join(lines)

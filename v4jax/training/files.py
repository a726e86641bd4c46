"""Files that a reader, a kill or a full disk never leaves half written, on a disk or in a bucket.

A run's folder may be gs://BUCKET/PATH. Everything that takes a folder gets it from `as_path` and
uses pathlib's methods, or the functions here where a bucket can do less than a disk.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import importlib.util
import json
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


class BucketError(OSError):
    """A bucket does not answer, or not with what was asked, after all tries. One line."""


class Refused(BucketError):
    """What trying again cannot help: no such bucket, or no right to use it. One line."""


def as_path(path: str | os.PathLike[str], flag: str = "--workdir") -> Path:
    """The path that `flag` gives: pathlib's, or of a bucket a `bucket.BucketPath`.

    Raises ValueError, one line: it is neither, or a package is missing.
    """
    text = os.fspath(path)
    if "://" not in text:
        return Path(text)
    if not isinstance(path, str):
        return path  # type: ignore[return-value]  # made here
    parts = text.removeprefix("gs://").rstrip("/").split("/")
    if not text.startswith("gs://") or len(parts) < 2 or not all(parts) or {".", ".."} & set(parts):
        raise ValueError(f"{flag}={text}: allowed: a folder, or gs://BUCKET/PATH")
    for package in ("etils", "fsspec", "gcsfs"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{flag}={text}: {package} is not installed: pip install gcsfs; allowed without "
                "it: a folder"
            )
    from v4jax.training import bucket  # 0.2 s, for those who have one

    return bucket.BucketPath(text.rstrip("/"))


def in_bucket(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).startswith("gs://")


def absolute(path: str | os.PathLike[str]) -> Path:
    """`as_path`, with a folder's path from the root on."""
    found = as_path(path)
    return found if in_bucket(found) else Path(os.path.abspath(found))


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, and its folder, so that a kill at any instant leaves the old one or the new.

    Several processes may write one path at a time: one of them wins.
    """
    if in_bucket(path):
        path.put(content)  # type: ignore[attr-defined]
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_whole` of a JSON value, its keys sorted."""
    write_whole(path, json.dumps(value, indent=2, sort_keys=True).encode() + b"\n")


def create(path: Path, content: bytes) -> bool:
    """Makes the file with its content at once; False if there is one. No lock is ever needed.

    content: in a bucket, it must be such as no other writer has.
    """
    if in_bucket(path):
        return path.create(content)  # type: ignore[attr-defined]
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    write_whole(temporary, content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        return _create_in_place(path, content)  # a file system without hard links
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return True


def _create_in_place(path: Path, content: bytes) -> bool:
    """As `create`; for an instant the file is empty, which counts as taken."""
    try:
        with open(path, "xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def touch(path: Path) -> None:
    """Gives a file that is there the time of now, by the clock of where it is."""
    if in_bucket(path):
        write_whole(path, path.read_bytes())
    else:
        os.utime(path)


def modified(path: Path) -> float:
    """When the file was last written, seconds since 1970, by the clock of where it is."""
    if in_bucket(path):
        return path.stat().st_mtime
    # Opened, not only looked at: that makes a network file system ask its server.
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime


def read_end(path: Path, size: int) -> tuple[bytes, bool]:
    """The file's last `size` bytes, or all; and whether that may not be all."""
    if in_bucket(path):
        end = path.read_end(size)  # type: ignore[attr-defined]
        return end, len(end) == size
    with open(path, "rb") as file:
        start = max(0, file.seek(0, 2) - size)
        file.seek(start)
        return file.read(), start > 0


def together(function: Callable, items: Iterable, folder: Path) -> list:
    """[function(item), ...]; several at a time in a bucket, where each waits for answers."""
    if not in_bucket(folder):
        return list(map(function, items))
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(function, items))


# ---- on the way to a bucket, and from it ----

_SCRATCH = "v4jax-scratch-"


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A new folder in TMPDIR, for what is on its way to or from a bucket; gone afterwards.

    So is then what killed processes of this machine left of theirs.
    """
    base = Path(tempfile.gettempdir())
    for left in base.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError), _held(left) as dead:
            if dead and time.time() - left.stat().st_mtime > 60:  # not one that just begins
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_SCRATCH))
    try:
        with _held(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Locks the folder while its process lives, whether or not another has; yields if none had."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield False
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(file)


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[Path]:
    """The file or folder itself, or a copy of what the bucket has, for who needs a disk."""
    if not in_bucket(path):
        yield path
        return
    with scratch() as folder:
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
        else:
            path.download(folder / path.name)  # type: ignore[attr-defined]
        yield folder / path.name


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """The folder itself, or one on this machine whose files go up to the bucket in the end."""
    if not in_bucket(folder):
        yield folder
        return
    with scratch() as here:
        yield here
        found = [path for path in here.rglob("*") if path.is_file()]
        folder.upload(  # type: ignore[attr-defined]
            {path.relative_to(here).as_posix(): path for path in found}
        )


class Mirror:
    """A folder on this machine whose files go up to `target`, a folder of a bucket.

    New and changed ones do at `sync`, and every few seconds by themselves. An upload reads a file
    once, so what is there of a file that grows is what it was at one time.

    every: seconds between two uploads; more where they take long.
    """

    def __init__(self, target: Path, every: float = 5.0):
        self._target, self._every = target, every
        self._scratch = contextlib.ExitStack()
        self.folder = self._scratch.enter_context(scratch())
        self._sent: dict[str, tuple[int, int]] = {}
        self._lock, self._ends = threading.Lock(), threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._now_and_then, name="mirror", daemon=True)
        self._thread.start()

    def sync(self) -> None:
        """Returns when the bucket has all that the folder has. Raises BucketError, one line."""
        with self._lock:
            for path in sorted(self.folder.rglob("*")):
                if not path.is_file():
                    continue
                name, stat = path.relative_to(self.folder).as_posix(), path.stat()
                if self._sent.get(name) != (stat.st_size, stat.st_mtime_ns):
                    write_whole(self._target / name, path.read_bytes())
                    self._sent[name] = stat.st_size, stat.st_mtime_ns
            self._error = None

    def check(self) -> None:
        """Raises BucketError, one line, where the last upload failed."""
        if self._error is not None:
            raise self._error

    def _now_and_then(self) -> None:
        pause = self._every
        while not self._ends.wait(pause):
            began = time.monotonic()
            try:
                self.sync()
            except OSError as error:
                self._error = error
            pause = max(self._every, 10 * (time.monotonic() - began))

    def close(self, failed: bool = False) -> None:
        """Uploads the rest, with `sync`'s errors, and ends. failed: without them."""
        self._ends.set()
        self._thread.join()
        with self._scratch, contextlib.suppress(*[OSError] * failed):
            self.sync()

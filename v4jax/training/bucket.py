"""Paths in a bucket of Google Cloud Storage, with those methods of pathlib's that runs need.

What a bucket has and has not: an object is put whole or not at all, and read as one put it; a name
can be taken by only one of several that ask for it; lists are never out of date. There are no
folders, no renames, no appends and no locks.

gcsfs talks to the bucket and tries again, for about half a minute, where it does not answer.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import logging
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from etils.epath.gpath import PosixGPath

from v4jax.training.files import BucketError, Refused

PARALLEL = 8
"""Files that go up or down at a time; each may take 50 MiB of memory."""


class Stat(NamedTuple):
    """Of an object: bytes; when it was last put, by the bucket's own clock, seconds since 1970."""

    st_size: int
    st_mtime: float


class BucketPath(PosixGPath):
    """gs://BUCKET/PATH. Raises FileNotFoundError as pathlib does, else BucketError."""

    @property
    def key(self) -> str:
        """BUCKET/PATH"""
        return str(self).removeprefix("gs://")

    def read_bytes(self) -> bytes:
        with _errors(self) as system:
            return system.cat_file(self.key)

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def read_end(self, size: int) -> bytes:
        """The last `size` bytes, or all."""
        with _errors(self) as system:
            try:
                return system.cat_file(self.key, start=-size)
            except Exception as error:
                if getattr(error, "code", None) == 416:  # of nothing, no bytes can be had
                    return b""
                raise

    def put(self, content: bytes) -> None:
        """Puts the object in place of what is there."""
        with _errors(self, writes=True) as system:
            system.pipe_file(self.key, content)

    def create(self, content: bytes) -> bool:
        """Puts the object if there is none; whether it did. `content` must be of one writer only.

        That is the bucket's decision. An answer can be lost, and asking again is then refused.
        """
        try:
            with _errors(self, writes=True) as system:
                system.pipe_file(self.key, content, mode="create")
            return True
        except FileExistsError:
            try:
                return self.read_bytes() == content
            except FileNotFoundError:
                return False

    def stat(self) -> Stat:
        found = self._info()
        if found is None or found["type"] == "directory":
            raise FileNotFoundError(2, "No such object", str(self))
        return _stat(found)

    def exists(self) -> bool:
        return self._info() is not None

    def is_file(self) -> bool:
        found = self._info()
        return found is not None and found["type"] != "directory"

    def is_dir(self) -> bool:
        found = self._info()
        return found is not None and found["type"] == "directory"

    def iterdir(self) -> Iterator[BucketPath]:
        """Objects and folders just below this; none where there are none."""
        with _errors(self) as system:
            try:
                names = system.ls(self.key, detail=False)
            except FileNotFoundError:
                return
        for name in names:
            if name.rstrip("/") != self.key:
                yield type(self)(f"gs://{name}")

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        """As pathlib's, without **."""
        first, _, rest = pattern.partition("/")
        if any(c in first for c in "*?["):
            found = [path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, first)]
        else:
            found = [self / first]
        for path in found:
            if rest:
                yield from path.glob(rest)
            elif first != path.name or path.exists():
                yield path

    def objects(self) -> dict[str, Stat]:
        """Every object below this: its path from here -> what it is."""
        with _errors(self) as system:
            found = system.find(self.key, detail=True)
        start = len(self.key) + 1
        return {name[start:]: _stat(one) for name, one in found.items() if len(name) > start}

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with _errors(self) as system:
                system.rm_file(self.key)
        except FileNotFoundError:  # also where an answer was lost, and it was asked again
            if not missing_ok:
                raise

    def copy_to(self, target: BucketPath) -> None:
        """Copies the object within the cloud."""
        with _errors(self) as system:
            system.cp_file(self.key, target.key)

    def upload(self, files: Mapping[str, pathlib.Path]) -> None:
        """Puts local files at these paths below this."""
        if files:
            here, there = map(str, files.values()), (f"{self.key}/{name}" for name in files)
            with _errors(self, writes=True) as system:
                system.put(list(here), list(there), batch_size=PARALLEL)

    def download(self, folder: pathlib.Path) -> None:
        """Writes every object below this into the local folder."""
        names = list(self.objects())
        here = [str(folder / name) for name in names]
        if names:
            with _errors(self) as system:
                system.get([f"{self.key}/{name}" for name in names], here, batch_size=PARALLEL)

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a bucket has no folders."""

    def absolute(self) -> BucketPath:
        return self

    def resolve(self, strict: bool = False) -> BucketPath:
        return self

    def open(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{self}: objects of a bucket are read and put whole")

    def _info(self) -> dict[str, Any] | None:
        with _errors(self) as system:
            try:
                return system.info(self.key)
            except FileNotFoundError:
                return None


def _stat(info: Mapping[str, Any]) -> Stat:
    return Stat(info["size"], info["mtime"].timestamp())


@functools.cache
def filesystem() -> Any:
    """gcsfs, with no memory of what a bucket held earlier. STORAGE_EMULATOR_HOST names another."""
    import aiohttp
    from gcsfs.core import GCSFileSystem

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # errors are said once, in one line
    return GCSFileSystem(
        use_listings_cache=False,
        skip_instance_cache=True,
        consistency="md5",
        # Of a host that never answers; a try takes as long as it takes while bytes flow.
        requests_timeout=aiohttp.ClientTimeout(total=1800, sock_connect=20, sock_read=60),
    )


@contextlib.contextmanager
def _errors(path: BucketPath, writes: bool = False) -> Iterator[Any]:
    """The filesystem; its errors become FileNotFoundError, FileExistsError or BucketError."""
    try:
        yield filesystem()
    except FileNotFoundError as error:
        if writes:
            raise Refused(f"{path}: there is no bucket {path.parts[2]}") from error
        raise FileNotFoundError(2, "No such object", str(path)) from error
    except (FileExistsError, NotImplementedError, MemoryError, BucketError):
        raise
    except Exception as error:  # gcsfs passes on what aiohttp, google.auth and requests raise
        text = (str(error).strip() or type(error).__name__).splitlines()
        if str(error).startswith("Forbidden") or getattr(error, "code", None) in (401, 403):
            raise Refused(
                f"{path}: no permission: {text[-1]}; allowed: what the credentials of `gcloud auth "
                "application-default login`, or this machine's service account, may use"
            ) from error
        raise BucketError(f"{path}: the bucket does not answer as it should: {text[0]}") from error

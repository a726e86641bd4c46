"""Files that only save time: what they hold can be made again, and is when they are damaged."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from v4jax.training.files import write_whole


def cached(path: str | os.PathLike[str], make: Callable[[], bytes]) -> bytes:
    """The bytes that `path` keeps, or `make()`, which it then keeps.

    The file is the sha256 (hex) of the bytes, a line end, the bytes; one that disagrees with
    itself is made again, with a warning.
    """
    path = Path(path)
    if path.is_file():
        checksum, _, content = path.read_bytes().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() == checksum:
            return content
        warnings.warn(f"cache file {path} is damaged; making it again", stacklevel=2)
    content = make()
    try:
        write_whole(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    except OSError as error:  # read-only, or full
        warnings.warn(f"cache file {path} is not kept: {error}", stacklevel=2)
    return content

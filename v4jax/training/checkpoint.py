"""Checkpoints: whole or not there, checked bit by bit, saved beside training.

One checkpoint is one folder, `<folder>/<step>`, on a disk or in a bucket (`checkpoint_files`):

    state/        every leaf of the state as one array of Orbax's, named by its path
                  ("params/layers/0/self_attn/sinks")
    record.json   the format's number; meta (config, data position, ...); dtype, shape and CRC-32 of
                  every leaf; size and CRC-32 of every file in state/; a CRC-32 of all this

Orbax restores flipped bytes, partial trees and other dtypes without a word, so nothing that it
returns is believed before the record agrees: first the files, then the values. A checkpoint that
disagrees with its own record is *damaged*: `restore` falls back to the next older one. A whole
checkpoint of another model is an error.

A save copies the state to host memory, which is all that the training loop waits for; a thread
computes the checksums and runs Orbax. (Orbax's own asynchronous save keeps the caller for longer.)
A process killed at any instant leaves whole checkpoints and at most the parts of one, which count
as none and which the next save removes.

The state may be spread over several processes. All of them call `save` and `wait` at the same
steps; a leaf at a time is gathered on every device and copied to the host, and the first process
alone writes, so it needs host memory for the whole state. All read, each the whole checkpoint, so
another number of processes or devices goes on from it as well.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import logging
import os
import pathlib
import zlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from v4jax import distributed, parallel
from v4jax.training import checkpoint_files, run_config
from v4jax.training.files import BucketError, absolute
from v4jax.training.run_config import canonical, reason, some, write_atomically

_log = logging.getLogger(__name__)


class SaveError(OSError):
    """A checkpoint was not saved."""


class DamagedError(ValueError):
    """A checkpoint's files are missing, unreadable, or hold other bytes than were saved."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpointer.restore` returns: `state` has the structure of the abstract state."""

    step: int
    state: Any
    meta: dict[str, Any]


class Checkpointer:
    """The checkpoints of one run. One thread uses it; `close` it, or use it in a `with` block.

    Args:
      folder: where the checkpoints lie; created by the first save. Reading changes nothing on disk.
      max_to_keep: how many of the newest checkpoints are kept.
      keep: steps whose checkpoints are never deleted, kept beside the newest.
    """

    def __init__(
        self, folder: str | os.PathLike, *, max_to_keep: int = 3, keep: tuple[int, ...] = ()
    ):
        if max_to_keep < 1:
            raise ValueError(f"max_to_keep is {max_to_keep}; allowed: 1 or more")
        self.folder = absolute(folder)
        self._max_to_keep, self._keep = max_to_keep, keep
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._running: tuple[int, concurrent.futures.Future] | None = None
        self._damaged: set[int] = set()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self.close(failed=kind is not None)

    def steps(self) -> list[int]:
        """The steps saved, oldest first; a save that still runs is not among them."""
        return checkpoint_files.steps(self.folder)

    def save(self, step: int, state: Any, meta: dict[str, Any], wait: bool = False) -> bool:
        """Copies `state` to the host and saves it in the background, after the previous save.

        A step that is on disk already stays as it is, unless `restore` found it damaged: such
        folders are renamed to `damaged-<step>` by the next save.

        Args:
          state: a tree of JAX arrays (PRNG keys too) and Python ints and floats. The arrays may be
            donated as soon as this returns.
          meta: a JSON object, kept with the state; migrations see `meta["config"]`.
          wait: whether to return only when the checkpoint is on disk, for all processes.

        Returns: whether it was saved, rather than there already.
        Raises: SaveError if the previous save failed, or this one and `wait`. ValueError naming
          the leaf, if one is not an array or weakly typed; if `meta` is not JSON.
        """
        self.wait()
        there = step in self.steps() and step not in self._damaged
        if distributed.from_main(there):
            return False
        meta = json.loads(canonical(meta))  # a copy: the caller may go on changing its own
        writes, leaves = distributed.is_main(), {}
        for path, leaf in _flatten(state)[0].items():
            copied = _to_host(path, leaf)
            if writes:
                leaves[path] = copied
        write = self._write if writes else lambda *_: None
        self._running = step, self._thread.submit(write, step, leaves, meta)
        if wait:
            self.wait()
        return True

    def _write(self, step: int, leaves: dict[str, _Leaf], meta: dict[str, Any]) -> None:
        checkpoint_files.tidy(self.folder, self._damaged)
        self._damaged.clear()
        with checkpoint_files.new(self.folder, step) as temporary:
            _fill(temporary, leaves, meta)
        for old in self.steps()[: -self._max_to_keep]:
            if old not in self._keep:
                checkpoint_files.remove(self.folder, old)

    def remove(self, step: int) -> None:
        """Removes checkpoint `step`, which is never half there. No save may run."""
        checkpoint_files.remove(self.folder, step)

    def wait(self) -> None:
        """Returns when no save runs, in any process. Raises SaveError, once, if the last failed."""
        step = self._finish()
        if step is not None:
            distributed.barrier(f"checkpoint {step}")

    def _finish(self) -> int | None:
        """Waits for this process's save; its step, None if there was none."""
        if self._running is None:
            return None
        (step, future), self._running = self._running, None
        try:
            future.result()
        except Exception as error:
            raise SaveError(
                f"checkpoint {step} of {self.folder} was not saved: {reason(error)}"
            ) from error
        return step

    def close(self, failed: bool = False) -> None:
        """Waits, with `wait`'s errors, and ends the thread. failed: for this process's save alone,
        as others may not come to where this one is."""
        try:
            self._finish() if failed else self.wait()
        finally:
            self._thread.shutdown()

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored | None:
        """The state of `step`, or of the newest whole checkpoint, after every check.

        Args:
          abstract_state: a tree of `jax.ShapeDtypeStruct` (or arrays) and Python numbers: what must
            be there. Arrays go to the leaf's sharding, where it has one.
          step: a step, or None: the newest; damaged ones are skipped with one warning each.

        Returns: None if there is no checkpoint and `step` is None.
        Raises: ValueError in one line if the step is not there, if leaves are missing, left over
          or of another shape or dtype, or if the format is newer than `run_config.FORMAT`;
          DamagedError if the named step is damaged, or every one is.
        """
        self.wait()
        steps = self.steps()
        if step is not None:
            if step not in steps:
                there = ", ".join(map(str, steps)) or "none"
                raise ValueError(f"no checkpoint of step {step} in {self.folder}; there: {there}")
            return self._restore(step, abstract_state)
        reasons = []
        for candidate in reversed(steps):
            try:
                return self._restore(candidate, abstract_state)
            except DamagedError as error:
                _log.warning("%s; trying the next older one", error)
                reasons.append(str(error))
                self._damaged.add(candidate)
        if reasons:
            raise DamagedError(f"no whole checkpoint: {'; '.join(reasons)}")
        return None

    def _restore(self, step: int, abstract_state: Any) -> Restored:
        folder, name = self.folder / str(step), f"checkpoint {step} of {self.folder}"
        try:
            record = _read_record(folder / "record.json")
        except BucketError:  # says nothing of what is there
            raise
        except (OSError, ValueError) as error:
            raise DamagedError(f"{name} is damaged: {reason(error)}") from error
        version, meta = run_config.known_format(record["format"], name), record["meta"]
        want, treedef = _flatten(abstract_state)
        specs = {path: _spec(leaf) for path, leaf in want.items()}
        if version == run_config.FORMAT:
            saved = {p: (x["dtype"], tuple(x["shape"])) for p, x in record["leaves"].items()}
            _check_fit(name, saved, specs)
        try:
            with checkpoint_files.state_of(folder) as state:
                _check_files(state, record["files"])
                flat = _read_leaves(state, record["leaves"])
        except (MemoryError, BucketError):
            raise
        except Exception as error:  # Orbax and TensorStore raise bare Exceptions
            raise DamagedError(f"{name} is damaged: {reason(error)}") from error
        if version < run_config.FORMAT:
            meta["config"], flat = run_config.migrate(version, meta.get("config", {}), flat)
            _check_fit(name, {path: _spec(leaf) for path, leaf in flat.items()}, specs)
        placed = [_place(flat[path], leaf) for path, leaf in want.items()]
        return Restored(step, jax.tree.unflatten(treedef, placed), meta)


# ---- leaves ----


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf on the host: `data` holds its bits; `key_impl` names the generator of a PRNG key."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray
    key_impl: str | None = None

    def describe(self) -> dict[str, Any]:
        described = {"dtype": self.dtype, "shape": list(self.shape), "crc32": _crc32(self.data)}
        return described | ({"key_impl": self.key_impl} if self.key_impl else {})


def _flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """Path ("params/layers/0/w") -> leaf, in the tree's order, and the tree's structure."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    named = [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in leaves]
    flat = dict(named)
    if len(flat) != len(named):
        paths = [path for path, _ in named]
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"two leaves of the state have the path {twice}; keys may hold no '/'")
    return flat, treedef


def _spec(leaf: Any) -> tuple[str, tuple[int, ...]]:
    """(dtype, shape); a Python number has its type's name and no shape."""
    if type(leaf) in (int, float):
        return type(leaf).__name__, ()
    return str(leaf.dtype), tuple(leaf.shape)


def _to_host(path: str, leaf: Any) -> _Leaf:
    """A copy of the leaf in host memory: training may donate the original."""
    if type(leaf) in (int, float):
        return _Leaf(*_spec(leaf), np.asarray(leaf))
    if not isinstance(leaf, jax.Array):
        raise ValueError(f"{path} is a {type(leaf).__name__}; allowed: jax arrays, int, float")
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = parallel.to_host(jax.random.key_data(leaf))
        return _Leaf(*_spec(leaf), data, str(jax.random.key_impl(leaf)))
    if leaf.weak_type:  # comes back strongly typed, so a resumed run would promote differently
        raise ValueError(f"{path} is weakly typed, made from a Python number; give it a dtype")
    return _Leaf(*_spec(leaf), parallel.to_host(leaf))


def _place(value: Any, abstract: Any) -> Any:
    if type(value) in (int, float):
        return value
    return parallel.from_host(value, getattr(abstract, "sharding", None))


def _crc32(data: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)


def _fill(folder: pathlib.Path, leaves: dict[str, _Leaf], meta: dict[str, Any]) -> None:
    """Writes a checkpoint's state/ and record.json."""
    arrays = ocp.args.PyTreeSave({path: leaf.data for path, leaf in leaves.items()})
    with _orbax() as orbax:
        orbax.save(folder / "state", args=arrays)
    files = sorted(path for path in (folder / "state").rglob("*") if path.is_file())
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # else a power failure may empty files of a renamed folder
    record = {
        "format": run_config.FORMAT,
        "meta": meta,
        "leaves": {path: leaf.describe() for path, leaf in leaves.items()},
        "files": {
            path.relative_to(folder / "state").as_posix(): _describe_file(path) for path in files
        },
    }
    record["crc32"] = zlib.crc32(canonical(record).encode())
    write_atomically(folder / "record.json", canonical(record))


def _orbax() -> ocp.Checkpointer:
    """Orbax for this process alone: it would wait for others, which do not call it at this time."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process-{me}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


# ---- reading ----


def _read_record(path: pathlib.Path) -> dict[str, Any]:
    record = json.loads(path.read_bytes())
    if not isinstance(record, dict) or record.pop("crc32", None) != zlib.crc32(
        canonical(record).encode()
    ):
        raise ValueError(f"wrong bytes in {path.name}")
    return record


def _describe_file(path: pathlib.Path) -> list[int]:
    """[size, CRC-32]"""
    size = crc32 = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            size, crc32 = size + len(chunk), zlib.crc32(chunk, crc32)
    return [size, crc32]


def _check_files(folder: pathlib.Path, files: dict[str, list[int]]) -> None:
    """Keeps damaged files away from Orbax, which ignores some damage and is noisy about other."""
    for name, saved in files.items():
        found = _describe_file(folder / name)  # raises FileNotFoundError, which names the file
        if found[0] != saved[0]:
            raise ValueError(f"state/{name} has {found[0]} bytes, not {saved[0]}")
        if found != saved:
            raise ValueError(f"wrong bytes in state/{name}")


def _read_leaves(folder: pathlib.Path, leaves: dict[str, dict]) -> dict[str, Any]:
    """Path -> numpy array, key array or Python number; every bit as saved, or an exception."""
    as_numpy = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in leaves}
    with _orbax() as orbax:
        arrays = orbax.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    wrong = [path for path in leaves if _crc32(arrays[path]) != leaves[path]["crc32"]]
    if wrong:
        raise ValueError(f"wrong values in {some(wrong, 3)}")
    return {path: _decode(path, arrays[path], saved) for path, saved in leaves.items()}


def _decode(path: str, data: np.ndarray, saved: dict) -> Any:
    shape = tuple(saved["shape"])
    if "key_impl" in saved:
        value = jax.random.wrap_key_data(jax.numpy.asarray(data), impl=saved["key_impl"])
    elif saved["dtype"] in ("int", "float"):
        value = data.item()
    else:
        value = data
    if _spec(value) != (saved["dtype"], shape):
        raise ValueError(f"{path} is {_describe(_spec(value))}, and {saved} in the record")
    return value


def _check_fit(name: str, saved: dict, wanted: dict) -> None:
    """Raises ValueError, one line, unless both map the same paths to the same (dtype, shape)."""
    differ = []
    for path in sorted(saved.keys() | wanted.keys()):
        if path not in wanted:
            differ.append(f"{path} is in the checkpoint only")
        elif path not in saved:
            differ.append(f"{path} is not in the checkpoint")
        elif saved[path] != wanted[path]:
            differ.append(f"{path} is {_describe(saved[path])}, not {_describe(wanted[path])}")
    if differ:
        raise ValueError(f"{name} does not fit this configuration: {some(differ, 8)}")


def _describe(spec: tuple[str, tuple[int, ...]]) -> str:
    return f"{spec[0]}{list(spec[1])}"

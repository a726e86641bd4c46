"""Where checkpoints lie: folders that are renamed on a disk, objects in an order in a bucket.

On a disk, a checkpoint's folder is filled under another name and renamed: there or not. A bucket
has no renames: there record.json comes last and goes first, and a checkpoint without it is none.
What else a killed process left, the next save removes. In both, state/ is written and read on a
disk of this machine.
"""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from collections.abc import Collection, Iterator
from typing import Any

from v4jax.training.files import in_bucket, on_disk, scratch


def steps(folder: pathlib.Path) -> list[int]:
    """The steps of the whole checkpoints in `folder`, oldest first."""
    if in_bucket(folder):
        found = (name.split("/") for name in _objects(folder))
        return sorted(int(n[0]) for n in found if n[0].isdecimal() and n[1:] == ["record.json"])
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())


def tidy(folder: pathlib.Path, damaged: Collection[int]) -> None:
    """Makes the folder; removes what killed saves left; renames damaged steps to damaged-<step>."""
    if in_bucket(folder):
        for step in damaged:
            _set_aside(folder, str(step))
        whole = set(map(str, steps(folder)))
        for name in {name.partition("/")[0] for name in _objects(folder)}:
            if name.isdecimal() and name not in whole:
                _remove(folder / name)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("tmp-*"):
        shutil.rmtree(leftover)
    for step in damaged:
        aside = folder / f"damaged-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        (folder / str(step)).rename(aside)


@contextlib.contextmanager
def new(folder: pathlib.Path, step: int) -> Iterator[pathlib.Path]:
    """A folder to be filled with state/ and record.json: where the block ends, it is checkpoint
    `step` of `folder`. `tidy` comes first."""
    if not in_bucket(folder):
        temporary = folder / f"tmp-{step}"
        yield temporary
        temporary.rename(folder / str(step))
        return
    with scratch() as place:
        temporary = place / f"tmp-{step}"
        yield temporary
        paths = (path for path in temporary.rglob("*") if path.is_file())
        files = {path.relative_to(temporary).as_posix(): path for path in paths}
        record = {"record.json": files.pop("record.json")}
        target: Any = folder / str(step)
        target.upload(files)
        target.upload(record)


def remove(folder: pathlib.Path, step: int) -> None:
    """Removes a checkpoint, which is never half there."""
    if in_bucket(folder):
        _remove(folder / str(step))
    else:
        (folder / str(step)).rename(folder / f"tmp-{step}")
        shutil.rmtree(folder / f"tmp-{step}")


def state_of(checkpoint: pathlib.Path) -> contextlib.AbstractContextManager[pathlib.Path]:
    """state/ of a checkpoint's folder, on a disk of this machine."""
    return on_disk(checkpoint / "state")


def copy(source: pathlib.Path, target: pathlib.Path, step: int) -> None:
    """Copies checkpoint `step` between folders of a bucket; FileNotFoundError if it goes away."""
    there: Any = source / str(step)
    names = sorted(there.objects(), key=lambda name: name == "record.json")  # it comes last
    for name in names or ["record.json"]:
        (there / name).copy_to(target / str(step) / name)


def _objects(folder: Any) -> Collection[str]:
    return folder.objects()


def _remove(checkpoint: Any) -> None:
    checkpoint.joinpath("record.json").unlink(missing_ok=True)
    for name in checkpoint.objects():
        (checkpoint / name).unlink(missing_ok=True)


def _set_aside(folder: Any, step: str) -> None:
    names = folder.joinpath(step).objects()
    for name in names:
        (folder / step / name).copy_to(folder / f"damaged-{step}" / name)
    _remove(folder / step)

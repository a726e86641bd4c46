"""The configuration file of a run, and what it shares with checkpoints: formats, hash, JSON.

`<run>/config.json` holds the number of the format and the configuration, a JSON object. It is
written once, and every later start of the run compares itself with it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

from v4jax.training.files import as_path, write_whole

FORMAT = 3
"""The format of the checkpoints and configurations that this version writes."""


def _new_options(config: dict, flat: dict) -> tuple[dict, dict]:
    """Format 2: options that did not exist get their defaults, which is what format 1 meant."""
    added = {"model": {"sparse_attention": "auto"}, "optimizer": {"matrices": "muon"}}
    return config | {name: config[name] | added[name] for name in added if name in config}, flat


def _recipe(config: dict, flat: dict) -> tuple[dict, dict]:
    """Format 3: `dense_steps` is `dense_until`; new options mean what format 2 did."""
    added: dict[str, dict] = {
        "schedule": {
            "decay_end": 1.0,
            "indexer_warmup": 0,
            "index_start": 0,
            "lengths": [],
            "batch_sizes": [],
        },
        "optimizer": {
            "indexer_learning_rate": None,
            "clip": "global",
            "newton_schulz": "hybrid",
        },
    }
    config = config | {name: config[name] | added[name] for name in added if name in config}
    if "dense_steps" in config.get("schedule", {}):
        schedule = dict(config["schedule"])
        config["schedule"] = schedule | {"dense_until": schedule.pop("dense_steps")}
    return config, flat


MIGRATIONS: list[Callable[[dict, dict], tuple[dict, dict]]] = [_new_options, _recipe]
"""`MIGRATIONS[n - 1](config, flat)` returns both as format n + 1 has them.

`config` is what `config.json` holds, or a checkpoint's `meta["config"]`. `flat` maps the path of
each leaf of a checkpoint to its value, a numpy array, a JAX key array or a Python number; it is
empty where only a configuration is read.
"""

_log = logging.getLogger(__name__)


def write_config(folder: str | os.PathLike, config: dict[str, Any]) -> None:
    """Writes `<folder>/config.json`: the format's number and `config`, a JSON object. Atomic."""
    canonical(config)  # raises ValueError where json would write NaN or raise something else
    folder = as_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "config": config}, indent=2)
    write_atomically(folder / "config.json", text + "\n")


def read_config(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The configuration that `write_config` wrote, in today's format; None if there is none.

    Raises: ValueError if the file is damaged or of a newer format.
    """
    path = as_path(folder) / "config.json"
    try:
        stored = json.loads(path.read_bytes())
        version, config = stored["format"], stored["config"]
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {reason(error)}") from error
    return migrate(known_format(version, str(path)), config, {})[0]


def check_config(folder: str | os.PathLike, config: dict[str, Any]) -> bool:
    """Whether the folder holds this configuration (True) or none (False).

    Raises: ValueError, in one line that names every differing field with both values, if it holds
      another one.
    """
    stored = read_config(folder)
    if stored is None:
        return False
    there, here = _fields(stored), _fields(json.loads(canonical(config)))
    differ = [
        f"{field} is {there.get(field, 'absent')} there, {here.get(field, 'absent')} here"
        for field in sorted(there.keys() | here.keys())
        if there.get(field) != here.get(field)
    ]
    if differ:
        raise ValueError(
            f"{folder} holds a run of another configuration; choose another folder or delete it: "
            + some(differ, 20)
        )
    return True


def source_hash() -> str:
    """12 hex digits over this package's source: other code may train otherwise."""
    root = pathlib.Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted([*(root / "v4jax").rglob("*.py"), *(root / "kernels_pallas").rglob("*.py")]):
        digest.update(f"{path.relative_to(root).as_posix()} ".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def write_source(folder: str | os.PathLike) -> None:
    """Notes in `<folder>/source.txt` which code began the run."""
    folder = as_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "source.txt", source_hash() + "\n")


def same_source(folder: str | os.PathLike) -> bool:
    """Whether the run in `folder` was begun by this very code."""
    path = as_path(folder) / "source.txt"
    return path.is_file() and path.read_text(encoding="utf-8").strip() == source_hash()


def config_hash(config: dict[str, Any]) -> str:
    """12 hex digits, equal for equal JSON objects: key order, process and platform do not count."""
    return hashlib.sha256(canonical(config).encode()).hexdigest()[:12]


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Replaces the file: a kill at any instant leaves the old text or the new one."""
    write_whole(path, text.encode("utf-8"))


def canonical(value: Any) -> str:
    """One text per JSON value. Raises ValueError for NaN, infinities and what is not JSON."""
    try:
        normal = json.loads(json.dumps(value, allow_nan=False))  # tuples become lists, keys str
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a JSON value: {reason(error)}") from error
    return json.dumps(normal, sort_keys=True, separators=(",", ":"))


def known_format(version: int, name: str) -> int:
    """`version`, unless it is newer than `FORMAT`: then a ValueError about the file `name`."""
    if version > FORMAT:
        raise ValueError(f"{name} has format {version}; this version of v4jax reads 1 to {FORMAT}")
    return version


def migrate(version: int, config: dict, flat: dict) -> tuple[dict, dict]:
    """`config` and `flat` of format `version`, brought to `FORMAT`."""
    for n in range(version, FORMAT):
        config, flat = MIGRATIONS[n - 1](config, flat)
        _log.info("migrated from format %d to %d", n, n + 1)
    return config, flat


def some(parts: list[str], limit: int) -> str:
    """The parts, joined; past `limit` only their number."""
    more = f", and {len(parts) - limit} more" if len(parts) > limit else ""
    return ", ".join(parts[:limit]) + more


def reason(error: BaseException) -> str:
    """The error's first line, cut: Orbax quotes whole trees."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _fields(config: Any, prefix: str = "") -> dict[str, str]:
    """Dotted name -> JSON text of the value; lists are values."""
    if not isinstance(config, dict) or not config:
        return {prefix: json.dumps(config)}
    fields: dict[str, str] = {}
    for key, value in config.items():
        fields |= _fields(value, f"{prefix}.{key}" if prefix else key)
    return fields

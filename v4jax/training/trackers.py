"""Weights & Biases and MLflow beside TensorBoard, for those who ask for them by name.

`metrics.jsonl` stays the truth: a tracker repeats its numbers, and one that fails is dropped with a
line on standard error while training goes on. A resumed run goes on in the same run of the tracker;
the steps since its last checkpoint are told again, with the same values. What a killed process had
told W&B in its last second may be missing there.

Where to: W&B goes by its own variables (WANDB_MODE=offline writes to `<folder>/wandb`, which
`wandb sync` sends; WANDB_PROJECT names the project), MLflow by MLFLOW_TRACKING_URI (without it
./mlflow.db) and MLFLOW_EXPERIMENT_NAME. Project and experiment are "v4jax" where nothing is said.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from v4jax.training.files import as_path, in_bucket, write_whole

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny sqlalchemy alembic"}
"""A tracker's name -> what `pip install` needs for it."""


class Tracker(Protocol):
    """One run of one service."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Repeats the numbers of a step. Never raises."""

    def close(self, failed: bool = False) -> None:
        """Ends the run, as failed or as finished. Never raises."""


def open_trackers(
    names: Sequence[str], folder: str | os.PathLike, config: Mapping[str, Any]
) -> tuple[Tracker, ...]:
    """A tracker for each name, on the run in `folder`; only process 0 of a job may call this.

    Args:
      names: of PACKAGES; none imports nothing.
      folder: the run's folder; created. `tracker.json` in it keeps the run's id.
      config: what the service shows as the run's configuration; nested, JSON-able.

    Raises:
      ValueError: one line: an unknown name, a package that is not installed, or a service that
        does not take the run.
    """
    for name in names:
        if name not in PACKAGES:
            raise ValueError(f"--trackers={name}: unknown, allowed: {', '.join(PACKAGES)}")
    folder = as_path(folder)
    opened: list[Tracker] = []
    for name in dict.fromkeys(names):
        try:
            kind: Callable[..., Tracker] = _Wandb if name == "wandb" else _Mlflow
            opened.append(_Guarded(name, kind(folder, run_id(folder), config)))
        except Exception as error:  # what a service raises is its own affair
            for tracker in opened:
                tracker.close(failed=True)
            if isinstance(error, ModuleNotFoundError):
                text = f"{error.name} is not installed; pip install {PACKAGES[name]}"
            else:
                text = _line(error)
            raise ValueError(f"--trackers={name}: {text}") from error
    return tuple(opened)


def run_id(folder: pathlib.Path) -> str:
    """The id of the run in `folder`: made once and kept there, so that a resumed run has it again.

    A folder copied or moved elsewhere is another run: two would write into one.
    """
    path = folder / "tracker.json"
    try:
        kept = json.loads(path.read_bytes())
        if kept["folder"] == str(folder.resolve()):
            return str(kept["id"])
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        pass
    made = {"folder": str(folder.resolve()), "id": uuid.uuid4().hex[:16]}
    write_whole(path, (json.dumps(made, sort_keys=True) + "\n").encode())
    return made["id"]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested names joined by dots, values as text: `{"optimizer.learning_rate": "0.001"}`."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value)
    return found


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class _Guarded:
    """A tracker that says once what went wrong and then keeps silent."""

    def __init__(self, name: str, tracker: Tracker):
        self._name, self._tracker = name, tracker
        self._broken = False

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._try(lambda: self._tracker.log(step, numbers))

    def close(self, failed: bool = False) -> None:
        self._try(lambda: self._tracker.close(failed))
        self._broken = True  # closed twice is closed once

    def _try(self, call: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            call()
        except Exception as error:
            self._broken = True
            print(
                f"{self._name} takes no more of this run, metrics.jsonl has it all: {_line(error)}",
                file=sys.stderr,
                flush=True,
            )


class _Wandb:
    def __init__(self, folder: pathlib.Path, run: str, config: Mapping[str, Any]):
        import wandb

        if in_bucket(folder) and os.environ.get("WANDB_MODE") == "offline":
            raise ValueError(
                f"WANDB_MODE=offline: its files cannot be in {folder}; allowed: online"
            )
        self._run = wandb.init(
            id=run,
            resume="allow",
            name="/".join(folder.resolve().parts[-2:]),
            project=os.environ.get("WANDB_PROJECT", "v4jax"),
            dir=tempfile.mkdtemp() if in_bucket(folder) else str(folder),
            config=dict(config),
            # Its lines would break the progress line, and it would keep a second copy of the log.
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)  # steps it has already it leaves out: same values

    def close(self, failed: bool = False) -> None:
        self._run.finish(exit_code=1 if failed else 0)


class _Mlflow:
    BATCH = 100  # values in a request; MLflow takes up to 1000, and 100 parameters

    def __init__(self, folder: pathlib.Path, run: str, config: Mapping[str, Any]):
        # Its default waits for minutes when the server is gone, and training with it.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # a line for every table it makes
        import mlflow
        from mlflow.entities import Metric, Param

        if mlflow.get_tracking_uri().startswith("sqlite"):  # the default; mlflow-skinny lacks these
            import alembic  # noqa: F401
            import sqlalchemy  # noqa: F401

        self._metric, self._uri = Metric, mlflow.get_tracking_uri()
        with _alone_with(self._uri):
            self._client = mlflow.MlflowClient()
            experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "v4jax"))
            found = self._client.search_runs([experiment], f"tags.v4jax_run = '{run}'")
            if found:
                self._run = found[0].info.run_id
                self._client.update_run(self._run, status="RUNNING")
                return
            name = "/".join(folder.resolve().parts[-2:])
            created = self._client.create_run(experiment, tags={"v4jax_run": run}, run_name=name)
            self._run = created.info.run_id
            # A parameter holds at most 6000 characters.
            params = [Param(_mlflow_name(k), v[:6000]) for k, v in flat(config).items()]
            for i in range(0, len(params), self.BATCH):
                self._client.log_batch(self._run, params=params[i : i + self.BATCH])

    def _experiment(self, name: str) -> str:
        try:
            return self._client.create_experiment(name)
        except Exception:  # it is there; asking first would race with the sweep's other runs
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return found.experiment_id

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        values = [self._metric(_mlflow_name(k), v, now, step) for k, v in numbers.items()]
        with _alone_with(self._uri):
            for i in range(0, len(values), self.BATCH):
                self._client.log_batch(self._run, metrics=values[i : i + self.BATCH])

    def close(self, failed: bool = False) -> None:
        with _alone_with(self._uri):
            self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


@contextlib.contextmanager
def _alone_with(uri: str) -> Iterator[None]:
    """One process at a time where the store is an SQLite file: two of a sweep's runs that make or
    migrate MLflow's tables at once, as opening it does, break it, and writers wait for seconds."""
    _, sqlite, path = uri.partition("sqlite:///")
    try:
        import fcntl
    except ImportError:  # not on Windows
        sqlite = ""
    if not sqlite:
        yield
        return
    with open(path.partition("?")[0] + ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _mlflow_name(name: str) -> str:
    """MLflow takes letters, digits and `_-./: `; the rest becomes `_`."""
    return "".join(c if c.isalnum() or c in "_-./: " else "_" for c in name)

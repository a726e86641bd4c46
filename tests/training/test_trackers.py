"""Trackers: what Weights & Biases and MLflow keep of a run, read from their own local files."""

import contextlib
import json
import math
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from v4jax.training import trackers
from v4jax.training.metrics import MetricsWriter
from v4jax.training.trackers import PACKAGES, flat, open_trackers, run_id

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"model": {"d_model": 64}, "seed": 3, "note": "a b"}


class Recorder:
    """A tracker in memory; `broken` raises at every call."""

    def __init__(self, broken=False):
        self.rows, self.closed, self.broken, self.calls = [], [], broken, 0

    def log(self, step, numbers):
        self.calls += 1
        if self.broken:
            raise ConnectionError("no route to host\nand more")
        self.rows.append((step, dict(numbers)))

    def close(self, failed=False):
        self.closed.append(failed)


# ---- without any service ----


def test_no_names_import_nothing():
    program = (
        "import sys; from v4jax.training.trackers import open_trackers; "
        "assert open_trackers([], 'nowhere', {}) == (); "
        "print(*sorted({'wandb', 'mlflow', 'jax', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr


def test_an_unknown_name_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^--trackers=wandbb: unknown, allowed: wandb, mlflow$"):
        open_trackers(["wandbb"], tmp_path, {})


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_one_line_with_the_command(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # makes `import` raise ModuleNotFoundError
    with pytest.raises(ValueError) as caught:
        open_trackers([name], tmp_path, {})
    line = str(caught.value)
    assert line == f"--trackers={name}: {name} is not installed; pip install {PACKAGES[name]}"


def test_the_writer_tells_trackers_what_the_file_holds_and_the_file_stays_the_same(tmp_path):
    rows = [(1, {"loss": 0.1, "n": 7, "phase": "qat"}), (2, {"loss": math.nan, "norm/grad": 2.0})]
    tracker = Recorder()
    for folder, given in (("with", [tracker]), ("without", [])):
        with MetricsWriter(tmp_path / folder, trackers=given) as writer:
            for step, metrics in rows:
                writer.write(step, metrics)
    with_, without = (tmp_path / f / "metrics.jsonl" for f in ("with", "without"))
    assert with_.read_bytes() == without.read_bytes()
    assert tracker.rows[0] == (1, {"loss": 0.1, "n": 7.0})
    assert math.isnan(tracker.rows[1][1]["loss"]) and tracker.rows[1][1]["norm/grad"] == 2.0
    assert tracker.closed == [False]


def test_an_error_in_training_closes_as_failed(tmp_path):
    tracker = Recorder()
    with pytest.raises(FloatingPointError):
        with MetricsWriter(tmp_path, trackers=[tracker]):
            raise FloatingPointError
    assert tracker.closed == [True]


def test_a_broken_service_says_one_line_and_training_goes_on(tmp_path, capsys):
    inner = Recorder(broken=True)
    guarded = trackers._Guarded("mlflow", inner)
    with MetricsWriter(tmp_path, trackers=[guarded]) as writer:
        for step in range(3):
            writer.write(step, {"loss": 1.0})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "mlflow" in lines[0] and "no route to host" in lines[0]
    assert inner.calls == 1 and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_the_id_survives_a_restart_and_a_copied_folder_gets_its_own(tmp_path):
    first = run_id(tmp_path / "a")
    assert first == run_id(tmp_path / "a") and len(first) == 16
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert run_id(tmp_path / "b") != first
    assert run_id(tmp_path / "a") == first
    (tmp_path / "a" / "tracker.json").write_text("{")  # damaged: another id, not an error
    assert run_id(tmp_path / "a") == run_id(tmp_path / "a") != first


def test_flat():
    assert flat({"a": {"b": 1, "c": {"d": [1, 2]}}, "e": "x", "f": {}, "g": None}) == {
        "a.b": "1",
        "a.c.d": "[1, 2]",
        "e": "x",
        "f": "{}",
        "g": "null",
    }


# ---- the services, without a network ----

NEEDS = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}


def interrupted_run(name: str, folder: Path, ending: str, **environ):
    """Trains to step 3, ends so, goes on from the checkpoint of step 2 to step 4: two processes."""
    program = (
        "import os, sys; from v4jax.training.metrics import MetricsWriter\n"
        "from v4jax.training.trackers import open_trackers\n"
        "name, folder, first, last, ending = sys.argv[1:]\n"
        f"trackers = open_trackers([name], folder, {CONFIG!r})\n"
        "with MetricsWriter(folder, int(first) or None, trackers) as writer:\n"
        "    for step in range(int(first) + 1, int(last) + 1):\n"
        "        loss = float('nan') if step == 4 else step / 8\n"
        "        writer.write(step, {'loss': loss, 'moe/load': float(step), 'phase': 'x'})\n"
        "    if ending == 'killed': os._exit(9)\n"
        "    if ending == 'preempted': sys.exit(75)\n"
    )
    for first, last, how in ((0, 3, ending), (2, 4, "done")):
        run = subprocess.run(
            [sys.executable, "-c", program, name, str(folder), str(first), str(last), how],
            cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert run.returncode == {"killed": 9, "preempted": 75, "done": 0}[how], run.stderr
    return run


def installed(name: str) -> dict[str, str]:
    for package in NEEDS[name]:
        reason = f"{package} is not installed: pip install {PACKAGES[name]}"
        pytest.importorskip(package, reason=reason)
    return {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "MLFLOW_"))}


@pytest.mark.slow
def test_wandb_offline_goes_on_in_the_same_run(tmp_path):
    environ = installed("wandb") | {"WANDB_MODE": "offline"}
    folder = tmp_path / "sweep" / "lr=1" / "control"
    run = interrupted_run("wandb", folder, "preempted", **environ)
    assert run.stdout == ""  # W&B's own lines would break the progress line
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and {file.stem for file in files} == {f"run-{run_id(folder)}"}
    lives = [wandb_records(file) for file in files]
    for started, _ in lives:
        assert started["config"]["model"] == {"d_model": 64} and started["config"]["seed"] == 3
        assert (started["project"], started["name"]) == ("v4jax", "lr=1/control")
    first, second = (rows for _, rows in lives)
    assert [(row["_step"], row["loss"]) for row in first] == [(1, 0.125), (2, 0.25), (3, 0.375)]
    assert [row["_step"] for row in second] == [3, 4] and second[0]["moe/load"] == 3.0
    assert second[1]["loss"] == "NaN" or math.isnan(second[1]["loss"])


def wandb_records(file: Path):
    """(what the run was started with, the rows of its history) of W&B's own log."""
    from wandb.proto import wandb_internal_pb2

    started, rows = {}, []
    for data in leveldb_log(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            config = {u.key: json.loads(u.value_json) for u in record.run.config.update}
            started = {
                "project": record.run.project,
                "name": record.run.display_name,
                "config": config,
            }
        elif kind == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return started, rows


def leveldb_log(content: bytes):
    """The whole records of a file in LevelDB's log format: blocks of 32 KiB, after 7 bytes."""
    position, record = 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        _, length, kind = struct.unpack_from("<IHB", content, position)
        piece = content[position + 7 : position + 7 + length]
        if kind == 0 or len(piece) < length:  # padding, or torn by the kill
            return
        record = piece if kind in (1, 2) else record + piece
        if kind in (1, 4):
            yield record
        position += 7 + length


@pytest.mark.slow
def test_mlflow_on_a_local_file_goes_on_in_the_same_run(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    environ = installed("mlflow") | {"MLFLOW_TRACKING_URI": uri}
    folder = tmp_path / "sweep" / "lr=1" / "control"
    interrupted_run("mlflow", folder, "killed", **environ)

    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        runs = database.execute("select name, status from runs").fetchall()
        losses = database.execute(
            "select distinct step, value, is_nan from metrics where key = 'loss' order by step"
        ).fetchall()
        params = dict(database.execute("select key, value from params"))
        tags = dict(database.execute("select key, value from tags"))
    assert runs == [("lr=1/control", "FINISHED")]
    assert [(s, v) for s, v, nan in losses if not nan] == [(1, 0.125), (2, 0.25), (3, 0.375)]
    assert [s for s, _, nan in losses if nan] == [4]
    assert params == {"model.d_model": "64", "seed": "3", "note": "a b"}
    assert tags["v4jax_run"] == run_id(folder)


@pytest.mark.slow
def test_runs_of_a_sweep_share_a_new_mlflow_file(tmp_path):
    """MLflow makes the file's tables as it opens it; two at once broke it."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    environ = installed("mlflow") | {"MLFLOW_TRACKING_URI": uri}
    program = (
        "import sys; from v4jax.training.trackers import open_trackers\n"
        "(tracker,) = open_trackers(['mlflow'], sys.argv[1], {})\n"
        "for step in range(1, 21): tracker.log(step, {'loss': 1 / step})\n"
        "tracker.close()\n"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program, tmp_path / name],
            cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True,
        )
        for name in "abc"
    ]  # fmt: skip
    said = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0] and said == ["", "", ""]
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        counts = database.execute("select count(*) from metrics group by run_uuid").fetchall()
    assert counts == [(20,), (20,), (20,)]


def test_mlflow_refusing_is_one_line(tmp_path, monkeypatch):
    installed("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://nowhere")
    with pytest.raises(ValueError, match=r"^--trackers=mlflow: .*gopher"):
        open_trackers(["mlflow"], tmp_path, {})

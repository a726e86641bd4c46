"""Kill -9 and damaged checkpoints: the same command goes on, to the bits of a run left alone.

The run is a real process (resume_worker.py): BF16 to the switch, then QAT branched off it. It is
told apart from an undisturbed run by the losses in metrics.jsonl and by the last checkpoint.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.training import resume_worker, tiny
from tests.training.tiny import TIMED
from v4jax.quantization import NO_QUANTIZATION, PAPER
from v4jax.training.checkpoint import Checkpointer
from v4jax.training.files import as_path
from v4jax.training.metrics import read_metrics
from v4jax.training.run import Branch, load_run
from v4jax.training.switch import copy_pretraining

ROOT = Path(__file__).resolve().parents[2]
SWITCH, STEPS = tiny.SWITCH, tiny.STEPS

pytestmark = pytest.mark.slow


class Worker:
    """A worker, started. `lines`: what it said so far; `stderr`: the rest, once it has ended."""

    def __init__(self, folder: Path, *arguments):
        self.lines: list[str] = []
        self._stderr = tempfile.TemporaryFile("w+")  # a pipe nobody reads would block
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.training.resume_worker",
                str(folder),
                *map(str, arguments),
            ],
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            cwd=ROOT,
        )

    def follow(self, word: str, number: int) -> None:
        """Reads until it says `word` and that number or a greater one."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())
            if line.startswith(word) and int(line.split()[-1]) >= number:
                return
        self.end()
        raise AssertionError(f"ended before it said {word} {number}: {self.stderr}")

    def end(self) -> int:
        """Waits for its end; its exit code."""
        self.lines += self.process.communicate(timeout=120)[0].splitlines()
        with self._stderr:
            self._stderr.seek(0)
            self.stderr = self._stderr.read()
        return self.process.returncode

    def kill(self) -> None:
        self.process.kill()
        assert self.end() == -signal.SIGKILL, self.stderr

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if "damaged" in line]


def finish(folder: Path) -> Worker:
    """Starts the worker and lets it end."""
    worker = Worker(folder)
    assert worker.end() == 0 and worker.lines[-1] == "done", worker.stderr
    return worker


def outcome(folder: Path):
    """What must not depend on kills: logged lines but their seconds, and the last checkpoints."""
    trainer, found = resume_worker.trainer(), {}
    for name, stop, formats in (("pretrain", SWITCH, NO_QUANTIZATION), ("qat", STEPS, PAPER)):
        abstract = trainer.abstract_state(trainer.run_config(formats))
        lines = [dict(line) for line in read_metrics(folder / name)]
        for line in lines:
            assert line["seconds_per_step"] >= 0
            for timed in TIMED:
                line.pop(timed, None)
        with Checkpointer(folder / name / "checkpoints") as checkpointer:
            found[name] = lines, checkpointer.restore(abstract, stop)
    return found


def assert_same(folder: Path, undisturbed: Path) -> None:
    ours, theirs = outcome(folder), outcome(undisturbed)
    for name in ("pretrain", "qat"):
        (lines, last), (wanted_lines, wanted) = ours[name], theirs[name]
        assert lines == wanted_lines, name
        assert last.step == wanted.step and last.meta == wanted.meta
        assert tiny.same_bits(last.state, wanted.state), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "runs"
    finish(folder)
    return folder


def test_the_undisturbed_run(undisturbed):
    found = outcome(undisturbed)
    assert [line["step"] for line in found["pretrain"][0]] == [1, 2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in found["qat"][0]] == [13, 14, 16, 18, 20, 22, 24]
    assert found["qat"][0][-1]["loss"] < found["pretrain"][0][0]["loss"] - 0.5  # it does train
    assert "fp8_lossless_share" in found["qat"][0][0]
    run = load_run(undisturbed / "qat")
    assert (run.step, run.config.parent.split("@")[1]) == (STEPS, str(SWITCH))


def test_kill_9_at_random_instants(undisturbed, tmp_path):
    """Between steps, before there is any checkpoint, and while a save runs: in both phases."""
    rng, folder = random.Random(0), tmp_path / "runs"
    instants = [
        ("step", rng.randint(1, 2)),  # no checkpoint is there yet
        ("saving", rng.choice([3, 6])),
        ("step", rng.randint(7, 11)),
        ("step", rng.randint(13, 14)),  # the branch has no checkpoint of its own
        ("saving", rng.choice([15, 18])),
    ]
    for word, number in instants:
        worker = Worker(folder)
        worker.follow(word, number)
        time.sleep(rng.uniform(0, 0.1))
        worker.kill()
        assert not worker.warnings
    worker = Worker(folder, 21)  # kills itself while the thread writes checkpoint 21
    assert worker.end() == -signal.SIGKILL and not worker.warnings
    names = {path.name for path in (folder / "qat/checkpoints").iterdir()}
    assert "tmp-21" in names and "21" not in names
    assert not finish(folder).warnings
    assert_same(folder, undisturbed)
    assert finish(folder).lines == ["restored pretrain 12", "restored qat 24", "done"]
    assert_same(folder, undisturbed)


def test_kill_9_of_a_run_in_a_bucket(undisturbed, cloud):
    """In the middle of an upload, and before the record that makes it a checkpoint."""
    folder = as_path("gs://b/run")
    for victim in (
        "POST run/pretrain/checkpoints/6/state",
        "POST run/qat/checkpoints/21/record.json",
    ):
        worker = Worker(folder)

        def kill(request, worker=worker, victim=victim):
            if request.startswith(victim):
                worker.process.kill()
                return "drop"
            return None

        cloud.fault = kill
        assert worker.end() == -signal.SIGKILL and not worker.warnings, worker.stderr
        cloud.fault = lambda request: None
    assert not finish(folder).warnings
    assert_same(folder, undisturbed)
    for name in ("pretrain", "qat"):  # nothing is left of what was cut off
        places = {
            path.split("/")[3] for path in cloud.names() if f"run/{name}/checkpoints/" in path
        }
        assert places == set(map(str, Checkpointer(folder / name / "checkpoints").steps()))
    copied = as_path("gs://b/other/pretrain")
    copy_pretraining(Branch(folder / "pretrain", SWITCH), copied)
    assert read_metrics(copied) == read_metrics(folder / "pretrain")
    assert load_run(copied).step == SWITCH


def largest_array_file(checkpoint: Path) -> Path:
    files = (path for path in (checkpoint / "state/d").iterdir() if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def truncate(checkpoint: Path) -> None:
    path = largest_array_file(checkpoint)
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(checkpoint: Path) -> None:
    path = largest_array_file(checkpoint)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x04
    path.write_bytes(data)


def lose_the_record(checkpoint: Path) -> None:
    (checkpoint / "record.json").unlink()


def empty_a_file(checkpoint: Path) -> None:
    os.truncate(checkpoint / "state/_METADATA", 0)


# run, after which save it is killed, what happens to its newest checkpoint, before the next start.
DAMAGES = [
    ("pretrain", 9, truncate),
    ("pretrain", SWITCH, flip_a_bit),  # the one that the branch starts from
    ("qat", 21, lose_the_record),
    ("qat", STEPS, empty_a_file),
]


def test_a_damaged_newest_checkpoint_costs_one_warning_and_no_bit(undisturbed, tmp_path):
    folder = tmp_path / "runs"
    damaged: tuple[str, int] | None = None
    for run, save, damage in [*DAMAGES, (None, None, None)]:
        worker = Worker(folder)
        if run is None:
            assert worker.end() == 0 and worker.lines[-1] == "done", worker.stderr
        else:
            worker.follow("saving", save)
            worker.kill()
        expect_fallback(worker, damaged)
        if run is not None:
            with Checkpointer(folder / run / "checkpoints") as checkpointer:
                *older, newest = checkpointer.steps()
            assert older
            damage(folder / run / "checkpoints" / str(newest))
            damaged = run, newest
    assert_same(folder, undisturbed)


def expect_fallback(worker: Worker, damaged: tuple[str, int] | None) -> None:
    """One warning about the damaged (run, step), and a start from an older one of that run."""
    if damaged is None:
        assert not worker.warnings
        return
    run, step = damaged
    (warning,) = worker.warnings
    assert f"checkpoint {step} of" in warning and f"/{run}/" in warning
    assert "trying the next older one" in warning
    first = next(line for line in worker.lines if line.startswith(f"restored {run}"))
    assert 0 < int(first.split()[2]) < step

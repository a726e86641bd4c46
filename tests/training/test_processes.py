"""Real processes: two that train as one, SIGTERM to one and to one of two, and a killed peer."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.training import meshed, tiny
from tests.training.tiny import TIMED
from v4jax import distributed
from v4jax.training.checkpoint import Checkpointer
from v4jax.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
STOP, HEARTBEAT = 12, 10

pytestmark = pytest.mark.slow


class Group:
    """The processes of one run, started. They end with the test."""

    worker = "tests.training.process_worker"

    def __init__(self, folder: Path, count: int, stop: int, pause: float = 0.0, **environ: str):
        port = distributed.free_port()
        self.logs = [folder.with_name(f"{folder.name}.{i}.log") for i in range(count)]
        self.processes = []
        for i, log in enumerate(self.logs):
            environment = os.environ | {
                "JAX_NUM_CPU_DEVICES": str(4 // count if count > 1 else 1),
                "V4JAX_NUM_PROCESSES": str(count),
                "V4JAX_PROCESS_ID": str(i),
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "V4JAX_HEARTBEAT_SECONDS": str(HEARTBEAT),
            } | environ  # fmt: skip
            command = [self.worker, str(folder), str(stop), str(pause)]
            with open(log, "w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-u", "-m", *command],
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        cwd=ROOT,
                        env=environment,
                    )  # fmt: skip
                )

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    def follow(self, index: int, line: str) -> None:
        """Waits until that process has said the line."""
        deadline = time.monotonic() + 240
        while line not in self.logs[index].read_text(errors="replace").splitlines():
            assert time.monotonic() < deadline, self.said()
            assert self.processes[index].poll() is None, self.said()
            time.sleep(0.02)

    def end(self) -> list[int]:
        return [process.wait(240) for process in self.processes]


def finish(folder: Path, count: int, stop: int = STOP) -> None:
    with Group(folder, count, stop) as group:
        assert group.end() == [0] * count, group.said()


def lines(folder: Path) -> list[dict]:
    found = [dict(line) for line in read_metrics(folder)]
    for line in found:
        for name in TIMED:
            del line[name]
    return found


def final(folder: Path, step: int = STOP):
    with Checkpointer(folder / "checkpoints") as checkpointer:
        return checkpointer.restore(meshed.trainer(None).abstract_state(), step)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    finish(folder, 1)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "run"
    finish(folder, 2)
    return folder


def assert_same(folder: Path, undisturbed: Path) -> None:
    assert lines(folder) == lines(undisturbed)
    assert tiny.same_bits(final(folder).state, final(undisturbed).state)


def test_two_processes_train_as_one(one, two):
    first, second = (np.array([line["loss"] for line in lines(run)]) for run in (one, two))
    np.testing.assert_allclose(second[:10], first[:10], rtol=1e-5)
    assert [line["step"] for line in lines(two)] == list(range(1, STOP + 1))
    apart = [i for i, (a, b) in enumerate(zip(lines(one), lines(two), strict=True), 1)
             if a["load_max"] != b["load_max"]]  # fmt: skip
    print(f"loads first differ at step {apart[0]}" if apart else "the same loads throughout")


def eight_steps_of(run: Path, folder: Path) -> Path:
    """`folder`, with a copy of the run without its last checkpoint: it goes on from step 8."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / f"checkpoints/{STOP}")
    with Checkpointer(folder / "checkpoints") as checkpointer:
        assert checkpointer.steps()[-1] == 8
    return folder


def test_one_process_goes_on_from_what_two_saved(one, two, tmp_path):
    """Eight steps by two processes, four by one."""
    finish(eight_steps_of(two, tmp_path / "run"), 1)
    losses = [[line["loss"] for line in lines(run)] for run in (one, two, tmp_path / "run")]
    assert losses[2][:8] == losses[1][:8]
    np.testing.assert_allclose(losses[2][:10], losses[0][:10], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_saves_on_all_and_the_rerun_is_bit_identical(one, two, tmp_path, count):
    folder = tmp_path / "run"
    with Group(folder, count, STOP, 0.3) as group:
        group.follow(0, "step 2")
        group.processes[-1].terminate()  # of two: the second, which is not the coordinator
        assert group.end() == [75] * count, group.said()
        assert "SIGTERM, saved at step" in group.logs[0].read_text()
    with Checkpointer(folder / "checkpoints") as checkpointer:
        (*_, step) = checkpointer.steps()
    assert 2 <= step < STOP
    finish(folder, count)
    assert_same(folder, (one, two)[count - 1])


class Evaluations(Group):
    worker = "tests.training.evaluation_worker"


@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_ends_an_evaluation(tmp_path, count):
    """At one batch on all processes, though nothing else keeps them together."""
    with Evaluations(tmp_path / "run", count, 100, 0.05) as group:
        for i in range(count):
            group.follow(i, "evaluation 2")
        group.processes[-1].terminate()
        started = time.monotonic()
        assert group.end() == [75] * count, group.said()
        assert time.monotonic() - started < 20
    text = "SIGTERM, during the evaluation; the same command goes on"
    assert [log.read_text().count(text) for log in group.logs] == [1, 0][:count]


def test_a_killed_peer_ends_the_other_and_the_next_start_resumes(two, tmp_path):
    """The first process is killed, the run is started again, and then the second is."""
    folder = tmp_path / "run"
    for victim, step in enumerate(("step 6", "step 10")):
        with Group(folder, 2, STOP, 0.3) as group:
            group.follow(victim, step)
            group.processes[victim].kill()
            killed = time.monotonic()
            codes = group.end()
            assert time.monotonic() - killed < 3 * HEARTBEAT
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, 75), group.said()
        with Checkpointer(folder / "checkpoints") as checkpointer:
            assert checkpointer.steps()[-1] == (4, 8)[victim]
    finish(folder, 2)
    assert_same(folder, two)


def test_a_folder_that_is_not_shared_ends_in_one_line(two, tmp_path):
    """The second process resumes elsewhere: it would train on alone, on other parameters."""
    eight_steps_of(two, tmp_path / "here")
    port = str(distributed.free_port())
    environ = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "V4JAX_NUM_PROCESSES": "2"}
    with (
        Group(
            tmp_path / "here", 1, STOP, V4JAX_PROCESS_ID="0", JAX_NUM_CPU_DEVICES="2", **environ
        ) as here,
        Group(
            tmp_path / "there", 1, STOP, V4JAX_PROCESS_ID="1", JAX_NUM_CPU_DEVICES="2", **environ
        ) as there,
    ):
        assert there.end() == [1]
        assert here.end() != [0]
        assert "is the folder shared by all machines?" in there.said()

"""A run has one owner at a time, whoever is killed when."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launching.sweeping import alive, disguised_claim, kill, wait_for
from v4jax.launching import claim, processes
from v4jax.training.files import create

ROOT = Path(__file__).resolve().parents[2]


def program(text, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", "import sys, time\nfrom v4jax.launching import claim\n" + text]
        + list(map(str, arguments)),
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def owner_elsewhere(folder):
    """Makes `folder` claimed by a process that takes it, says so and sleeps; returns it."""
    process = program(
        "from pathlib import Path\n"
        "print(claim.take(Path(sys.argv[1])).token, flush=True)\ntime.sleep(600)",
        folder,
    )
    process.token = process.stdout.readline().strip()
    return process


def test_a_claim_is_taken_once_and_again_after_release(tmp_path):
    first = claim.take(tmp_path / "claims")
    assert claim.take(tmp_path / "claims") is None
    assert claim.owner_of(tmp_path / "claims") == first.owner
    assert first.owner.pid == os.getpid()
    assert first.beat()
    first.release()
    assert claim.owner_of(tmp_path / "claims") is None
    second = claim.take(tmp_path / "claims")
    assert second.token != first.token
    assert second.beat() and not first.beat()


def test_another_process_keeps_its_claim_until_it_dies(tmp_path):
    owner = owner_elsewhere(tmp_path)
    assert claim.take(tmp_path) is None
    assert claim.owner_of(tmp_path).pid == owner.pid
    os.kill(owner.pid, signal.SIGSTOP)  # asleep is not dead
    assert claim.take(tmp_path) is None
    owner.send_signal(signal.SIGKILL)
    wait_for(lambda: not alive(owner.pid))  # a zombie: nobody has waited for it
    assert claim.take(tmp_path) is not None
    owner.communicate()


def test_a_process_id_that_came_back_is_not_the_owner(tmp_path):
    claim.take(tmp_path)
    disguised_claim(tmp_path, started="1")
    assert claim.take(tmp_path) is not None


def test_an_owner_on_another_machine_lives_while_it_beats(tmp_path):
    first = claim.take(tmp_path)
    path = disguised_claim(tmp_path, machine="elsewhere", pid=1)
    then = time.time() - claim.STALE - 5
    os.utime(path, (then + 10, then + 10))
    assert claim.take(tmp_path) is None
    os.utime(path, (then, then))
    assert first.beat()  # it lives after all
    assert claim.take(tmp_path) is None
    os.utime(path, (then, then))
    assert claim.take(tmp_path) is not None
    assert not first.beat()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}'])
def test_a_damaged_claim_is_dead_once_it_is_old(tmp_path, text):
    (tmp_path / "7").write_text(text)
    assert claim.take(tmp_path) is None
    os.utime(tmp_path / "7", (1, 1))
    assert claim.take(tmp_path).path.name == "8"


def test_without_hard_links_a_claim_is_still_taken_once(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "no hard links here")

    monkeypatch.setattr(os, "link", link)
    taken = claim.take(tmp_path)
    assert claim.owner_of(tmp_path) == taken.owner
    assert not create(tmp_path / "1", b"x")
    assert claim.take(tmp_path) is None


STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""


def left_by(owner):
    """A worker of `owner` in a session of its own, which ignores SIGTERM."""
    worker = subprocess.Popen(
        [sys.executable, "-c", STUBBORN],
        env=os.environ | {processes.MARK: owner.token},
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    worker.stdout.readline()
    return worker


def test_what_dead_owners_left_running_is_ended_first(tmp_path, monkeypatch):
    """Also what the owner before the last left, which the last was killed too early to see."""
    monkeypatch.setattr(processes.end, "__defaults__", (0.3,))
    first = owner_elsewhere(tmp_path)
    left = [left_by(first)]
    kill(first)
    last = json.loads((tmp_path / "1").read_text()) | {"token": "cafe"}
    (tmp_path / "2").write_text(json.dumps(last))
    assert claim.take(tmp_path).path.name == "3"
    for worker in left:
        assert not alive(worker.pid)
        worker.communicate()


RACE = """
import os, random
from pathlib import Path
folder, left = Path(sys.argv[1]), 12
while left:
    taken = claim.take(folder / "claims")
    if taken is not None:
        with open(folder / "journal", "a") as file:
            file.write(f"in {os.getpid()}\\n"); file.flush()
            time.sleep(random.random() / 100)
            file.write(f"out {os.getpid()}\\n"); file.flush()
        taken.release()
        left -= 1
    time.sleep(random.random() / 100)
"""


def test_of_many_one_at_a_time_also_when_they_are_killed(tmp_path):
    (tmp_path / "journal").touch()
    running = [program(RACE, tmp_path) for _ in range(4)]
    killed = set()
    for process in running[:2]:
        mark = f"in {process.pid}\n"
        wait_for(lambda m=mark: m in (tmp_path / "journal").read_text(), seconds=60)
        kill(process)
        killed.add(process.pid)
    for process in running[2:]:
        process.communicate(timeout=60)
        assert process.returncode == 0
    inside, entered = None, 0
    for line in (tmp_path / "journal").read_text().splitlines():
        what, pid = line.split()
        if what == "in":
            assert inside is None or inside in killed, f"{pid} came in while {inside} was there"
            inside, entered = int(pid), entered + 1
        else:
            assert int(pid) == inside
            inside = None
    assert entered >= 2 * 12 + 2


def test_start_time_tells_processes_apart():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    began = processes.start_time(child.pid)
    assert began and began == processes.start_time(child.pid)
    assert began != processes.start_time(os.getpid())
    child.kill()
    wait_for(lambda: processes.start_time(child.pid) is None)  # though it is still to be reaped
    child.wait()
    assert processes.start_time(child.pid) is None


def test_owner_reads_as_a_place(tmp_path):
    owner = claim.take(tmp_path).owner
    assert str(dataclasses.replace(owner, host="node7", pid=12)) == "node7, process 12"

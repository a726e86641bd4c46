"""A run's folder in a bucket, against a fake of Google Cloud Storage: what is there, and when.

Run as a program, this file is the process that is killed in the middle of an upload.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.training.test_checkpoint import bits, save, small_state
from v4jax.training import files
from v4jax.training.checkpoint import Checkpointer, SaveError
from v4jax.training.files import BucketError, Refused, as_path, create, write_whole
from v4jax.training.metrics import MetricsWriter, read_metrics

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "gs://b/run/checkpoints"


def restored(step=None):
    with Checkpointer(FOLDER) as checkpointer:
        found = checkpointer.restore(small_state(), step)
    return found and found.step, found and bits(found.state) == bits(small_state(found.step))


# ---- files ----


def test_a_bucket_answers_as_a_folder_does(cloud, tmp_path):
    local, there = tmp_path / "run", as_path("gs://b/run")
    texts = {"a.txt": b"a", "x/metrics.jsonl": b"1\n22\n", "y/metrics.jsonl": b"", "y/z/c": b"c"}
    texts |= {f"many/{i}": b"%d" % i for i in range(20)}  # several pages of a list
    assert not there.exists() and not there.is_dir() and list(there.iterdir()) == []
    for name, text in texts.items():
        write_whole(local / name, text)
        write_whole(there / name, text)
    assert cloud.names() == sorted(f"run/{name}" for name in texts)
    for name in ("", "a.txt", "x", "many", "y/z", "y/z/c", "a", "xx", "many/1/2"):
        one, other = local / name, there / name
        assert [other.exists(), other.is_file(), other.is_dir()] == [
            one.exists(), one.is_file(), one.is_dir(),
        ], name  # fmt: skip
        if one.is_dir():
            assert {p.name for p in other.iterdir()} == {p.name for p in one.iterdir()}, name
    for pattern in ("*/metrics.jsonl", "metrics.jsonl", "a.txt", "*", "y/*", "m*/1*", "y/z"):
        expected = sorted(p.relative_to(local).as_posix() for p in local.glob(pattern))
        assert sorted(str(p.relative_to(there)) for p in there.glob(pattern)) == expected, pattern
    for name in ("x/metrics.jsonl", "y/metrics.jsonl", "a.txt"):
        for size in (1, 4, 100):
            assert files.read_end(there / name, size)[0] == files.read_end(local / name, size)[0]
    assert abs(files.modified(there / "a.txt") - time.time()) < 60
    cloud.put("b", "run/x/new", b"by another")  # nothing is remembered of what was there
    assert {p.name for p in (there / "x").iterdir()} == {"metrics.jsonl", "new"}
    assert (there / "x/new").exists() and "x/new" in there.objects()
    with pytest.raises(FileNotFoundError):
        (there / "no").read_bytes()
    assert [p.relative_to(there / "y").as_posix() for p in [there / "y" / "z"]] == ["z"]


def test_one_of_many_creates_a_file(cloud):
    path, won = as_path("gs://b/claims/1"), []

    def take(content: bytes) -> None:
        if create(path, content):
            won.append(content)

    threads = [threading.Thread(target=take, args=(b"%d" % i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [path.read_bytes()]


def test_who_gets_no_answer_finds_that_it_has_created_the_file(cloud, at_once):
    answers = iter(["deaf"])
    cloud.fault = lambda request: next(answers, None)
    path = as_path("gs://b/claims/1")
    assert create(path, b"mine") and path.read_bytes() == b"mine"
    assert cloud.log.count("POST claims/1") == 2
    assert not create(path, b"another's")


@pytest.mark.parametrize("fault", [503, 429, "drop"])
def test_what_fails_once_is_tried_again(cloud, at_once, fault):
    seen = set()

    def every_first(request):
        return None if request in seen else seen.add(request) or fault

    cloud.fault = every_first
    path = as_path("gs://b/x/y")
    write_whole(path, b"content" * 1000)
    assert path.read_bytes() == b"content" * 1000 and path.exists()
    assert [p.name for p in path.parent.iterdir()] == ["y"]
    path.unlink()
    assert not cloud.names()


def test_what_fails_always_ends_in_one_line(cloud, at_once, capfd):
    path = as_path("gs://b/x/y")
    for fault, kind, words in (
        (503, BucketError, "gs://b/x/y: the bucket does not answer as it should: try again"),
        (403, Refused, "gs://b/x/y: no permission: no access for you; allowed: "),
    ):
        cloud.fault = lambda request, fault=fault: fault
        for act in (lambda: write_whole(path, b""), path.read_bytes, path.exists):
            with pytest.raises(kind, match=words) as caught:
                act()
            assert "\n" not in str(caught.value)
    cloud.fault = lambda request: None
    assert not cloud.names()
    with pytest.raises(Refused, match="^gs://other/x: there is no bucket other$"):
        write_whole(as_path("gs://other/x"), b"")
    assert capfd.readouterr().err == ""  # gcsfs would log each with its traceback


def test_what_is_no_folder_is_refused_in_one_line(monkeypatch):
    for text in ("s3://b/x", "gs://b", "gs://", "gs://b//x", "gs://b/../x", "http://b/x"):
        with pytest.raises(ValueError, match=r"^--workdir=\S*: allowed: .*gs://BUCKET/PATH.*$"):
            as_path(text)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"^--workdir=gs://b/x: etils is not .*pip install gcsfs.*$"
    ):
        as_path("gs://b/x")
    assert as_path("runs/x") == Path("runs/x")


def test_what_killed_processes_left_on_the_way_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    program = "import time\nfrom v4jax.training.files import scratch\n"
    program += "with scratch() as folder:\n    print(folder, flush=True)\n    time.sleep(600)"
    line = [sys.executable, "-c", program]
    dead, alive = (
        subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    )
    left, held = (Path(process.stdout.readline().strip()) for process in (dead, alive))
    dead.kill()
    dead.communicate()
    with files.scratch() as new:
        assert left.exists()  # it may just begin
        os.utime(left, (0, 0))
        os.utime(held, (0, 0))
        os.utime(new, (0, 0))
        with files.scratch():
            assert not left.exists() and held.exists() and new.exists()
    assert not new.exists()
    alive.kill()
    alive.communicate()


# ---- checkpoints ----


def test_checkpoints_come_back_and_old_ones_go(cloud):
    save(FOLDER, 1, 2, 3, 4, max_to_keep=2)
    with Checkpointer(FOLDER, max_to_keep=1, keep=(3,)) as checkpointer:
        assert checkpointer.steps() == [3, 4]
        assert not checkpointer.save(4, small_state(4), {})
        assert checkpointer.save(5, small_state(5), {})
    assert restored() == (5, True) and restored(3) == (3, True)
    assert {name.split("/")[2] for name in cloud.names()} == {"3", "5"}
    for step in (1, 2, 3, 4, 5):  # the record comes last, and goes first
        mine = [line for line in cloud.log if f"run/checkpoints/{step}/" in line]
        posted = [line for line in mine if line.startswith("POST")]
        assert posted[-1] == f"POST run/checkpoints/{step}/record.json" and len(posted) > 2
        deleted = [line for line in mine if line.startswith("DELETE")]
        assert not deleted or deleted[0].endswith(f"/{step}/record.json")
    assert [path.name for path in Path(files.tempfile.gettempdir()).glob("v4jax-scratch-*")] == []


def test_a_checkpoint_without_its_record_is_none_and_makes_room(cloud):
    save(FOLDER, 1, 2)
    cloud.buckets["b"].pop("run/checkpoints/2/record.json")
    cloud.put("b", "run/checkpoints/2/state/left", b"behind")
    cloud.put("b", "run/checkpoints/7/state/left", b"behind")
    assert restored() == (1, True)
    with pytest.raises(ValueError, match="no checkpoint of step 2 in gs://b/run/checkpoints"):
        restored(2)
    save(FOLDER, 2)
    assert restored() == (2, True)
    assert not [name for name in cloud.names() if name.endswith("/left")]


@pytest.mark.parametrize("mistake", ["other bytes", "gone", "record"])
def test_a_damaged_checkpoint_is_skipped_and_set_aside(cloud, caplog, mistake):
    save(FOLDER, 1, 2)
    states = [n for n in cloud.names() if n.startswith("run/checkpoints/2/state/")]
    name = max(states, key=lambda n: len(cloud.read(n)))
    if mistake == "gone":
        cloud.buckets["b"].pop(name)
    elif mistake == "record":
        cloud.put("b", "run/checkpoints/2/record.json", b"{}")
    else:
        content = bytearray(cloud.read(name))
        content[len(content) // 2] ^= 1
        cloud.put("b", name, bytes(content))
    with caplog.at_level(logging.WARNING), Checkpointer(FOLDER) as checkpointer:
        assert checkpointer.restore(small_state()).step == 1
        assert "checkpoint 2 of gs://b/run/checkpoints is damaged" in caplog.text
        assert checkpointer.save(2, small_state(2), {})
    assert restored() == (2, True)
    assert "run/checkpoints/damaged-2/record.json" in cloud.names()


def test_a_bucket_that_does_not_answer_damages_nothing(cloud, at_once):
    save(FOLDER, 1, 2)
    names = cloud.names()
    for part in ("2/record.json", "2/state"):
        cloud.fault = lambda request, part=part: 503 if part in request else None
        with Checkpointer(FOLDER) as checkpointer:
            with pytest.raises(BucketError):
                checkpointer.restore(small_state())
            assert not checkpointer._damaged
    cloud.fault = lambda request: 503 if "3/record.json" in request else None
    with pytest.raises(SaveError, match="checkpoint 3 of gs://.* was not saved: BucketError"):
        save(FOLDER, 3)
    cloud.fault = lambda request: None
    assert restored() == (2, True) and set(names) < set(cloud.names())
    save(FOLDER, 3)
    assert restored() == (3, True)


def test_only_the_first_process_writes(cloud, monkeypatch):
    monkeypatch.setattr("v4jax.distributed.is_main", lambda: False)
    save(FOLDER, 1)
    assert cloud.names() == [] and not [line for line in cloud.log if line.startswith("POST")]


def test_kill_9_in_the_middle_of_an_upload(cloud):
    line = [sys.executable, "-m", "tests.training.test_bucket"]
    process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    def kill(request):
        if request.startswith("POST run/checkpoints/6/state"):
            process.kill()
            return "drop"
        return None

    cloud.fault = kill
    _, said = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, said
    cloud.fault = lambda request: None
    assert restored() == (5, True)
    save(FOLDER, 7)
    assert restored() == (7, True)
    places = {name.split("/")[2] for name in cloud.names()}
    assert places == set(map(str, Checkpointer(FOLDER).steps())) == {"3", "4", "5", "7"}


# ---- metrics ----


def test_lines_are_there_before_a_checkpoint_is_and_now_and_then(cloud):
    with MetricsWriter("gs://b/run/pretrain") as writer:
        writer.write(1, {"loss": 2.0})
        writer.settle()
        assert [row["step"] for row in read_metrics("gs://b/run/pretrain")] == [1]
        writer.write(2, {"loss": float("nan")})
        writer._mirror._every = 0.0
        writer.write(3, {"loss": 1.0})
    rows = read_metrics("gs://b/run/pretrain")
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[1]["loss"] != rows[1]["loss"]
    assert any("run/pretrain/tensorboard/events" in name for name in cloud.names())
    with MetricsWriter("gs://b/run/pretrain", resume_step=2) as writer:
        writer.write(3, {"loss": 7.0})
    rows = read_metrics("gs://b/run/pretrain")
    assert [(row["step"], row["loss"]) for row in rows[::2]] == [(1, 2.0), (3, 7.0)]


def test_a_folder_is_filled_here_and_goes_up_whole(cloud):
    with files.filled(as_path("gs://b/run/profile")) as here:
        write_whole(here / "plugins" / "x.pb", b"trace")
        assert cloud.names() == []
    assert cloud.names() == ["run/profile/plugins/x.pb"]
    assert not here.exists()


def test_a_mirror_uploads_by_itself_and_says_what_failed(cloud, at_once):
    mirror = files.Mirror(as_path("gs://b/run"), every=0.05)
    (mirror.folder / "log").write_text("one")

    def until(condition):
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    until(lambda: cloud.names() == ["run/log"])
    mirror.check()
    cloud.fault = lambda request: 503
    (mirror.folder / "log").write_text("one and two")
    until(lambda: mirror._error)
    for act in (mirror.check, mirror.sync, mirror.close):
        with pytest.raises(BucketError, match="^gs://b/run/log: .*$"):
            act()
    assert not mirror.folder.exists() and cloud.read("run/log") == b"one"


def killed() -> None:
    """Saves steps 1 to 20, three of them kept."""
    save(FOLDER, *range(1, 21), max_to_keep=3)


if __name__ == "__main__":
    killed()

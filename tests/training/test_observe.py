"""Looking into a run that trains: SIGUSR1, a profile, lines in a log. No number changes."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from tests.launched import ROOT
from tests.training import tiny
from v4jax.training import command
from v4jax.training.metrics import Progress, read_metrics
from v4jax.training.observe import Pace
from v4jax.training.run import train


@pytest.fixture(scope="module")
def trainer():
    return tiny.trainer()


@pytest.fixture(scope="module")
def plain(trainer, tmp_path_factory):
    """A run that nobody looks into: its folder."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(trainer, folder, stop=8, pace=Pace(log_every=1))
    return folder


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder)]


# ---- SIGUSR1 ----


def worker(folder: Path, what: str, wait_for: str) -> tuple[str, str, int]:
    """stdout, stderr and exit code of a worker that got SIGUSR1 once it had said `wait_for`."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.training.observed_worker", str(folder), what],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        said = ""
        while wait_for not in said:
            line = process.stdout.readline()
            assert line, f"it ended: {process.communicate()[1]}"
            said += line
        process.send_signal(signal.SIGUSR1)
        rest, errors = process.communicate(timeout=120)
    return said + rest, errors, process.returncode


@pytest.mark.slow
def test_a_signal_says_where_a_run_is_and_changes_no_number(plain, tmp_path):
    said, errors, code = worker(tmp_path / "run", "train", "step 5\n")
    assert code == 0 and said.endswith("done\n"), errors
    (line,) = re.findall("^where: .*$", errors, re.MULTILINE)
    assert re.match(r"where: run 5/8 62% loss \d+\.\d{4} \S+ tok/s ETA \S+; process \d+, ", line)
    assert "Current thread" in errors and "slow_rows" in errors  # the stacks
    assert losses(tmp_path / "run") == losses(plain)


@pytest.mark.slow
def test_a_main_thread_that_hangs_in_c_still_shows_its_stack(tmp_path):
    said, errors, code = worker(tmp_path, "hang", "hanging\n")
    assert code == 0 and said.endswith("done\n"), errors
    assert "observed_worker.py" in errors and errors.count("where: starting; process") == 1


# ---- profile ----


@pytest.mark.slow
def test_a_profile_of_three_steps_opens_and_changes_no_number(trainer, plain, tmp_path, capsys):
    folder = tmp_path / "run"
    train(trainer, folder, stop=8, pace=Pace(log_every=1, profile=range(4, 7)))
    assert losses(folder) == losses(plain) and not (plain / "profile").exists()
    (xplane,) = (folder / "profile" / "plugins" / "profile").glob("*/*.xplane.pb")
    assert b"jit(step)" in xplane.read_bytes() and b"layer_0" in xplane.read_bytes()
    with gzip.open(xplane.parent / "perfetto_trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    marked = [e["args"]["step_num"] for e in events if e.get("name") == "train" and "args" in e]
    assert sorted(map(int, marked)) == [4, 5, 6]
    said = capsys.readouterr().out
    assert f"profile of steps 4:7 in {folder / 'profile'}: xprof --logdir=" in said


@pytest.mark.slow
def test_a_run_that_is_resumed_within_its_profile_traces_the_rest(trainer, plain, tmp_path):
    folder = tmp_path / "run"
    train(trainer, folder, stop=5, pace=Pace(log_every=1))
    train(trainer, folder, stop=8, pace=Pace(log_every=1, profile=range(4, 7)))
    assert losses(folder) == losses(plain)
    (trace,) = (folder / "profile").rglob("perfetto_trace.json.gz")
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    marked = [e["args"]["step_num"] for e in events if e.get("name") == "train" and "args" in e]
    assert sorted(map(int, marked)) == [6]


def step_range(text: str | None) -> range | None:
    values = flags.FlagValues()
    flags.DEFINE_string("profile_steps", text, "", flag_values=values)
    values(["program"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "FLAGS", values)
        return command.step_range("profile_steps", 20)


def test_steps_to_profile_are_as_in_python_within_the_run():
    assert step_range("10:15") == range(10, 15) and step_range("1:21") == range(1, 21)
    assert step_range(None) is None
    for wrong in ("5:5", "10", "a:b", "0:3", "15:10", "1:22", "-1:3", "1:2:3", ""):
        with pytest.raises(ValueError, match=f"^--profile_steps={wrong}: allowed: first:end") as e:
            step_range(wrong)
        assert "\n" not in str(e.value) and "1:21" in str(e.value)


def test_the_readme_says_what_there_is():
    text = (ROOT / "README.md").read_text("utf-8")
    section = text.partition("\n## Seeing into a run\n")[2].partition("\n## ")[0]
    (steps,) = set(re.findall(r"--profile_steps=([\w:]+)", section))
    assert step_range(steps) == range(10, 15)
    experiment = (ROOT / "experiments" / "bf16_to_fp4.py").read_text("utf-8")
    assert '"profile_steps"' in experiment and "kill -USR1 " in section
    for name in ("seconds_per_step", "model_flops_per_second", "mfu"):
        assert f"`{name}`" in section


# ---- a log ----


def test_a_log_has_whole_lines_and_few_of_them(monkeypatch):
    """A run of 10,000 steps of a second in a file."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    log = io.StringIO()
    with Progress("pretrain", 10_000, 2048, log, peak=4096.0) as progress:
        for step in range(1, 10_001):
            now += 1.0
            progress.update(step, 2.5)
    text = log.getvalue()
    assert not re.search(r"[\r\x1b\x08]", text) and text.endswith("\n")
    lines = text.splitlines()
    assert len(lines) <= 2 + 10_000 / 60  # the first, the last, and one a minute
    assert all(re.match(r"pretrain +\d+/10000 +\d+%  loss 2\.5000 ", line) for line in lines)
    assert "mfu 50%" in lines[-1] and max(map(len, lines)) < 100

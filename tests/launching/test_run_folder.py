"""A run's folder: its state comes back, and it holds what reproduces the run."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import hypothesis
import pytest
from hypothesis import strategies as st

from v4jax.launching import run_folder
from v4jax.launching.run_folder import Command, RunFolder, State

texts = st.none() | st.text(max_size=20)
numbers = st.integers(0, 10**9)


@hypothesis.given(
    st.builds(
        State, st.sampled_from(run_folder.STATES), numbers, numbers, st.none() | st.integers(),
        texts, st.none() | numbers, texts, texts, texts, texts, texts,
    )
)  # fmt: skip
@hypothesis.settings(max_examples=30)
def test_a_state_comes_back(tmp_path_factory, state):
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    folder.write_state(state)
    assert folder.read_state() == state
    stored = json.loads((folder.path / "launch" / "state.json").read_text("utf-8"))
    assert stored == dataclasses.asdict(state)


def test_a_run_that_was_never_started_is_pending(tmp_path):
    assert RunFolder(tmp_path / "none").read_state() == State("pending", attempt=0)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"state": "sleeping"}'])
def test_a_damaged_state_is_one_line_that_names_the_file(tmp_path, text):
    path = tmp_path / "launch" / "state.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        RunFolder(tmp_path).read_state()
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_newer_versions_state_can_be_read(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "state.json").write_text('{"state": "done", "attempt": 2, "new": 1}')
    assert RunFolder(tmp_path).read_state() == State("done", attempt=2)


def prepared(folder, source, attempt=1):
    command = Command(("python", "x.py", "--workdir=w"), "/here", {"A": "b"}, str(source))
    made = RunFolder(folder, command, attempt, "token")
    made.prepare()
    return made


def test_the_first_attempt_writes_what_reproduces_the_run(tmp_path, monkeypatch):
    source = tmp_path / "x.py"
    source.write_text("first")
    monkeypatch.setattr(run_folder, "source_version", lambda: ("c0ffee", b"a diff"))
    folder = prepared(tmp_path / "run", source)
    record = json.loads((folder.launch / "command.json").read_text())
    assert record["argv"] == ["python", "x.py", "--workdir=w"]
    assert (record["directory"], record["environment"]) == ("/here", {"A": "b"})
    assert (record["commit"], record["changed"]) == ("c0ffee", True)
    assert record["python"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}.")
    assert record["packages"]["pytest"] == pytest.__version__
    assert (folder.launch / "source.diff").read_bytes() == b"a diff"
    source.write_text("second")
    monkeypatch.setattr(run_folder, "source_version", lambda: ("other", b"another"))
    prepared(tmp_path / "run", source, attempt=2)
    assert json.loads((folder.launch / "command.json").read_text()) == record
    assert (folder.launch / "experiment.py").read_text() == "first"


def test_the_source_is_its_repositorys_commit_and_difference(tmp_path):
    def git(*arguments):
        line = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout

    inside = tmp_path / "installed"
    inside.mkdir()
    assert run_folder.source_version(tmp_path.resolve()) == (None, b"")
    git("init", "-q")
    (tmp_path / "a.py").write_text("one\n")
    git("add", "a.py")
    git("commit", "-q", "-m", "m")
    commit = git("rev-parse", "HEAD").strip()
    assert run_folder.source_version(tmp_path.resolve()) == (commit, b"")
    (tmp_path / "a.py").write_text("two\n")
    found, diff = run_folder.source_version(tmp_path.resolve())
    assert found == commit
    assert b"-one\n+two\n" in diff
    assert run_folder.source_version(inside.resolve()) == (None, b"")


def test_workers_carry_the_claims_token(tmp_path):
    folder = RunFolder(tmp_path, Command((), "/", {"A": "b"}), 1, "cafe")
    assert folder.environment() == {"A": "b", "V4JAX_CLAIM": "cafe", "PYTHONUNBUFFERED": "1"}


def test_the_tail_is_what_a_terminal_would_show(tmp_path):
    folder = RunFolder(tmp_path, attempt=3)
    assert folder.tail() == ""
    folder.log.parent.mkdir(parents=True)
    lines = "".join(f"line {i}\n" for i in range(5000))
    folder.log.write_bytes(lines.encode() + b"\n\xff\nstep 1\rstep 2\r\nend")
    assert folder.tail(4) == "line 4999\n\ufffd\nstep 2\nend"
    assert folder.log == pathlib.Path(tmp_path, "launch/attempts/3/log.txt")


@pytest.mark.parametrize(
    ("code", "words"),
    [(1, "exit code 1"), (2, "exit code 2 (bad input)"), (-9, "ended by SIGKILL"), (-99, "99")],
)
def test_an_exit_code_in_words(code, words):
    assert words in run_folder.ending(code)

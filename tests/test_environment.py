"""tools/environment.sh, which makes .venv: with interpreters that only pretend, and no network."""

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "environment.sh"

FAKE = """#!/bin/sh
case "$1 $2" in
    "-c import sys"*) echo "{version} {path}" ;;
    "-c import ensurepip"*) {able} ;;
    "-c ") ;;
    "--version ") echo "Python {version}" ;;
    "-m venv") mkdir -p "$3/bin"; cp "{path}" "$3/bin/python"; echo made >>"{log}" ;;
    "-m pip") echo installed >>"{log}"; [ ! -e "{log}.fail" ] ;;
esac
"""


class Machine:
    """A machine with nothing on PATH but a few tools and the interpreters a test adds."""

    def __init__(self, folder: Path):
        self.folder, self.bin, self.log = folder, folder / "bin", folder / "log"
        self.bin.mkdir()
        for tool in ("cat", "cksum", "cp", "dirname", "head", "mkdir", "mv", "rm", "sh", "sort"):
            (self.bin / tool).symlink_to(shutil.which(tool))

    def add(self, name: str, version: str, able: bool = True) -> Path:
        path = self.bin / name
        path.write_text(
            FAKE.format(version=version, path=path, able="true" if able else "false", log=self.log)
        )
        path.chmod(0o755)
        return path

    def run(self, *arguments: str, python: str = "") -> subprocess.CompletedProcess:
        environ = {"PATH": str(self.bin), "HOME": str(self.folder), "PYTHON": python}
        return subprocess.run(
            ["/bin/sh", str(SCRIPT), *arguments],
            env=environ, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def make(self, python: str = "") -> list[str]:
        """What a `make` did: made, installed, both or nothing."""
        self.log.write_text("")
        run = self.run("make", str(self.folder / "venv"), "dev", python=python)
        assert run.returncode == 0, run.stderr
        return self.log.read_text().split()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_the_newest_that_works_is_found(machine):
    machine.add("python3.14", "3.14")
    broken = machine.add("python3.13", "3.13")
    broken.write_text("#!/bin/sh\necho 'pyenv: python3.13: command not found' >&2\nexit 127\n")
    machine.add("python3.11", "3.11")
    wanted = machine.add("python3", "3.12")
    assert machine.run("find").stdout.strip() == str(wanted)
    assert machine.run("find", "3.11").stdout.strip() == str(machine.bin / "python3.11")


def test_one_in_pyenv_is_found(machine):
    folder = machine.folder / ".pyenv/versions/3.13.1/bin"
    folder.mkdir(parents=True)
    machine.add("python3", "3.13").rename(folder / "python3")
    assert machine.run("find").returncode == 0


def test_no_python_ends_in_one_line(machine):
    machine.add("python3", "3.9")
    run = machine.run("find")
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (1, "", 1)
    assert "no Python 3.13 3.12 3.11" in run.stderr


@pytest.mark.parametrize("action", [["find"], ["make", "unused", "dev"]])
def test_a_python_without_venv_names_the_package(machine, action):
    machine.add("python3", "3.12", able=False)
    run = machine.run(*action)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (1, "", 1)
    assert "python3.12-venv" in run.stderr


def test_an_older_python_with_venv_is_used_before_a_newer_without(machine):
    machine.add("python3.13", "3.13", able=False)
    assert machine.run("find").returncode == 1
    machine.add("python3.11", "3.11")
    assert machine.run("find").stdout.strip().endswith("python3.11")


def test_python_names_the_interpreter(machine):
    machine.add("python3.13", "3.13")
    machine.add("python3.11", "3.11")
    assert machine.run("find", python="python3.11").stdout.strip().endswith("python3.11")
    for name, version, able, message in (
        ("old", "3.10", True, "is Python 3.10, v4jax needs"),
        ("lame", "3.12", False, "python3.12-venv"),
        ("none", "", True, "does not start"),
    ):
        if version:
            machine.add(name, version, able)
        run = machine.run("find", python=name)
        assert (run.returncode, run.stderr.count("\n")) == (1, 1)
        assert message in run.stderr


def test_an_environment_is_reused_and_repaired(machine):
    python = machine.add("python3.12", "3.12")
    stamp = machine.folder / "venv/.stamp"
    assert machine.make() == ["made", "installed"]
    assert machine.make() == []
    assert machine.make(python=str(python)) == []  # the same one by name

    stamp.write_text(stamp.read_text().replace("dev", "old", 1))  # as after a change to the lock
    assert machine.make() == ["installed"]

    stamp.unlink()  # as after an interruption: half an installation is not trusted
    assert machine.make() == ["made", "installed"]

    other = machine.add("python3.11", "3.11")
    assert machine.make() == []
    assert machine.make(python=str(other)) == ["made", "installed"]
    assert machine.make() == []  # without PYTHON= the environment that is there will do

    os.unlink(machine.folder / "venv/bin/python")  # its interpreter went away
    assert machine.make() == ["made", "installed"]


def test_a_failed_installation_leaves_no_stamp(machine):
    machine.add("python3.12", "3.12")
    fail = Path(f"{machine.log}.fail")
    fail.touch()
    run = machine.run("make", str(machine.folder / "venv"), "dev")
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert not (machine.folder / "venv/.stamp").exists()
    fail.unlink()
    assert machine.make() == ["made", "installed"]


def environments() -> dict[str, str]:
    """Folder -> extras of every environment that the Makefile and .ci/run make."""
    text = (ROOT / "Makefile").read_text("utf-8") + (ROOT / ".ci/run").read_text("utf-8")
    made = re.findall(r"(?:ENVIRONMENT\)|environment\.sh make) (\.venv[\w-]*) ([\w,$()]+)", text)
    return {folder: extras.replace("$(EXTRAS)", "dev") for folder, extras in made}


def test_environments_ask_for_extras_that_exist():
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    known = set(setup["options.extras_require"])
    assert {".venv", ".venv-interop", ".venv-aot", ".venv-aot-second"} <= set(environments())
    for folder, extras in environments().items():
        assert set(extras.split(",")) <= known, folder


def test_clean_removes_every_environment():
    (line,) = re.findall(r"^\trm -rf (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert set(environments()) <= set(line.split())

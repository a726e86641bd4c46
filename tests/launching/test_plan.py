"""Names, folders and sweep.json of a sweep's runs."""

import dataclasses
import errno
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4jax.launching import plan as planning
from v4jax.launching.plan import make_plan, read_plan, run_name, table

ROOT = Path(__file__).resolve().parents[2]
GRID = [{"lr": lr, "seed": seed} for lr in ("1e-3", "3e-4") for seed in "012"]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"learning_rate": "1e-3", "seed": "0"}, "learning_rate=1e-3,seed=0"),
        ({"seed": "0", "learning_rate": "1e-3"}, "seed=0,learning_rate=1e-3"),
        ({"scopes": "paper,all_linears"}, "scopes=paper+all_linears"),
        ({"x": "-1.5", "y": "a_b"}, "x=-1.5,y=a_b"),
        ({}, "defaults"),
    ],
)
def test_a_name_says_what_differs(settings, name):
    assert run_name(settings) == name


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"data": "../corpus/a b.txt"}, "data=..-corpus-a-b.txt,"),
        ({"data": ""}, "data=,"),
        ({"x": "1e+3"}, "x=1e+3,"),  # + stands for a comma
        ({"x": "ü\n"}, "x=--,"),
        ({f"flag{i}": "12345" for i in range(20)}, "flag0=12345,flag1=12345,"),
    ],
)
def test_a_name_that_cannot_say_it_all_ends_in_a_hash(settings, start):
    name = run_name(settings)
    assert name.startswith(start)
    assert re.search(r",[0-9a-f]{8}$", name)
    assert len(name) <= 100


SETTINGS = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True), st.text(max_size=8), max_size=4
)


@given(SETTINGS)
def test_names_are_safe_everywhere(settings):
    assert re.fullmatch(r"[A-Za-z0-9._+,=-]{1,100}", run_name(settings))


def test_other_settings_have_another_name():
    """Of every value up to two of the characters that a name may have or must replace."""
    values = ["".join(v) for n in range(3) for v in itertools.product("0+,-/=", repeat=n)]
    all_of_them = [{"a": a, "b": b} for a in values for b in values] + [{"a": a} for a in values]
    assert len({run_name(settings) for settings in all_of_them}) == len(all_of_them)


def test_a_run_has_the_arguments_that_all_have_and_its_own(tmp_path):
    plan = make_plan("x", tmp_path, GRID, ["--quick", "--steps", "3"])
    assert len(plan.runs) == 6
    run = plan.runs[4]
    assert run.name == "lr=3e-4,seed=1"
    assert run.folder == tmp_path / "lr=3e-4,seed=1"
    assert run.settings == {"lr": "3e-4", "seed": "1"}
    assert run.arguments == ("--quick", "--steps", "3", "--lr=3e-4", "--seed=1")
    assert plan.axes == {"lr": ["1e-3", "3e-4"], "seed": ["0", "1", "2"]}


def test_two_of_equal_settings_are_one_run(tmp_path):
    settings = [{"a": "1", "b": "2"}, {"a": "2"}, {"b": "2", "a": "1"}]
    assert [run.name for run in make_plan("x", tmp_path, settings).runs] == ["a=1,b=2", "a=2"]


def test_a_relative_folder_is_the_same_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = make_plan("x", "runs/y", GRID)
    assert plan.workdir == tmp_path / "runs" / "y"


def test_other_places_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^--workdir=s3://b/x: allowed: a folder, or gs://.*$"):
        make_plan("x", "s3://b/x", GRID)


def planned(folder, settings, *arguments, experiment="x"):
    plan = make_plan(experiment, folder, settings, arguments)
    return dataclasses.replace(plan, fixed=tuple(sorted(arguments)))


def test_what_is_written_is_read_also_where_the_folder_moved_to(tmp_path):
    # The flags are not in alphabetical order: JSON's sorted keys must not sort the axes.
    plan = planned(tmp_path / "a", [{"z": "ü", "a": "1"}, {"z": "ü"}], "--quick")
    assert plan.write() == plan
    assert read_plan(tmp_path / "a") == plan
    assert list(read_plan(tmp_path / "a").axes) == ["z", "a"]
    assert list(read_plan(tmp_path / "a").runs[0].settings) == ["z", "a"]
    assert str(tmp_path) not in (tmp_path / "a" / "sweep.json").read_text("utf-8")
    (tmp_path / "a").rename(tmp_path / "b")
    moved = read_plan(tmp_path / "b")
    assert [run.folder for run in moved.runs] == [tmp_path / "b" / run.name for run in plan.runs]


@given(st.lists(SETTINGS, min_size=1, max_size=5))
def test_any_settings_survive_the_file(tmp_path_factory, many):
    folder = tmp_path_factory.mktemp("any")
    plan = planned(folder, many)
    plan.write()
    stored = read_plan(folder)
    assert stored == plan
    assert stored.axes == plan.axes


def test_another_start_adds_its_runs_and_runs_only_those(tmp_path):
    planned(tmp_path, GRID[:2], "--quick").write()
    second = planned(tmp_path, [GRID[1], GRID[5]], "--quick").write()
    assert [run.name for run in second.runs] == ["lr=1e-3,seed=1", "lr=3e-4,seed=2"]
    stored = read_plan(tmp_path)
    assert [run.settings for run in stored.runs] == [GRID[0], GRID[1], GRID[5]]
    assert stored.axes == {"lr": ["1e-3", "3e-4"], "seed": ["0", "1", "2"]}


def test_equal_settings_keep_the_folder_they_have(tmp_path):
    planned(tmp_path, [{"lr": "1", "seed": "0"}]).write()
    again = planned(tmp_path, [{"seed": "0", "lr": "1"}, {"seed": "1", "lr": "1"}])
    for plan in (again.settled(), again.write()):
        assert [run.name for run in plan.runs] == ["lr=1,seed=0", "seed=1,lr=1"]
    assert len(read_plan(tmp_path).runs) == 2


def test_one_value_has_one_spelling_over_all_starts(tmp_path):
    def start(*settings):
        plan = make_plan("x", tmp_path, settings, ["--quick"])
        return plan.parsed([{flag: str(float(text)) for flag, text in one.items()}
                            for one in settings])  # fmt: skip

    first = start(
        {"lr": "1e-3", "seed": "0"}, {"lr": "0.001", "seed": "0"}, {"lr": "1", "seed": "0"}
    )
    assert [run.name for run in first.runs] == ["lr=1e-3,seed=0", "lr=1,seed=0"]
    first.write()
    again = start({"lr": "0.001", "seed": "0"}, {"lr": "0.0010", "seed": "1"}).write()
    assert [run.name for run in again.runs] == ["lr=1e-3,seed=0", "lr=1e-3,seed=1"]
    assert again.runs[1].arguments == ("--quick", "--lr=1e-3", "--seed=1")
    assert again.runs[1].folder == tmp_path / "lr=1e-3,seed=1"
    assert read_plan(tmp_path).axes == {"lr": ["1e-3", "1"], "seed": ["0", "1"]}


@pytest.mark.parametrize(
    ("experiment", "arguments", "what"),
    [
        ("y", ["--quick", "--steps=20"], ["--experiment=x", "--experiment=y"]),
        ("x", ["--quick", "--steps=40"], ["has --steps=20,", "--steps=40"]),
        ("x", ["--quick"], ["has --steps=20,", "this one no such flag"]),
        ("x", ["--quick", "--steps=20", "--n=1"], ["none of these", "--n=1"]),
    ],
)
def test_another_sweep_is_not_mixed_into_a_folder(tmp_path, experiment, arguments, what):
    planned(tmp_path, GRID, "--quick", "--steps=20").write()
    before = (tmp_path / "sweep.json").read_bytes()
    other = planned(tmp_path, [{"lr": "7"}], *arguments, experiment=experiment)
    for act in (other.settled, other.write):
        with pytest.raises(ValueError) as raised:
            act()
        assert all(text in str(raised.value) for text in what), raised.value
        assert "\n" not in str(raised.value)
    assert (tmp_path / "sweep.json").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"{", "is damaged"),
        (b"", "is damaged"),
        (b"\xff", "is damaged"),
        (b"[1]", "is damaged"),
        (b'{"format": 2}', "is of format 2"),
        (b'{"format": 1}', "is damaged"),
        (b'{"format": 1, "axes": [1]}', "is damaged"),
        (b'{"format": 1, "axes": [], "fixed": [], "experiment": "x", "runs": [{}]}', "is damaged"),
    ],
)
def test_a_damaged_file_is_said_and_left_alone(tmp_path, content, what):
    (tmp_path / "sweep.json").write_bytes(content)
    for act in (lambda: read_plan(tmp_path), planned(tmp_path, GRID).write):
        with pytest.raises(ValueError, match=what) as raised:
            act()
        assert "\n" not in str(raised.value)
        assert "sweep.json" in str(raised.value)
    assert (tmp_path / "sweep.json").read_bytes() == content


def test_a_folder_without_a_sweep(tmp_path):
    with pytest.raises(ValueError, match="holds no sweep"):
        read_plan(tmp_path)


def test_a_folder_that_cannot_be_made_and_a_full_disk(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^--workdir=.*/file/x: cannot be written: Not a dir"):
        planned(tmp_path / "file" / "x", GRID).write()
    plan = planned(tmp_path / "full", GRID[:1]).write()

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(planning, "write_whole", full)
    with pytest.raises(ValueError, match=r"^--workdir=.*/full: cannot be written: No space"):
        planned(tmp_path / "full", GRID).write()
    assert read_plan(tmp_path / "full") == plan


def test_launchers_that_start_together_lose_no_runs(tmp_path):
    program = (
        "import sys\n"
        "from v4jax.launching.plan import make_plan\n"
        "who, folder = sys.argv[1:]\n"
        "print(flush=True); sys.stdin.readline()\n"
        "for i in range(10): make_plan('x', folder, [{'who': who, 'i': str(i)}]).write()\n"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", program, who, tmp_path],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for who in "abc"
    ]  # fmt: skip
    for writer in writers:
        writer.stdout.readline()  # imported: now they race
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    found = {(run.settings["who"], run.settings["i"]) for run in read_plan(tmp_path).runs}
    assert found == {(who, str(i)) for who in "abc" for i in range(10)}


def test_the_table_of_a_dry_run(tmp_path):
    plan = make_plan("x", tmp_path, GRID[:2])
    columns = [{"parameters": 1234567, "memory": "2 GB"}, {"parameters": 5, "share": 0.123456}]
    assert table(plan, columns) == "\n".join(
        [
            f"2 runs of x, in {tmp_path}",
            "run             parameters  memory   share",
            "lr=1e-3,seed=0   1,234,567    2 GB",
            "lr=1e-3,seed=1           5          0.1235",
        ]
    )
    assert table(make_plan("x", tmp_path, GRID[:1])).startswith("1 run of x, in ")
    assert table(plan).splitlines()[1:] == ["run", "lr=1e-3,seed=0", "lr=1e-3,seed=1"]


def test_planning_imports_neither_jax_nor_numpy():
    program = (
        "import sys\nfrom v4jax.launching import describe, experiments, plan, sweep\n"
        "print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"jax", "jaxlib", "flax", "numpy", "rich"} & set(loaded)


def test_sweep_json_is_one_object_with_sorted_keys(tmp_path):
    planned(tmp_path, GRID, "--quick").write()
    text = (tmp_path / "sweep.json").read_text("utf-8")
    kept = json.loads(text)
    assert list(kept) == sorted(kept) == ["axes", "experiment", "fixed", "format", "runs"]
    assert kept["format"] == 1

"""What runs do, read from their folders, as a table, as lines and as JSON."""

import io
import json
import os

import pytest

from tests.launching.sweeping import disguised_claim, plan_of
from v4jax.launching import claim, display, status
from v4jax.launching.run_folder import RunFolder, State
from v4jax.launching.status import Progress, RunStatus, read_progress


def write_metrics(folder, phase, rows, modified=None, torn=""):
    path = folder / phase / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    if modified is not None:
        os.utime(path, (modified, modified))


PHASES = [
    {"name": "pretrain", "first": 0, "last": 448},
    {"name": "control", "first": 448, "last": 640},
    {"name": "qat", "first": 448, "last": 640},
]


def test_progress_goes_over_all_phases(tmp_path):
    (tmp_path / "phases.json").write_text(json.dumps(PHASES))
    write_metrics(tmp_path, "pretrain", [{"step": 448, "loss": 3, "seconds_per_step": 9}], 100)
    rows = [{"step": 448 + s, "loss": 2.5, "seconds_per_step": s} for s in (1, 2, 30)]
    write_metrics(tmp_path, "control", rows, 200, torn='{"step": 99')
    found = read_progress(tmp_path)
    assert found == Progress("control", 448 + 30, 448 + 192 + 192, 2.5, 2.0, (832 - 478) * 2.0)


def test_progress_without_phases_has_no_end(tmp_path):
    assert read_progress(tmp_path) == Progress()
    write_metrics(tmp_path, "train", [{"step": 3, "loss": "NaN"}])
    found = read_progress(tmp_path)
    assert (found.phase, found.step, found.steps, found.eta) == ("train", 3, None, None)
    assert found.loss != found.loss
    (tmp_path / "phases.json").write_text('[{"name": "other", "first": 0, "last": 9}]')
    assert read_progress(tmp_path).steps is None


@pytest.mark.parametrize("text", ["", "{", "not json\n", '{"loss": 1}\n', "[1]\n", "7\n"])
def test_damaged_files_count_as_absent(tmp_path, text):
    write_metrics(tmp_path, "train", [], torn=text)
    (tmp_path / "phases.json").write_text(text)
    assert read_progress(tmp_path) == Progress("train")


def test_only_the_end_of_long_metrics_is_read(tmp_path):
    write_metrics(tmp_path, "train", [{"step": s, "loss": float(s)} for s in range(9999)])
    assert read_progress(tmp_path).step == 9998


def swept(folder):
    """A sweep of which one run is done, one runs, one lost its launcher, one failed, one waits."""
    plan = plan_of(folder, 5).write()
    folders = [RunFolder(run.folder) for run in plan.runs]
    folders[0].write_state(State("done", 1, exit=0))
    folders[1].write_state(State("running", 2, failures=1, host="a", pid=7))
    (folders[1].path / "phases.json").write_text('[{"name": "train", "first": 0, "last": 90}]')
    rows = [{"step": 30, "loss": 2.25, "seconds_per_step": 2.0}]
    write_metrics(folders[1].path, "train", rows)
    claim.take(folders[1].claims)
    folders[2].write_state(State("running", 1, host="b"))
    claim.take(folders[2].claims)
    disguised_claim(folders[2].claims, pid=2**22 + 1)
    folders[3].write_state(State("failed", 3, 3, exit=-9, error="many\nlines\nout of memory"))
    return plan


TABLE = """\
run     state    phase   step    loss  s/step   ETA
seed=0  done
seed=1  running  train  30/90  2.2500       2  2:00  attempt 2
seed=2  lost                                         its launcher is dead (b); the sweep's command \
goes on with it
seed=3  failed                                       ended by SIGKILL: out of memory
seed=4  pending
5 runs: 1 running, 1 lost, 1 failed, 1 pending, 1 done; these end in 2:00
"""


def test_status_once(tmp_path, capsys):
    swept(tmp_path)
    assert status.main(tmp_path, watch=False, as_json=False) == 0
    assert capsys.readouterr().out == TABLE


def test_status_of_one_run_and_of_none(tmp_path, capsys):
    swept(tmp_path)
    assert status.main(tmp_path / "seed=1", watch=False, as_json=False) == 0
    assert "30/90" in capsys.readouterr().out
    for folder, reason in ((tmp_path / "x", "no such folder"), (tmp_path / "seed=4", "no such")):
        with pytest.raises(ValueError, match=reason) as error:
            status.main(folder, watch=False, as_json=False)
        assert "\n" not in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="it holds no sweep"):
        status.main(tmp_path / "empty")


def test_status_as_json(tmp_path, capsys):
    swept(tmp_path)
    write_metrics(tmp_path / "seed=0", "train", [{"step": 3, "loss": "NaN"}])
    assert status.main(str(tmp_path), watch=False, as_json=True) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["counts"] == {"done": 1, "running": 1, "lost": 1, "failed": 1, "pending": 1}
    runs = {run["name"]: run for run in found["runs"]}
    assert runs["seed=0"]["loss"] == "nan"
    assert runs["seed=1"]["eta"] == 120.0 and runs["seed=1"]["attempt"] == 2
    assert runs["seed=3"]["error"].endswith("out of memory")


def test_watching_ends_with_the_runs(tmp_path, capsys, monkeypatch):
    plan = swept(tmp_path)
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        for run in plan.runs:
            RunFolder(run.folder).write_state(State("done", 1, exit=0))

    monkeypatch.setattr(status.time, "sleep", sleep)
    assert status.main(tmp_path, watch=True, as_json=False) == 0
    assert len(looks) == 1
    lines = [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "seed=1: running, attempt 2",
        "seed=2: found lost",
        "seed=3: found failed, ended by SIGKILL",
        *(f"seed={seed}: done" for seed in (1, 2, 3, 4)),
        "5 runs: 5 done",
    ]


def test_a_damaged_state_does_not_hide_the_others(tmp_path, capsys):
    swept(tmp_path)
    (tmp_path / "seed=0/launch/state.json").write_text("{")
    assert status.main(tmp_path) == 0
    out = capsys.readouterr().out
    assert "is damaged" in out and "30/90" in out


# ---- displays ----


def runs_of(*each):
    return [RunStatus(f"r{i}", State(s, attempt=1), Progress()) for i, s in enumerate(each)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "environ", "kind"),
    [
        (Terminal(), {"TERM": "xterm"}, display.Table),
        (Terminal(), {"TERM": "dumb"}, display.Lines),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}, display.Lines),
        (Terminal(), {}, display.Lines),
        (io.StringIO(), {"TERM": "xterm"}, display.Lines),
    ],
)
def test_a_table_only_where_it_can_be_redrawn(stream, environ, kind):
    assert type(display.display(stream, environ)) is kind


def emulated(text):
    """What a terminal shows after `text`: lines, cursor up, erase below."""
    lines, row = [""], 0
    while text:
        if text.startswith("\x1b["):
            number, command = 0, ""
            text = text[2:]
            while not command:
                if text[0].isdecimal():
                    number = 10 * number + int(text[0])
                else:
                    command = text[0]
                text = text[1:]
            if command == "A":
                row -= number
                assert row >= 0
            else:
                assert command == "J"
                lines[row:] = [""]
        elif text[0] == "\n":
            row, text = row + 1, text[1:]
            if row == len(lines):
                lines.append("")
        elif text[0] == "\r":
            text = text[1:]  # only ever at the start of a line here
        else:
            lines[row] += text[0]
            text = text[1:]
    return lines


def test_the_table_is_redrawn_below_the_notes(monkeypatch):
    monkeypatch.setattr(
        display.shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((60, 24))
    )
    stream = Terminal()
    shown = display.Table(stream)
    shown.update(runs_of("pending", "pending"))
    shown.note("something happened")
    shown.update(runs_of("running", "done"))
    shown.close()
    assert emulated(stream.getvalue()) == [
        "something happened",
        "run  state    phase  step  loss  s/step  ETA",
        "r0   running",
        "r1   done",
        "2 runs: 1 running, 1 done",
        "",
    ]


def test_what_a_run_printed_moves_no_cursor_and_rings_no_bell():
    error = "Traceback\n\x1b[2J\x1b[31mlost\x1b[0m:\x07 a\tb"
    run = RunStatus("r", State("failed", 1, exit=1, error=error), Progress())
    assert display.table([run])[1].endswith("exit code 1: lost:\N{REPLACEMENT CHARACTER} a b")
    for kind in (display.Table, display.Lines):
        stream = io.StringIO()
        kind(stream).note(f"r failed:\n    {error}")
        said = stream.getvalue()
        assert "lost:" in said and "\n    Traceback" in said
        assert not any(odd in said for odd in ("\x07", "\x1b[2J", "\x1b[31m"))


def test_a_small_terminal_shows_what_runs(monkeypatch):
    monkeypatch.setattr(
        display.shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((30, 6))
    )
    lines = display.table(runs_of("done", "pending", "failed", "running", "done"), 5, 29)
    assert [line.split()[:2] for line in lines] == [
        ["run", "state"], ["r2", "failed"], ["r3", "running"], ["(3", "more)"], ["5", "runs:"],
    ]  # fmt: skip
    assert max(map(len, lines)) <= 29


def test_long_names_keep_their_ends():
    name = "learning_rate=1e-3," * 5 + "seed=7"
    (_, line, _) = display.table(
        [RunStatus(name, State("running", 1), Progress("train", 5))], 9, 80
    )
    assert line.startswith("\u2026") and "seed=7  running  train     5" in line
    assert len(line) <= 80


def test_lines_are_a_change_each_and_a_summary_a_minute(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    shown = display.Lines(stream)
    for states in (("done", "running"), ("done", "running"), ("done", "preempted")):
        shown.update(runs_of(*states))
        now[0] += 10
    now[0] = 65
    for _ in range(3):
        shown.update(runs_of("done", "preempted"))
    now[0] = 130
    shown.update(runs_of("done", "done"))
    said = [line.partition(" ")[2] for line in stream.getvalue().splitlines()]
    assert said == [
        "r1: running",
        "r1: preempted",
        "2 runs: 1 preempted, 1 done",
        "r1: done",
        "2 runs: 2 done",
    ]


def test_lines_do_not_date_anew_what_had_ended_before():
    stream = io.StringIO()
    shown = display.Lines(stream)
    shown.update(runs_of("failed", "lost", "running", "done", "running"))
    shown.update(runs_of("running", "failed", "failed", "done", "running"))
    said = [line.partition(" ")[2] for line in stream.getvalue().splitlines()]
    assert said == [
        *("r0: found failed", "r1: found lost", "r2: running", "r4: running"),
        *("r0: running", "r1: failed", "r2: failed"),
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.6, "0:05"), (754, "12:34"), (3723, "1:02:03"), (273900, "3d 04:05")],
)
def test_clock(seconds, text):
    assert display.clock(seconds) == text

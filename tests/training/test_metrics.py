"""metrics.jsonl after kills, the text of the progress line and of tables."""

import io
import json
import math

import numpy as np
import pytest

from v4jax.training import metrics
from v4jax.training.metrics import MetricsWriter, Progress, progress_line, read_metrics, table


def write(folder, steps, resume_step=None):
    with MetricsWriter(folder, resume_step) as writer:
        for step in steps:
            writer.write(step, {"loss": step / 8})


def steps(folder):
    return [row["step"] for row in read_metrics(folder)]


# ---- metrics.jsonl ----


def test_one_json_object_a_line_readable_at_once(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(1, {"loss": np.float32(0.5), "tokens": 7, "phase": "qat", "norm/grad": 2.0})
        text = (tmp_path / "run" / "metrics.jsonl").read_text()  # before anything is closed
    row = {"step": 1, "loss": 0.5, "tokens": 7, "phase": "qat", "norm/grad": 2.0}
    assert text == json.dumps(row) + "\n"
    assert read_metrics(tmp_path / "run") == [row]
    assert read_metrics(tmp_path) == []


def test_jax_scalars_are_read(tmp_path):
    import jax.numpy as jnp

    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": jnp.bfloat16(0.5), "count": jnp.int32(3)})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5, "count": 3.0}]


def test_non_finite_floats_are_valid_json_and_come_back(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": np.float32("-inf")})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    stored = json.loads(line, parse_constant=refuse)
    assert stored == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    row = read_metrics(tmp_path)[0]
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf


def test_resume_drops_later_lines_and_a_torn_last_one(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert steps(tmp_path) == [1, 2, 3, 4]  # reading is not disturbed either
    write(tmp_path, [3, 4], resume_step=2)
    assert steps(tmp_path) == [1, 2, 3, 4]
    write(tmp_path, [], resume_step=9)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_complete_object_without_a_newline_is_torn_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    assert steps(tmp_path) == [1]
    write(tmp_path, [2], resume_step=2)
    assert steps(tmp_path) == [1, 2]


def test_a_new_start_drops_all_lines(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1])
    assert steps(tmp_path) == [1]


def test_a_damaged_line_is_named(tmp_path):
    for bad in ("{", "[1]", '{"loss": 1.0}'):
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
        with pytest.raises(ValueError, match="line 2: not a JSON object with a step"):
            read_metrics(tmp_path)


def test_tensorboard_has_the_same_numbers(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    write(tmp_path, [1, 2])
    events = list((tmp_path / "tensorboard").iterdir())
    assert len(events) == 1 and ".tfevents." in events[0].name
    data, found = events[0].read_bytes(), []
    while data:  # records: length (8), crc (4), event, crc (4)
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[16 + size :]
    assert found == [(1, "loss", 0.125), (2, "loss", 0.25)]


# ---- progress ----


def test_progress_line():
    assert (
        progress_line("pretrain", 120, 2000, 3.14159, 12345.0, 245.2)
        == "pretrain   120/2000   6%  loss 3.1416  12.3k tok/s  ETA 4:05"
    )
    assert (
        progress_line("qat", 7, 7, math.nan, None, None, took=3723)
        == "qat       7/7 100%  loss nan      - tok/s  took 1:02:03"
    )
    assert progress_line("qat", 1, 7, 1.0, 5.0, None).endswith("5 tok/s  ETA -")


def test_rates_and_times_have_few_digits():
    rates = [0, 0.5234, 7.5, 980.4, 999.96, 99_960, 999_960, 1.234e6, 2.5e9]
    shown = ["0", "0.523", "7.5", "980", "1k", "100k", "1M", "1.23M", "2.5G"]
    assert [metrics._rate(rate) for rate in rates] == shown
    times = [0, 59.4, 59.6, 754, 3600, 172_800]
    assert [metrics._clock(t) for t in times] == [
        "0:00",
        "0:59",
        "1:00",
        "12:34",
        "1:00:00",
        "2d 00:00",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests move: `clock.now += 1`."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def run(progress, clock, count, seconds, first=1, compile_seconds=30.0):
    for step in range(first, first + count):
        clock.now += compile_seconds if step == first else seconds
        progress.update(step, loss=1.0 / step)


def test_the_rate_leaves_out_the_compiling_step_and_forgets(clock):
    out = io.StringIO()
    with Progress("pretrain", 400, 1000, out) as progress:
        run(progress, clock, 100, seconds=0.5)
        progress._draw(clock.now)
        assert out.getvalue().splitlines()[-1].endswith("2k tok/s  ETA 2:30")
        run(progress, clock, Progress.WINDOW + 1, 0.25, first=101, compile_seconds=0.25)
        progress._draw(clock.now)
        assert " 4k tok/s" in out.getvalue().splitlines()[-1]


def test_lines_off_a_terminal_are_few_and_the_last_is_there(clock):
    out = io.StringIO()
    with Progress("pretrain", 1000, 64, out) as progress:
        run(progress, clock, 1000, seconds=0.02)  # 20 s: bounded by the five seconds
    lines = out.getvalue().splitlines()
    assert len(lines) == 5 and "\r" not in out.getvalue()
    assert lines[0].startswith("pretrain     1/1000") and "- tok/s" in lines[0]
    assert lines[-1].startswith("pretrain  1000/1000 100%") and lines[-1].endswith("took 0:50")

    out = io.StringIO()
    with Progress("pretrain", 1000, 64, out) as progress:
        run(progress, clock, 1000, seconds=1)  # bounded by 5 %
    assert len(out.getvalue().splitlines()) == 21

    out = io.StringIO()
    with Progress("pretrain", 100_000, 64, out) as progress:
        run(progress, clock, 600, seconds=1)  # one a minute, since 5 % take more than that
    assert len(out.getvalue().splitlines()) == 11


def test_losses_are_read_only_for_a_line(clock):
    class Loss:
        read = 0

        def __float__(self):
            Loss.read += 1
            return 1.0

    with Progress("pretrain", 1000, 64, io.StringIO()) as progress:
        for step in range(1, 101):
            clock.now += 0.001
            progress.update(step, Loss())
    assert Loss.read == 2


def test_a_terminal_has_one_line_rewritten(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    out = Terminal()
    progress = Progress("pretrain", 10, 64, out)
    for step in range(1, 11):
        clock.now += 1
        progress.update(step, loss=10.0 ** (8 - step))  # shorter and shorter
    assert "\n" not in out.getvalue()
    progress.close()
    progress.close()  # again: nothing
    text = out.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n")
    drawn = text[:-1].split("\r")[1:]
    assert len(drawn) == 11 and all(len(line) < 60 for line in drawn)
    for line, following in zip(drawn, drawn[1:], strict=False):
        assert len(following) >= len(line.rstrip())  # nothing of the longer line stays behind


def test_a_phase_without_steps_says_nothing():
    out = io.StringIO()
    with Progress("pretrain", 10, 64, out):
        pass
    assert out.getvalue() == ""


# ---- tables ----


def test_table():
    rows = [["control", 3.25, "1.65 [1.60, 1.70]", 10], ["ptq, all linears", None, "-0.01", 200]]
    assert table(rows, ["arm", "loss", "bits/byte", "steps"]) == "\n".join(
        [
            "| arm              |   loss |         bits/byte | steps |",
            "| ---------------- | -----: | ----------------: | ----: |",
            "| control          | 3.2500 | 1.65 [1.60, 1.70] |    10 |",
            "| ptq, all linears |      - |             -0.01 |   200 |",
        ]
    )
    assert table([], ["a", "bcde"]) == "| a   | bcde |\n| --- | ---- |"
    with pytest.raises(ValueError, match="a row has 1 cells, the table 2 headers"):
        table([[1]], ["a", "b"])

"""What a run says while it runs: metrics.jsonl, TensorBoard, a progress line, tables at its end.

`metrics.jsonl` is the truth, one JSON object a line; TensorBoard's files and trackers repeat it.
JSON has no NaN and no infinities: they are written as the strings "NaN", "Infinity" and "-Infinity"
(protobuf's rule; Python's float() reads them), and `read_metrics` returns floats again.
"""

from __future__ import annotations

import collections
import json
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from v4jax.training.files import Mirror, as_path, in_bucket
from v4jax.training.run_config import write_atomically
from v4jax.training.trackers import Tracker

NOT_FINITE = ("NaN", "Infinity", "-Infinity")
"""The strings that stand for the floats JSON has no form for."""


class MetricsWriter:
    """Appends to `<folder>/metrics.jsonl` and to TensorBoard files in `<folder>/tensorboard`.

    Write a step's metrics, and `settle`, before its checkpoint: what is there when a checkpoint of
    step s exists is then all of the lines up to s, and a resumed run has each line once.

    Args:
      folder: the run's folder; created.
      resume_step: the step that training goes on from: later lines, and a last line that a kill
        tore, are dropped. None: training starts anew, and all lines are dropped.
      trackers: from `open_trackers`; told every line's numbers, and closed with the writer.

    Raises: ValueError if a line of the file, other than a torn last one, is not a JSON object.
      Every method, BucketError, one line, where the folder's bucket does not answer.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        resume_step: int | None = None,
        trackers: Sequence[Tracker] = (),
    ):
        import tensorboardX  # 0.1 to 0.4 s, and only training needs it

        folder = as_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        first = 0 if resume_step is None else resume_step + 1
        lines = _lines(folder / "metrics.jsonl")
        kept = [line for line in lines if resume_step is not None and _step(line) < first]
        self._mirror = Mirror(folder) if in_bucket(folder) else None
        if self._mirror:
            folder = self._mirror.folder
        path = folder / "metrics.jsonl"
        write_atomically(path, "".join(line + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")
        self._trackers = trackers
        self._board = tensorboardX.SummaryWriter(
            logdir=str(folder / "tensorboard"),
            purge_step=first,  # TensorBoard hides what an interrupted run wrote at later steps
            filename_suffix=f".{os.getpid()}",  # names count in seconds: do not overwrite
        )

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self.close(failed=kind is not None)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One line `{"step": step, **metrics}`, on disk when this returns; in a bucket soon after.

        Args:
          metrics: name -> number (a Python, NumPy or JAX scalar, written as a float unless it is a
            Python int) or string; strings go to metrics.jsonl only. Names may hold "/".
        """
        row: dict[str, Any] = {"step": step}
        for name, value in metrics.items():
            row[name] = value if isinstance(value, str | int) else float(value)
            if not isinstance(value, str):
                self._board.add_scalar(name, float(value), step)
        self._file.write(json.dumps(to_json(row), allow_nan=False) + "\n")
        self._file.flush()
        self._board.flush()
        if self._mirror:
            self._mirror.check()
        del row["step"]
        numbers = {name: float(value) for name, value in row.items() if not isinstance(value, str)}
        for tracker in self._trackers:
            tracker.log(step, numbers)

    def settle(self) -> None:
        """Returns when all lines are where readers look for them: before a step is saved."""
        if self._mirror:
            self._mirror.sync()

    def close(self, failed: bool = False) -> None:
        self._file.close()
        self._board.close()
        if self._mirror:
            self._mirror.close(failed)
        for tracker in self._trackers:
            tracker.close(failed)


def read_metrics(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of `<folder>/metrics.jsonl`, without a torn last one; [] if there is no file.

    Raises: ValueError naming the line that is not a JSON object.
    """
    lines = _lines(as_path(folder) / "metrics.jsonl")
    return [
        {k: float(v) if v in NOT_FINITE else v for k, v in json.loads(line).items()}
        for line in lines
    ]


def _lines(path: pathlib.Path) -> list[str]:
    """The whole lines, each checked to be a JSON object with an integer step."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")  # the rest is torn
    for number, line in enumerate(lines, 1):
        try:
            _step(line)
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a JSON object with a step") from error
    return lines


def _step(line: str) -> int:
    return int(json.loads(line)["step"])


def to_json(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with strings for the floats that JSON has no form for."""

    def finite(value: Any) -> Any:
        if not isinstance(value, float) or math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"

    return {name: finite(value) for name, value in row.items()}


# ---- the progress line ----


class Progress:
    """One line on a phase of training: rewritten in place on a terminal, else now and then a line.

    The rate is that of the last `WINDOW` steps and leaves out the first step, which warms up. Off
    a terminal there is a line after the first step, then one every 5 % or minute, whichever is
    sooner, but none within 5 s of the last. The last step reported always has its line.

    Args:
      phase: a word on what runs ("pretrain").
      total: the step at which the phase ends.
      tokens_per_step: for the rate in tokens.
      peak: tokens a second at which utilisation (mfu) is 1; None: the line has none.
      stream: where to; default standard error.
    """

    WINDOW = 50

    def __init__(
        self,
        phase: str,
        total: int,
        tokens_per_step: int,
        stream: TextIO | None = None,
        peak: float | None = None,
    ):
        self.phase, self.total, self.tokens_per_step = phase, total, tokens_per_step
        self._peak = peak
        self._loss = math.nan  # the last that was read
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._start = time.monotonic()
        self._seen: collections.deque[tuple[int, float]] = collections.deque(maxlen=self.WINDOW + 1)
        self._latest: tuple[int, Any] | None = None
        self._shown: tuple[int, float] | None = None  # step and time of the line last drawn
        self._width = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def update(self, step: int, loss: Any) -> None:
        """Call after each step. `loss`, a number or JAX scalar, is read only to draw a line."""
        now = time.monotonic()
        self._seen.append((step, now))
        self._latest = step, loss
        if self._due(step, now):
            self._draw(now)

    def _due(self, step: int, now: float) -> bool:
        if self._shown is None:
            return True
        steps, seconds = step - self._shown[0], now - self._shown[1]
        if self._terminal:
            return seconds >= 0.5
        return seconds >= 5 and (steps >= 0.05 * self.total or seconds >= 60)

    def line(self) -> str | None:
        """The line of now, with the loss that was read last: waits for no device. None: no step."""
        return None if self._latest is None else self._text(self._latest[0])

    def _text(self, step: int, took: float | None = None) -> str:
        (first, then), (last, latest) = self._seen[0], self._seen[-1]
        rate = (last - first) / (latest - then) if latest > then else None
        tokens = None if rate is None else rate * self.tokens_per_step
        return progress_line(
            self.phase,
            step,
            self.total,
            self._loss,
            tokens,
            None if not rate else max(0, self.total - step) / rate,
            took,
            None if tokens is None or self._peak is None else tokens / self._peak,
        )

    def _draw(self, now: float, took: float | None = None) -> None:
        assert self._latest is not None
        step, loss = self._latest
        self._loss = float(loss)
        line = self._text(step, took)
        if self._terminal:
            line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line stays behind
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
        self._shown = step, now

    def close(self) -> None:
        """Draws the last line, with the seconds that the phase took, and ends it."""
        if self._latest is None:
            return
        now = time.monotonic()
        self._draw(now, took=now - self._start)
        self._latest = None
        if self._terminal:
            self._stream.write("\n")
            self._stream.flush()


def progress_line(
    phase: str,
    step: int,
    total: int,
    loss: float,
    tokens_per_second: float | None,
    eta: float | None,
    took: float | None = None,
    mfu: float | None = None,
) -> str:
    """The line: `pretrain   120/2000   6%  loss 3.1416  12.3k tok/s  ETA 4:05`.

    Args:
      tokens_per_second: None while unknown.
      eta: seconds to go, None while unknown.
      took: seconds gone, for the last line, which says `took 4:05`.
      mfu: share of the peak, shown where it is known.
    """
    width = len(str(total))
    parts = [f"{phase:<9} {step:>{width}}/{total} {100 * step // max(total, 1):>3}%"]
    parts.append(f"loss {loss:.4f}")
    parts.append(f"{_rate(tokens_per_second):>5} tok/s")
    if mfu is not None:
        parts.append(f"mfu {mfu:.0%}")
    parts.append(f"took {_clock(took)}" if took is not None else f"ETA {_clock(eta)}")
    return "  ".join(parts)


def _rate(value: float | None) -> str:
    """Three digits: 0.52, 7.5, 980, 12.3k, 1.2M; "-" for None."""
    if value is None:
        return "-"
    rounded = float(f"{value:.3g}")
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rounded >= limit:
            return f"{rounded / limit:g}{unit}"
    return f"{rounded:g}"


def _clock(seconds: float | None) -> str:
    """0:05, 12:34, 1:02:03, 3d 04:05; "-" for None."""
    if seconds is None:
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


# ---- tables ----


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """An aligned Markdown table, which reads as well on a terminal and in a log.

    Floats have four decimals, None is "-". A column of numbers, also of strings that begin like
    one, stands to the right.

    Raises: ValueError if a row has another length than the headers.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    for row in cells:
        if len(row) != len(headers):
            raise ValueError(f"a row has {len(row)} cells, the table {len(headers)} headers")
    columns = list(zip(headers, *cells, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    right = [all(_is_number(cell) for cell in column[1:]) and len(column) > 1 for column in columns]

    def line(row: Sequence[str]) -> str:
        padded = [f"{c:{'>' if r else '<'}{w}}" for c, w, r in zip(row, widths, right, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(headers), line(rule), *map(line, cells)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.lstrip("+-.")[:1].isdigit() or cell in ("nan", "inf", "-inf")

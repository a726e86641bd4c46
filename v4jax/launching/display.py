"""How the state of all runs is shown: a table that is redrawn in place, or lines for a log."""

from __future__ import annotations

import collections
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TextIO

from v4jax.launching.printable import clean, last_line
from v4jax.launching.run_folder import ending

if TYPE_CHECKING:
    from v4jax.launching.status import RunStatus

ORDER = ("running", "lost", "preempted", "failed", "pending", "done")
"""Which runs a table shows first where it cannot show all."""

SUMMARY = 60.0
"""Seconds between two summaries in a log."""

HEADERS = ("run", "state", "phase", "step", "loss", "s/step", "ETA", "")


class Display(Protocol):
    """Shows what runs do. `update` takes all of them; `note` says something once; then `close`."""

    def update(self, runs: Sequence[RunStatus]) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


def display(stream: TextIO, environ: Mapping[str, str] = os.environ) -> Display:
    """A live table on a terminal, lines elsewhere and where NO_COLOR or TERM=dumb ask for them."""
    plain = environ.get("NO_COLOR") or environ.get("TERM", "dumb") == "dumb"
    return Lines(stream) if plain or not stream.isatty() else Table(stream)


class Table:
    """All runs, redrawn where they stood; notes go above."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._drawn: list[str] = []

    def update(self, runs: Sequence[RunStatus]) -> None:
        size = shutil.get_terminal_size()
        # A line and a column less than there are: the cursor stands below, and nothing wraps.
        self._draw(table(runs, size.lines - 1, size.columns - 1))

    def note(self, text: str) -> None:
        below = self._drawn
        self._draw([])
        self._stream.write(clean(text) + "\n")
        self._draw(below)

    def close(self) -> None:
        """Leaves the table as it stands."""
        self._stream.flush()

    def _draw(self, lines: list[str]) -> None:
        up = f"\x1b[{len(self._drawn)}A" if self._drawn else ""
        self._stream.write(f"{up}\r\x1b[J" + "".join(line + "\n" for line in lines))
        self._stream.flush()
        self._drawn = lines


class Lines:
    """A line when a run's state changes, and one a minute that counts them."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._seen: dict[str, tuple] = {}
        self._next = time.monotonic() + SUMMARY
        self._last = ""

    def update(self, runs: Sequence[RunStatus]) -> None:
        first = not self._seen  # what has ended by then did so before, at another time
        for run in runs:
            seen = (run.state.state, run.state.attempt)
            quiet = first and run.state.state in ("pending", "done")
            if seen != self._seen.get(run.name) and not quiet:
                found = "found " if first and run.state.state != "running" else ""
                self.note(f"{run.name}: {found}{change(run)}")
            self._seen[run.name] = seen
        self._last = summary(runs)
        if time.monotonic() >= self._next:
            self.note(self._last)

    def note(self, text: str) -> None:
        self._stream.write(f"{time.strftime('%H:%M:%S')} {clean(text)}\n")
        self._stream.flush()
        if text == self._last:
            self._next = time.monotonic() + SUMMARY

    def close(self) -> None:
        """Ends with the numbers of runs."""
        if self._last:
            self.note(self._last)


def change(run: RunStatus) -> str:
    """The state that a run has come to, in words."""
    state = run.state
    if state.state == "running":
        return "running" + (f", attempt {state.attempt}" if state.attempt > 1 else "")
    if state.state == "done" or state.exit is None:
        return state.state
    return f"{state.state}, {ending(state.exit)}"


def summary(runs: Sequence[RunStatus]) -> str:
    """`12 runs: 3 running, 9 pending; these end in 4:05`: the last of those that run now."""
    counts = collections.Counter(run.state.state for run in runs)
    parts = ", ".join(f"{counts[state]} {state}" for state in ORDER if counts[state])
    times = [run.progress.eta for run in runs if run.state.state == "running"]
    known = [eta for eta in times if eta is not None]
    number = f"{len(runs)} run" + ("" if len(runs) == 1 else "s")
    return f"{number}: {parts or 'none'}" + (f"; these end in {clock(max(known))}" if known else "")


def table(
    runs: Sequence[RunStatus], height: int | None = None, width: int | None = None
) -> list[str]:
    """Aligned lines, a run each, then the summary.

    Where there is room for `height` lines only, those that run come first; names are shortened
    towards `width` columns, their ends kept, and lines are cut there.
    """
    rows = [_row(run) for run in runs]
    if height is not None and len(rows) > (room := max(1, height - 3)):
        first = sorted(range(len(runs)), key=lambda i: ORDER.index(runs[i].state.state))
        rows = [rows[i] for i in sorted(first[:room])]
        rows.append((f"({len(runs) - room} more)", *[""] * (len(HEADERS) - 1)))
    widths = [max(map(len, column)) for column in zip(HEADERS, *rows, strict=True)]
    if width is not None:
        least = min(widths[0], 24)
        widths[0] = min(widths[0], max(least, width - sum(widths[1:7]) - 2 * 7))
    lines = []
    for name, *cells in (HEADERS, *rows):
        name = name if len(name) <= widths[0] else "\u2026" + name[1 - widths[0] :]
        texts = [name.ljust(widths[0])]
        for i, cell in enumerate(cells, 1):
            texts.append(cell.rjust(widths[i]) if 3 <= i <= 6 else cell.ljust(widths[i]))
        lines.append("  ".join(texts).rstrip()[:width])
    return [*lines, summary(runs)[:width]]


def _row(run: RunStatus) -> tuple[str, ...]:
    state, progress = run.state, run.progress
    step = "" if progress.step is None else str(progress.step)
    if progress.steps:
        step += f"/{progress.steps}"
    running = state.state == "running"
    return (
        run.name,
        state.state,
        progress.phase or "",
        step,
        "" if progress.loss is None else f"{progress.loss:.4f}",
        "" if progress.seconds_per_step is None else f"{progress.seconds_per_step:.3g}",
        clock(progress.eta) if running and progress.eta is not None else "",
        _remark(run),
    )


def _remark(run: RunStatus) -> str:
    state = run.state
    if state.state == "done":
        return ""
    if state.state == "running":
        return f"attempt {state.attempt}" if state.attempt > 1 else ""
    if state.state == "lost":
        return f"its launcher is dead ({state.host}); the sweep's command goes on with it"
    said = ending(state.exit) if state.exit is not None else ""
    last = last_line(clean(state.error or "")).replace("\t", " ")  # a tab's width is not known
    return ": ".join(filter(None, (said, last)))


def clock(seconds: float) -> str:
    """0:05, 12:34, 1:02:03, 3d 04:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"

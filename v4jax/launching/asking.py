"""One question to a scheduler's command line, answered in time or refused in one line."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence


def ask(words: Sequence[str], timeout: float, *, here: str, absent: str, who: str = "") -> str:
    """What the command prints. `here` names it in messages.

    Raises:
      ValueError: one line: the command is not on this machine (then `absent` says what to do), has
        no answer within `timeout` seconds (from `who`), or fails: the last line of its errors.
    """
    try:
        asked = subprocess.run(words, capture_output=True, text=True, timeout=timeout)
    except FileNotFoundError as error:
        raise ValueError(f"{here} is not on this machine{absent}") from error
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{here} got no answer{who} in {timeout:g} s") from error
    if asked.returncode != 0:
        lines = asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"]
        raise ValueError(f"{here} failed: {lines[-1]}")
    return asked.stdout

"""An experiment started as users start it, in a process of its own."""

import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write_corpus(folder: Path) -> Path:
    """Thirty files of a few kilobytes; returns their folder."""
    rng = random.Random(0)
    words = ["def", "return", "self", "x", "y", "+", "(", ")", ":", "\n    ", "for", "in", "0", "1"]
    for i in range(30):
        (folder / f"{i}.py").write_text(" ".join(rng.choices(words, k=rng.randint(200, 900))))
    return folder


def launched(experiment: str, *arguments, timeout: float = 300, **environ):
    """The finished process of `python launch.py --experiment=... arguments` on the CPU.

    Huge pages stay as they are, so that launch.py says nothing of its own.
    """
    return subprocess.run(
        [sys.executable, "launch.py", f"--experiment={experiment}", *map(str, arguments)],
        env=os.environ | {"GLIBC_TUNABLES": "glibc.malloc.check=0"} | environ,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
    )

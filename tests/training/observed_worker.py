"""One small run in a process of its own, for test_observe.py.

    python -m tests.training.observed_worker FOLDER [train|hang]

Says "step N" after each step. hang: sleeps in C, as a main thread does that waits for a compiler.
"""

import ctypes
import pathlib
import sys
import time

from tests.training import tiny
from v4jax.training import whereabouts
from v4jax.training.observe import Pace
from v4jax.training.run import train


def main(folder: pathlib.Path, what: str) -> None:
    whereabouts.answer_signals()
    if what == "hang":
        print("hanging", flush=True)
        libc = ctypes.CDLL(None)
        end = time.monotonic() + 4
        while time.monotonic() < end:  # the signal ends one sleep; no Python runs in it
            libc.usleep(500_000)
        print("done", flush=True)
        return
    trainer = tiny.trainer()
    rows = trainer.rows

    def slow_rows(first, count):
        print("step", first // count, flush=True)
        time.sleep(0.1)
        return rows(first, count)

    trainer.rows = slow_rows
    train(trainer, folder, stop=8, pace=Pace(log_every=1))
    print("done", flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2])

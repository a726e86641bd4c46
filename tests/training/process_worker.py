"""One process of a run that test_processes.py starts, ends and kills.

    python -m tests.training.process_worker FOLDER STOP [SECONDS between steps]

Who is who comes from the environment. Says on stdout where it is, and its losses at the end.
"""

import pathlib
import sys
import time

from tests.training import meshed
from v4jax import distributed, parallel
from v4jax.training.files import as_path
from v4jax.training.observe import Pace
from v4jax.training.run import train

PACE = Pace(log_every=1, save_every=4)


def main(folder: pathlib.Path, stop: int, pause: float = 0.0) -> None:
    distributed.start()
    trainer = meshed.trainer(parallel.make_mesh(None))
    rows = trainer.rows

    def spoken_rows(first, count):
        time.sleep(pause)
        print("step", first // count + 1, flush=True)
        return rows(first, count)

    trainer.rows = spoken_rows
    train(trainer, folder, stop=stop, pace=PACE)
    print("done", flush=True)


if __name__ == "__main__":
    with distributed.errors_end_at_once():
        main(as_path(sys.argv[1]), int(sys.argv[2]), *map(float, sys.argv[3:]))

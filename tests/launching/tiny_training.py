"""An experiment that trains for real: the tiny run of test_processes, over all tasks of its job."""

import pathlib

from absl import app, flags

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
STEPS = flags.DEFINE_integer("steps", 12, "Updates.", 1)
PAUSE = flags.DEFINE_float("pause", 0.0, "Seconds between steps.", 0)


def main(_):
    from tests.training import process_worker
    from v4jax import distributed

    with distributed.errors_end_at_once():
        process_worker.main(pathlib.Path(WORKDIR.value, "train"), STEPS.value, PAUSE.value)


if __name__ == "__main__":
    app.run(main)

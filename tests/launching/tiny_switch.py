"""The switch from BF16 to FP4 for real, on the tiny model: an experiment for sweeps in tests."""

import json
import pathlib

from absl import app, flags

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
SEED = flags.DEFINE_integer("seed", 0, "Of everything.", 0)
RATE = flags.DEFINE_float("learning_rate", 5e-3, "Its peak.", 0)
QAT_START = flags.DEFINE_integer("qat_start", 4, "The step of the switch.", 1)
STEPS = 10
AFTER_SWITCH = ("qat_start",)


def main(_):
    from tests.training import tiny
    from v4jax.quantization import PAPER
    from v4jax.training import run, switch
    from v4jax.training.command import cache_compilations
    from v4jax.training.metrics import read_metrics
    from v4jax.training.optimizer import OptimizerConfig

    cache_compilations()
    workdir = pathlib.Path(WORKDIR.value)
    trainer = tiny.trainer(
        seed=SEED.value,
        schedule=tiny.schedule(STEPS),
        optimizer=OptimizerConfig(learning_rate=RATE.value),
    )
    arms = switch.run_arms(
        trainer,
        workdir,
        switch_step=QAT_START.value,
        scopes={"paper": PAPER},
        pace=run.Pace(log_every=1, save_every=1),
    )
    last = {name: read_metrics(folder)[-1] for name, folder in arms.folders.items()}
    numbers = {
        f"{name}_{kind}": row[kind] for name, row in last.items() for kind in ("loss", "grad_norm")
    }
    (workdir / "result.json").write_text(json.dumps(numbers))


if __name__ == "__main__":
    app.run(main)

"""The process that test_going_back.py kills: a run whose data makes it jump at one step.

    python tests/training/recovery_worker.py FOLDER ON_SPIKE

Says on stdout where it is.
"""

import pathlib
import sys

import numpy as np

from tests.training import tiny
from v4jax.training.data import Batch
from v4jax.training.observe import Pace
from v4jax.training.run import train
from v4jax.training.spikes import SpikeConfig
from v4jax.training.stability import StabilityConfig

STEPS, JUMP, SAVE_EVERY = 52, 31, 5
PACE = Pace(log_every=2, save_every=SAVE_EVERY)
SPIKES = SpikeConfig(warmup=20, lookback=8, cooldown=100)


def trainer(on_spike: str) -> tiny.QuickTrainer:
    """Rows of two a step; those of update 31 are noise."""
    stability = StabilityConfig(
        on_spike=on_spike, delay_steps=3, active_steps=10, skip_sigma=0.0, spikes=SPIKES
    )
    made = tiny.trainer(
        model=tiny.model(mlp_layer_types=("moe",)),
        schedule=tiny.schedule(STEPS),
        stability=stability,
    )
    rows = made.rows

    def spoken_rows(first: int, count: int) -> Batch:
        print("rows", first, flush=True)
        batch = rows(first, count)
        if first == 2 * (JUMP - 1):
            noise = np.random.default_rng(0).integers(0, 255, batch.tokens.shape, np.int32)
            return Batch(noise, np.ones_like(noise))
        return batch

    made.rows = spoken_rows
    return made


def main(folder: pathlib.Path, on_spike: str) -> None:
    train(trainer(on_spike), folder, stop=STEPS, pace=PACE)
    print("done", flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2])

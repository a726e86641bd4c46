"""A toy of the switch in seconds, for sweeps and notebooks: a linear map, float32 to MXFP4.

    python launch.py --experiment=toy_switch --workdir=runs/toy --sweep "seed=0:3"

Each run trains a control and a QAT arm (`v4jax/analysis/toy_switch.py`) and writes their losses to
metrics.jsonl, and to result.json what is left of them at the end: control, ptq, qat.
"""

import json

from absl import flags

from v4jax.training import command

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
QUICK = flags.DEFINE_bool("quick", False, "Fewer steps: a smoke test.")
STEPS = flags.DEFINE_integer("steps", 600, "Updates.", 2)
QAT_START = flags.DEFINE_float("qat_start", 0.5, "The switch: fraction of the steps.", 0, 0.99)
LEARNING_RATE = flags.DEFINE_float("learning_rate", 0.03, "Of Adam, up to the switch.", 0)
LOUDNESS = flags.DEFINE_float("loudness", 2.0, "Of the inputs' few loud directions.", 0)
SEED = flags.DEFINE_integer("seed", 0, "Of target and inputs.", 0)


def main():
    from v4jax.analysis.toy_switch import Toy, train
    from v4jax.numerics import MXFP4
    from v4jax.training.files import as_path, write_whole
    from v4jax.training.metrics import MetricsWriter

    switch = int(QAT_START.value * STEPS.value)
    toy = Toy(STEPS.value, switch, LEARNING_RATE.value, LOUDNESS.value, SEED.value)
    control, qat = train(toy, None), train(toy, MXFP4)
    workdir = as_path(WORKDIR.value)
    for name, outcome in (("control", control), ("qat", qat)):
        with MetricsWriter(workdir / name, 0) as writer:
            for step in range(0, STEPS.value, 10):
                writer.write(step + 1, {"loss": outcome.losses[step]})
    numbers = {"qat": qat.rounded_loss, "ptq": control.rounded_loss, "control": control.loss}
    write_whole(workdir / "result.json", json.dumps(numbers).encode())


if __name__ == "__main__":
    command.run(main, quick={"steps": 20})

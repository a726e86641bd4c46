"""Muon (8 + 2), Muon (5 rows) and AdamW at matched tokens, each at its own best learning rate.

    python launch.py --experiment=optimizer --workdir=runs/optimizer

Every optimizer is run at all learning rates, on the same data in the same order, and judged by the
one whose mean held-out loss over the seeds is lowest. What is no matrix, AdamW moves in all three.
"""

import dataclasses

from absl import flags

from v4jax.training import command, recipe

recipe.define_study(preset="pico", vocab_size=1024, steps=200, batch_size=4, eval_windows=192)
RATES = flags.DEFINE_list(
    "rates", "1.25e-3,2.5e-3,5e-3,1e-2,2e-2", "[run] Learning rates of the sweep."
)
SMALL = recipe.TINY | {"seeds": 1, "rates": ["2.5e-3"]}
SWEEP = "runs()"
GROWING = ("seeds", "rates")


def runs():
    recipe.shrink(SMALL)
    optimizers = [("muon", "hybrid"), ("muon", "five"), ("adamw", "hybrid")]
    settings = [
        {"matrices": matrices, "newton_schulz": rows, "learning_rate": rate}
        for matrices, rows in (optimizers[1:] if flags.FLAGS.quick else optimizers)
        for rate in RATES.value
    ]
    return recipe.each_seed(*settings)


def main():
    from v4jax.analysis import study_run
    from v4jax.training import run

    workdir, setup = recipe.start(), recipe.prepare()
    trainer = setup.trainer(setup.configure(flags.FLAGS.seed))
    folder = workdir / "train"
    state = run.train(trainer, folder, stop=flags.FLAGS.steps, pace=recipe.pace())
    numbers = study_run.speed([folder])
    rows = {"hybrid": "muon_8_2", "five": "muon_5"}[flags.FLAGS.newton_schulz]
    name = "adamw" if flags.FLAGS.matrices == "adamw" else rows
    label = f"{name} {flags.FLAGS.learning_rate:g}"
    arms = {label: study_run.Arm(state, numbers=numbers)}
    study_run.finish(workdir, setup, trainer, arms, preset=flags.FLAGS.preset)


def report(workdir):
    from v4jax.analysis import study

    losses = study.read(workdir)
    rates = {arm: float(arm.split()[1]) for arm in losses.arms}
    order = sorted(rates, key=lambda arm: (arm.split()[0], rates[arm]))
    losses = dataclasses.replace(losses, numbers={arm: losses.numbers[arm] for arm in order})
    best: dict[str, str] = {}
    for arm in sorted(losses.arms, key=losses.mean):
        best.setdefault(arm.split()[0], arm)
    hybrid, five, adamw = (best.get(name, name) for name in ("muon_8_2", "muon_5", "adamw"))
    base = hybrid if hybrid in losses.arms else five
    lowest, highest = min(rates.values()), max(rates.values())
    notes = []
    for name, arm in best.items():
        at_edge = rates[arm] in (lowest, highest) and lowest < highest
        more = " The last of the rates: one beyond may be better." if at_edge else ""
        notes.append(f"Best of {name}: {arm}, {losses.mean(arm):.4f} nats.{more}")
    claims = [
        study.Claim("Muon with 8 + 2 rows beats Muon with 5", hybrid, five),
        study.Claim("Muon with 8 + 2 rows beats AdamW", hybrid, adamw),
        study.Claim("Muon with 5 rows beats AdamW", five, adamw),
    ]
    pairs = {
        f"Best of each minus {base}": [(arm, base) for arm in best.values() if arm != base],
        f"All minus {base}": [(arm, base) for arm in order if arm != base],
    }
    title = "Optimizers at matched tokens"
    study.write_report(workdir, study.make_report(losses, title, pairs, claims, notes))


if __name__ == "__main__":
    command.run(main, quick=SMALL)

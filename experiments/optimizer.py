"""Muon (8 + 2), Muon (5 rows) and AdamW at matched tokens, each at its own best learning rate.

    python launch.py --experiment=optimizer --workdir=runs/optimizer

Every optimizer is run at all learning rates, on the same data in the same order, and judged by the
one whose mean held-out loss over the seeds is lowest. What is no matrix, AdamW moves in all three.
"""

import dataclasses

from absl import flags

from v4jax.training import command, recipe

OPTIMIZERS = {
    "muon_8_2": {"matrices": "muon", "newton_schulz": "hybrid"},
    "muon_5": {"matrices": "muon", "newton_schulz": "five"},
    "adamw": {"matrices": "adamw"},
}
flags.adopt_module_key_flags(recipe)
recipe.defaults(steps=300, batch_size=4, eval_windows=384)
SEEDS = flags.DEFINE_integer("seeds", 3, "[run] The sweep is of so many seeds.", 1)
RATES = flags.DEFINE_list("rates", "1.25e-3,2.5e-3,5e-3", "[run] Learning rates of the sweep.")
OPTIMIZER = flags.DEFINE_enum("optimizer", "muon_8_2", list(OPTIMIZERS), "[training] Of matrices.")
SMALL = recipe.SMALL | {"steps": 4, "batch_size": 2, "eval_windows": 8, "seeds": 1}
SMALL |= {"rates": ["2.5e-3"]}
SWEEP = "runs()"


def runs():
    recipe.shrink(SMALL)
    names = ["muon_8_2", "adamw"] if recipe.QUICK.value else list(OPTIMIZERS)
    return [
        {"optimizer": name, "learning_rate": rate, "seed": seed}
        for name in names
        for rate in RATES.value
        for seed in range(SEEDS.value)
    ]


def main():
    from v4jax.analysis import study_run
    from v4jax.training import run

    workdir, setup = recipe.start(), recipe.prepare()
    config = setup.configure(recipe.SEED.value)
    changed = dataclasses.replace(config.optimizer, **OPTIMIZERS[OPTIMIZER.value])
    trainer = setup.trainer(dataclasses.replace(config, optimizer=changed))
    folder = workdir / "train"
    state = run.train(trainer, folder, stop=recipe.STEPS.value, pace=recipe.pace())
    numbers = {"s/step": study_run.seconds_per_step([folder])}
    label = f"{OPTIMIZER.value} {config.optimizer.learning_rate:g}"
    arms = {label: study_run.Arm(state, numbers=numbers)}
    study_run.finish(workdir, setup, trainer, arms, preset=recipe.PRESET.value)


def report(workdir):
    from v4jax.analysis import study

    losses = study.read(workdir)
    best: dict[str, str] = {}
    for arm in sorted(losses.arms, key=losses.mean):
        best.setdefault(arm.split()[0], arm)
    base = best.get("muon_8_2", "muon_8_2")
    notes = [f"Best of {name}: {arm}, {losses.mean(arm):.4f} nats." for name, arm in best.items()]
    names = [("muon_5", "5 rows"), ("adamw", "AdamW")]
    claims = [
        study.Claim(f"Muon with 8 + 2 rows beats {text}", base, best.get(name, name))
        for name, text in names
    ]
    if "muon_5" in best:
        claims.append(study.Claim("Muon with 5 rows beats AdamW", best["muon_5"], best["adamw"]))
    pairs = {
        "Best of each minus Muon 8 + 2": [(arm, base) for arm in best.values() if arm != base],
        "All minus the best of Muon 8 + 2": [(arm, base) for arm in losses.arms if arm != base],
    }
    title = "Optimizers at matched tokens"
    study.write_report(workdir, study.make_report(losses, title, pairs, claims, notes))


if __name__ == "__main__":
    command.run(main, quick=SMALL)

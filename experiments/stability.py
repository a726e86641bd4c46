"""A run made to spike, and what clamp, anticipatory routing, rollback and skipping do about it.

From --shock_at on, some steps train on tokens at random. Arms differ by what they do about it;
"undisturbed" has no such steps. Every loss is logged, those too that a return took back.

    python launch.py --experiment=stability --workdir=runs/stability
"""

import dataclasses

from absl import flags

from v4jax.training import command, recipe

recipe.define_study(
    steps=500, batch_size=4, sequence_length=128, eval_windows=768, log_every=1, save_every=20,
    learning_rate=5e-3, decay_start=0.8, delay_steps=8, active_steps=100,
)  # fmt: skip
SHOCK_AT = flags.DEFINE_integer("shock_at", 300, "[run] Updates before the disturbed ones.", 1)
SHOCK_STEPS = flags.DEFINE_integer("shock_steps", 6, "[run] So many are disturbed.", 1)
ARMS = ("undisturbed", "plain", "no clamp", "skip", "rollback", "anticipate")
CHOSEN = flags.DEFINE_list("arms", list(ARMS), f"[run] Of {', '.join(ARMS)}.")
SMALL = recipe.TINY | {"seeds": 1, "arms": ["undisturbed", "plain", "anticipate"], "steps": 12}
SMALL |= {"shock_at": 6, "shock_steps": 1, "delay_steps": 1, "active_steps": 3, "save_every": 4}
SWEEP = "runs()"
GROWING = ("seeds",)


def runs():
    recipe.shrink(SMALL)
    return recipe.each_seed()


def configured(config, arm: str):
    """The configuration of an arm."""
    stability, model = config.stability, config.model
    if flags.FLAGS.quick:  # too few steps to tell a spike from a beginning
        first = SHOCK_AT.value if arm == "anticipate" else None
        stability = dataclasses.replace(stability, anticipate_from=first)
    elif arm in ("rollback", "anticipate"):
        stability = dataclasses.replace(stability, on_spike=arm)
    if arm == "skip":
        stability = dataclasses.replace(stability, skip_sigma=6.0)
    if arm == "no clamp":
        model = dataclasses.replace(model, swiglu_limit=None)
    return dataclasses.replace(config, model=model, stability=stability)


def main():
    from v4jax.analysis import disturbance, study_run
    from v4jax.training.run import train

    if SHOCK_AT.value + SHOCK_STEPS.value >= flags.FLAGS.steps:
        raise ValueError(f"--shock_at={SHOCK_AT.value}: allowed: so that it ends before --steps")
    command.check_among("arms", ARMS)
    workdir, setup = recipe.start(), recipe.prepare()
    config, arms = setup.configure(flags.FLAGS.seed), {}
    for name in CHOSEN.value:
        trainer = setup.trainer(configured(config, name))
        if name != "undisturbed":
            first, count = (n * config.batch_size for n in (SHOCK_AT.value, SHOCK_STEPS.value))
            vocabulary = config.model.vocab_size
            trainer.rows = disturbance.disturbed(trainer.rows, first, count, vocabulary)
        folder = workdir / name.replace(" ", "_")
        state = train(trainer, folder, stop=flags.FLAGS.steps, pace=recipe.pace())
        numbers = disturbance.numbers(folder, SHOCK_AT.value, SHOCK_STEPS.value)
        arms[name] = study_run.Arm(state, numbers=numbers)
    study_run.finish(workdir, setup, trainer, arms, shock_at=SHOCK_AT.value)


def report(workdir):
    from v4jax.analysis import disturbance, study

    losses = study.read(workdir)
    first = losses.runs[0]
    at, folder = first["shock_at"], workdir / first["run"]
    shown = {
        arm: disturbance.trace(folder / arm.replace(" ", "_"), at - 40, at + 80)
        for arm in losses.arms
    }
    lines = study.Lines(f"step of {first['run']}", "nats a token", shown)
    others = [arm for arm in losses.arms if arm != "undisturbed"]
    sections = {
        "Held-out loss, minus undisturbed": [(arm, "undisturbed") for arm in others],
        "Held-out loss, minus plain": [(arm, "plain") for arm in others if arm != "plain"],
    }
    claims = [study.Claim("The disturbance costs", "plain", "undisturbed", higher=True)]
    claims += [
        study.Claim(f"{text} ends lower than doing nothing", arm, "plain")
        for text, arm in (
            ("Leaving out outliers", "skip"),
            ("Going back and skipping the data", "rollback"),
            ("Going back and anticipatory routing", "anticipate"),
        )
    ]
    claims.append(study.Claim("The clamp helps", "plain", "no clamp"))
    title = "A spike, and what is done about it"
    notes = [
        "height, after: nats over the level before, of the largest loss and of the largest after "
        "the disturbed steps. lost_steps were trained again, left_out not applied. active: share "
        "of the steps with older routes; disagreement: of their choices. clamped: of SwiGLU."
    ]
    page = study.make_report(losses, title, sections, claims, notes, lines=lines)
    study.write_report(workdir, page)


if __name__ == "__main__":
    command.run(main, quick=SMALL)

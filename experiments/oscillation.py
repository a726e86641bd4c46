"""Remedies for weights that swing between two FP4 values, against plain straight-through QAT.

All arms of a seed go on from one BF16 pre-training, on the same data; "distilled" learns from that
parent's logits too. What an arm deploys is measured: weights rounded as its own rule says.

    python launch.py --experiment=oscillation --workdir=runs/oscillation
"""

import dataclasses

from absl import flags

from v4jax.training import command, recipe

REMEDIES: dict[str, dict] = {
    "dampened": {"dampening": 1e-2},
    "frozen": {"freeze_above": 0.02},
    "reset": {"reset_every": 50},
    "rounded by a mean": {"ema_decay": 0.99},
    "rounded at random": {"rounding": "stochastic"},
}
ARMS = ("plain", *REMEDIES, "distilled")
recipe.define_study(
    preset="pico", vocab_size=1024, steps=400, batch_size=4, eval_windows=256,
    track_oscillation=True,
)  # fmt: skip
CHOSEN = flags.DEFINE_list("arms", list(ARMS), f"[run] Of {', '.join(ARMS)}.")
SCOPE = flags.DEFINE_enum("scope", "all_linears", ("paper", "all_linears"), "[fp4] What to round.")
QAT_START = flags.DEFINE_float("qat_start", 0.5, "[fp4] The switch: fraction, or a step.", 0)
SMALL = recipe.TINY | {"seeds": 1, "arms": ["plain", "frozen"], "scope": "paper"}
SWEEP = "runs()"
GROWING = ("seeds",)


def runs():
    recipe.shrink(SMALL)
    return recipe.each_seed()


def configured(config, arm: str):
    """The configuration of an arm."""
    remedies = dataclasses.replace(config.remedies, **REMEDIES.get(arm, {}))
    distill = 0.5 if arm == "distilled" else config.objective.distill
    objective = dataclasses.replace(config.objective, distill=distill)
    return dataclasses.replace(config, remedies=remedies, objective=objective)


def main():
    from v4jax.analysis import study_run
    from v4jax.quantization import SCOPES, resolve
    from v4jax.training import remedies
    from v4jax.training.run import Branch, train

    command.check_among("arms", ARMS)
    workdir, setup = recipe.start(), recipe.prepare()
    config = setup.configure(flags.FLAGS.seed)
    trainer, formats = setup.trainer(config), SCOPES[SCOPE.value]
    at, end = recipe.switch_step(), flags.FLAGS.steps
    pace = dataclasses.replace(recipe.pace(), keep=(at,))
    train(trainer, workdir / "pretrain", stop=at, pace=pace)
    branch = Branch(workdir / "pretrain", at)
    control = train(trainer, workdir / "control", stop=end, branch=branch, pace=pace)
    arms = {"control": study_run.Arm(control), "ptq": study_run.Arm(control, formats)}
    for name in CHOSEN.value:
        of, folder = configured(config, name), workdir / name.replace(" ", "_")
        how = {"stop": end, "branch": branch, "quantization": formats, "pace": pace}
        state = train(setup.trainer(of), folder, **how)
        rounded, memory = resolve(formats, state.params), state.memory.get("remedies", {})
        params = remedies.deployed(of.remedies, state.params, rounded, memory)
        numbers = study_run.last_metrics(folder, "fp4/", ("oscillating_often", "flipped"))
        arms[name] = study_run.Arm(state._replace(params=params), formats, numbers=numbers)
    study_run.finish(workdir, setup, trainer, arms)


def report(workdir):
    from v4jax.analysis.study import Claim, make_report, read, write_report

    losses = read(workdir)
    others = [arm for arm in losses.arms if arm not in ("control", "ptq", "plain")]
    sections = {
        "Minus control": [(arm, "control") for arm in ["ptq", "plain", *others]],
        "Minus PTQ": [(arm, "ptq") for arm in ["plain", *others]],
        "Minus plain straight-through": [(arm, "plain") for arm in others],
    }
    claims = [Claim("Straight-through QAT beats PTQ", "plain", "ptq")]
    claims += [Claim(f"{arm.capitalize()} beats straight-through", arm, "plain") for arm in others]
    title = "Remedies for oscillating weights"
    write_report(workdir, make_report(losses, title, sections, claims))


if __name__ == "__main__":
    command.run(main, quick=SMALL)

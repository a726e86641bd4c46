"""When to switch to QAT and for how long; the cooldown with it or before it; BF16 at the end.

    python launch.py --experiment=qat_schedule --workdir=runs/qat_schedule

All arms of a seed are of the same data in the same order, and share what they can:

    control         BF16 throughout; the learning rate falls from --decay_start (0.72) to the end
    qat 28%         the last 28% of the steps in FP4, off the control; other shares too
    ptq             the control, rounded at its end
    early control   BF16; the cooldown is as long, but over before the last 28%
    early qat       from there to the end in FP4, at the low learning rate: cooldown before QAT
    fp4 first       FP4 from step 0, the cooldown in BF16 (measured unrounded)

qat at the share of the cooldown is cooldown and QAT at once. Beside each share stands the one that
Compute-Optimal QAT (arXiv 2509.22935) fitted for 86M to 2.2B parameters, far from these sizes.
"""

import dataclasses
import math

from absl import flags

from v4jax.training import command, recipe
from v4jax.training.command import fraction_or_steps

BITS = 4.25  # of MXFP4, scales included
flags.adopt_module_key_flags(recipe)
recipe.defaults(steps=600, batch_size=4, eval_windows=384, decay_start=0.72)
SEEDS = flags.DEFINE_integer("seeds", 3, "[run] The sweep is of so many seeds.", 1)
SHARES = flags.DEFINE_list("shares", "5,10,16,28,40", "[fp4] Last percent of the steps in QAT.")
SCOPE = flags.DEFINE_enum("scope", "all_linears", ("paper", "all_linears"), "[fp4] What to round.")
SMALL = recipe.SMALL | {"steps": 8, "batch_size": 2, "eval_windows": 8, "seeds": 1}
SMALL |= {"shares": ["28"]}
SWEEP = "runs()"


def runs():
    recipe.shrink(SMALL)
    return [{"seed": seed} for seed in range(SEEDS.value)]


def main():
    from v4jax.analysis import study_run
    from v4jax.quantization import SCOPES
    from v4jax.training import run
    from v4jax.training.schedule import resolve_steps

    workdir, setup = recipe.start(), recipe.prepare()
    config, end = setup.configure(recipe.SEED.value), recipe.STEPS.value
    cooldown = resolve_steps("--decay_start", fraction_or_steps("decay_start"), end)
    starts = {share: round(end * (1 - float(share) / 100)) for share in SHARES.value}
    begins = 2 * cooldown - end  # of the early cooldown, as long as the other
    trainer, fp4 = setup.trainer(config), SCOPES[SCOPE.value]
    moved = dataclasses.replace(config.schedule, decay_start=begins, decay_end=cooldown)
    early = setup.trainer(dataclasses.replace(config, schedule=moved))
    pace = dataclasses.replace(recipe.pace(), keep=(begins, cooldown, *starts.values()))

    def train(folder, stop=end, start=None, fmt=None, by=trainer):
        more = {} if fmt is None else {"quantization": fmt}
        branch = start and run.Branch(workdir / start[0], start[1])
        return run.train(by, workdir / folder, stop=stop, branch=branch, pace=pace, **more)

    control = train("control")
    arms = {"control": study_run.Arm(control), "ptq": study_run.Arm(control, fp4)}
    for share, start in starts.items():
        state = train(f"qat_{share}", start=("control", start), fmt=fp4)
        arms[f"qat {share}%"] = study_run.Arm(state, fp4)
    state = train("early_control", start=("control", begins), by=early)
    arms |= {"early control": study_run.Arm(state), "early ptq": study_run.Arm(state, fp4)}
    state = train("early_qat", start=("early_control", cooldown), fmt=fp4, by=early)
    arms["early qat"] = study_run.Arm(state, fp4)
    train("fp4_first", stop=cooldown, fmt=fp4)
    arms["fp4 first"] = study_run.Arm(train("bf16_last", start=("fp4_first", cooldown)))
    fused = next((f"qat {share}%" for share, at in starts.items() if at == cooldown), "")
    study_run.finish(workdir, setup, trainer, arms, preset=recipe.PRESET.value, fused=fused)


def report(workdir):
    from v4jax.analysis import study

    losses = study.read(workdir)
    arms = [arm for arm in losses.arms if arm.startswith("qat")]
    fused, dose = losses.runs[0]["fused"], losses.runs[0]["tokens_per_parameter"] * 8 / BITS
    prior = math.exp(-6.7297 / math.log(dose)) if dose > 1 else 0.0
    best = min(arms, key=losses.mean)
    notes = [
        f"Best measured share: {best.removeprefix('qat ')} of the steps. The prior's: exp(-6.7297 "
        f"/ ln S) = {prior:.2%}, S = {dose:.3g} tokens a byte of parameters of {BITS} bits."
    ]
    claims = [study.Claim(f"{arm.upper()} beats PTQ", arm, "ptq") for arm in arms]
    claims += [
        study.Claim("Cooldown and QAT at once beat QAT after the cooldown", fused, "early qat"),
        study.Claim("QAT after the cooldown beats PTQ", "early qat", "early ptq"),
        study.Claim(
            "FP4 first and BF16 at the end costs against BF16", "fp4 first", "control", True
        ),
        study.Claim("BF16 at the end beats QAT at the end", "fp4 first", fused),
    ]
    others = ["ptq", "early control", "early ptq", "early qat", "fp4 first"]
    sections = {
        "Minus control": [(arm, "control") for arm in (*arms, *others)],
        "Minus PTQ": [(arm, "ptq") for arm in arms],
    }
    points = [(float(arm.split()[-1].rstrip("%")), arm, "control") for arm in arms]
    curves = study.Curves("percent of the steps in QAT, to the end", {"QAT - control": points})
    title = "When to switch, and the cooldown"
    study.write_report(workdir, study.make_report(losses, title, sections, claims, notes, curves))


if __name__ == "__main__":
    command.run(main, quick=SMALL)

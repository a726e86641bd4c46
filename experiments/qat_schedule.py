"""When to switch to QAT and for how long; the cooldown with it or before it; BF16 at the end.

    python launch.py --experiment=qat_schedule --workdir=runs/qat_schedule

All arms of a seed see the same data in the same order, and go on from one another's checkpoints:

    control         BF16; the cooldown is from --decay_start (0.72) to the end. ptq: rounded there
    qat 28%         the last 28% of the steps in FP4, and so for other shares; one of them has
                    cooldown and QAT at once
    early control   BF16; as long a cooldown, over where the other begins. early ptq: rounded
    early qat       from there on in FP4 at the low learning rate: the cooldown was before
    fp4 first       FP4 from the first step, then the cooldown in BF16; measured unrounded

Beside the best share stands what Compute-Optimal QAT (arXiv 2509.22935) fitted to larger models.
"""

import dataclasses
import math

from absl import flags

from v4jax.training import command, recipe
from v4jax.training.command import fraction_or_steps

BITS = 4.25  # of a weight in MXFP4
recipe.define_study(
    preset="pico", vocab_size=1024, steps=400, batch_size=4, eval_windows=256, decay_start=0.72
)
SHARES = flags.DEFINE_list("shares", "5,10,16,28,40", "[fp4] Last percent of the steps in QAT.")
SCOPE = flags.DEFINE_enum("scope", "all_linears", ("paper", "all_linears"), "[fp4] What to round.")
SMALL = recipe.TINY | {"seeds": 1, "shares": ["28"], "scope": "paper"}
SWEEP = "runs()"
GROWING = ("seeds",)


def runs():
    recipe.shrink(SMALL)
    return recipe.each_seed()


def main():
    from v4jax.analysis.study_run import Arm, finish
    from v4jax.quantization import NO_QUANTIZATION, SCOPES
    from v4jax.training import run
    from v4jax.training.schedule import resolve_steps

    workdir, setup = recipe.start(), recipe.prepare()
    config, end = setup.configure(flags.FLAGS.seed), flags.FLAGS.steps
    cool = resolve_steps("--decay_start", fraction_or_steps("decay_start"), end)
    switches = {f"qat {s}%": round(end * (1 - float(s) / 100)) for s in SHARES.value}
    begins = 2 * cool - end  # of the early cooldown
    moved = dataclasses.replace(config.schedule, decay_start=begins, decay_end=cool)
    late = setup.trainer(config)
    early = setup.trainer(dataclasses.replace(config, schedule=moved))
    pace = dataclasses.replace(recipe.pace(), keep=(begins, cool, *switches.values()))
    bf16, fp4 = NO_QUANTIZATION, SCOPES[SCOPE.value]

    def train(name, formats, start=None, stop=end, by=late):
        branch = run.Branch(workdir / start[0], start[1]) if start else None
        to = {"stop": stop, "quantization": formats, "branch": branch, "pace": pace}
        return Arm(run.train(by, workdir / name, **to), formats)

    arms = {"control": train("control", bf16)}
    arms["ptq"] = Arm(arms["control"].state, fp4)
    for name, at in switches.items():
        arms[name] = train(name.replace(" ", "_").rstrip("%"), fp4, ("control", at))
    arms["early control"] = train("early_control", bf16, ("control", begins), by=early)
    arms["early ptq"] = Arm(arms["early control"].state, fp4)
    arms["early qat"] = train("early_qat", fp4, ("early_control", cool), by=early)
    train("fp4_first", fp4, stop=cool)
    arms["fp4 first"] = train("bf16_last", bf16, ("fp4_first", cool))
    fused = next((name for name, at in switches.items() if at == cool), "none")
    finish(workdir, setup, late, arms, preset=flags.FLAGS.preset, fused=fused)


def report(workdir):
    from v4jax.analysis.study import Claim, Curves, make_report, read, write_report

    losses = read(workdir)
    arms = [arm for arm in losses.arms if arm.startswith("qat")]
    what = losses.runs[0]
    fused, dose = what["fused"], what["tokens_per_parameter"] * 8 / BITS
    prior = math.exp(-6.7297 / math.log(dose)) if dose > 1 else 0.0
    notes = [
        f"Lowest loss: {min(arms, key=losses.mean)}. The published prior for the share in QAT: "
        f"exp(-6.7297 / ln S) = {prior:.2%}, S = {dose:.3g} tokens a byte of {BITS}-bit weights. "
        f"It was fitted to 86M to 2.2B parameters; here are {what['parameters'] / 1e6:.2g}M."
    ]
    claims = [Claim(f"QAT for the last {arm.split()[1]} beats PTQ", arm, "ptq") for arm in arms]
    claims += [
        Claim("Cooldown and QAT at once beat QAT after the cooldown", fused, "early qat"),
        Claim("QAT after the cooldown beats PTQ", "early qat", "early ptq"),
        Claim("FP4 first, then BF16, costs against BF16", "fp4 first", "control", higher=True),
        Claim("FP4 first, then BF16, beats BF16 first, then FP4", "fp4 first", fused),
    ]
    more = ["ptq", "early control", "early ptq", "early qat", "fp4 first"]
    sections = {"Minus control": [(arm, "control") for arm in arms + more]}
    sections["Minus PTQ"] = [(arm, "ptq") for arm in arms]
    points = [(float(arm.split()[1].rstrip("%")), arm, "control") for arm in arms]
    curves = Curves("percent of the steps in QAT, to the end", {"QAT - control": points})
    title = "When to switch to QAT, and the cooldown"
    write_report(workdir, make_report(losses, title, sections, claims, notes, curves))


if __name__ == "__main__":
    command.run(main, quick=SMALL)

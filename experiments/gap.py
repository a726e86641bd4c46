"""Where the gap opens: PTQ and QAT against control over tokens a parameter, size and scope.

    python launch.py --experiment=gap --workdir=runs/gap

A cell is PRESET:STEPS; its tokens a parameter are of all parameters, embedding and MTP included.
"""

import re

from absl import flags

from v4jax.training import command, recipe

recipe.define_study(vocab_size=1024, batch_size=4, eval_windows=256)
CELLS = flags.DEFINE_list(
    "cells", "pico:150,pico:400,pico:1000,nano:500", "[run] PRESET:STEPS of the sweep."
)
SCOPES = flags.DEFINE_list("scopes", "paper,all_linears", "[fp4] What is rounded, an arm each.")
QAT_START = flags.DEFINE_float("qat_start", 0.75, "[fp4] The switch: fraction, or a step.", 0)
SMALL = recipe.TINY | {"seeds": 1, "cells": ["tiny:8"], "scopes": ["paper"]}
SWEEP = "runs()"
GROWING = ("seeds",)
AFTER_SWITCH = ("qat_start", "scopes", "eval_windows", "log_every")


def runs():
    recipe.shrink(SMALL)
    for cell in CELLS.value:
        if not re.fullmatch(r"\w+:\d+", cell):
            raise ValueError(f"--cells: {cell!r}, allowed: PRESET:STEPS, such as pico:150")
    cells = [dict(zip(("preset", "steps"), cell.split(":"), strict=True)) for cell in CELLS.value]
    return recipe.each_seed(*cells)


def main():
    from v4jax.analysis import study_run
    from v4jax.training import switch

    scopes = recipe.scopes()
    workdir, setup = recipe.start(), recipe.prepare()
    trainer = setup.trainer(setup.configure(flags.FLAGS.seed))
    at, pace = recipe.switch_step(), recipe.pace()
    arms = switch.run_arms(trainer, workdir, switch_step=at, pace=pace, scopes=scopes)
    study_run.finish(
        workdir, setup, trainer, study_run.switched(arms, scopes), preset=flags.FLAGS.preset
    )


def report(workdir):
    from v4jax.analysis import study

    label = lambda what: f"{what['preset']}:{what['steps']}"  # noqa: E731
    losses = study.read(workdir, label)
    cells = {label(what): what for what in losses.runs}
    scopes = list(dict.fromkeys(arm.split()[-1] for arm in losses.arms if " qat " in arm))
    sections, claims = {}, []
    series: dict[str, list[tuple[float, str, str]]] = {}
    for scope in scopes:
        pairs = {kind: [f"{cell} {kind} {scope}" for cell in cells] for kind in ("ptq", "qat")}
        control = [f"{cell} control" for cell in cells]
        for kind, arms in pairs.items():
            sections[f"{kind.upper()} minus control, {scope}"] = [*zip(arms, control, strict=True)]
        won = list(zip(pairs["qat"], pairs["ptq"], strict=True))
        sections[f"QAT minus PTQ, {scope}"] = won
        for cell, ptq, base, (qat, _) in zip(cells, pairs["ptq"], control, won, strict=True):
            where = f"{cell}, {scope}"
            claims.append(study.Claim(f"Rounding costs at {where}", ptq, base, higher=True))
            claims.append(study.Claim(f"QAT earns its keep at {where}", qat, ptq))
            tokens, size = cells[cell]["tokens_per_parameter"], cells[cell]["preset"]
            for kind, arm in (("PTQ", ptq), ("QAT", qat)):
                series.setdefault(f"{kind} {scope}, {size}", []).append((tokens, arm, base))
    notes = [
        f"{cell}: {what['parameters'] / 1e6:.2f}M parameters, {what['tokens_per_parameter']:.2f} "
        "tokens a parameter."
        for cell, what in cells.items()
    ]
    curves = study.Curves("tokens a parameter", series)
    title = "Where the gap of FP4 opens"
    study.write_report(workdir, study.make_report(losses, title, sections, claims, notes, curves))


if __name__ == "__main__":
    command.run(main, quick=SMALL)

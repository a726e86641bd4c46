"""What to round, to which format: scopes, scales, block sizes and Hadamard, before and after QAT.

Every arm SCOPE.FORMAT rounds the control's weights after training (PTQ); those of --trained are
trained so from the switch on as well (QAT). All arms of a seed go on from one pre-training.

    python launch.py --experiment=quantize_what --workdir=runs/quantize_what

Formats: mxfp4 (scales by ceil), mxfp4_floor, mxfp4_even; -16, -64: blocks of the weights; -plain:
no Hadamard before the indexer's query and key; nvfp4, fp8_1x128-32 (MXFP8). The indexer's query and
key have blocks of 32, and MXFP4 beside NVFP4, whose scale of a whole matrix sees later tokens.
"""

import itertools

from absl import flags

from v4jax.training import command, recipe

FORMATS = ("mxfp4", "mxfp4_floor", "mxfp4_even", "nvfp4", "fp8_1x128-32")
SCOPES = ("experts", "indexer", "both", "everything")
MORE = ["everything.mxfp4-16", "everything.mxfp4-64", "indexer.mxfp4-plain", "both.mxfp4-plain"]
GRID = [".".join(x) for x in itertools.product(SCOPES, FORMATS) if x != ("indexer", "nvfp4")]
TRAIN = ["experts.mxfp4", "indexer.mxfp4", "both.mxfp4", "indexer.mxfp4-plain", *MORE[:2]]
TRAIN += [name for name in GRID if name.startswith("everything")]
recipe.define_study(steps=320, batch_size=4, sequence_length=128, eval_windows=384)
QAT_START = flags.DEFINE_float("qat_start", 0.75, "[fp4] The switch: fraction, or a step.", 0)
ROUNDED = flags.DEFINE_list("rounded", GRID + MORE, "[fp4] Arms rounded after training.")
TRAINED = flags.DEFINE_list("trained", TRAIN, "[fp4] Those of them that are trained in it too.")
SMALL = recipe.TINY | {"seeds": 1, "rounded": ["both.mxfp4"], "trained": ["both.mxfp4"]}
SWEEP = "runs()"
GROWING = ("seeds",)


def runs():
    recipe.shrink(SMALL)
    return recipe.each_seed()


def quantization(arm: str):
    """What the arm SCOPE.FORMAT rounds."""
    from v4jax.quantization import PARTS, Quantization

    scope, _, name = arm.partition(".")
    if scope not in SCOPES:
        raise ValueError(f"--rounded: {arm!r}: unknown scope, allowed: {', '.join(SCOPES)}")
    base, plain = name.partition("-")[0], "-plain" * name.endswith("-plain")
    index = {"nvfp4": "mxfp4", "fp8_1x128": "fp8_1x128-32"}.get(base, base) + plain
    experts, indexer = PARTS["routed experts"][0], PARTS["index query and key"][0]
    everything = [path for path, _ in PARTS.values()]
    paths = {"experts": [experts], "indexer": [indexer], "both": [experts, indexer]}
    chosen = paths.get(scope, everything)
    return Quantization(tuple((p, index if p == indexer else name) for p in chosen))


def main():
    from v4jax.analysis import study_run
    from v4jax.training import switch

    rounded = {name: quantization(name) for name in ROUNDED.value}
    trained = {name: quantization(name) for name in TRAINED.value}
    workdir, setup = recipe.start(), recipe.prepare()
    trainer = setup.trainer(setup.configure(flags.FLAGS.seed))
    at, pace = recipe.switch_step(), recipe.pace()
    arms = switch.run_arms(trainer, workdir, switch_step=at, pace=pace, scopes=trained)
    study_run.finish(
        workdir, setup, trainer, study_run.switched(arms, rounded), preset=flags.FLAGS.preset
    )


def report(workdir):
    from v4jax.analysis import study

    losses = study.read(workdir)
    ptq = [(arm, "control") for arm in losses.arms if arm.startswith("ptq")]
    qat = [(arm, "control") for arm in losses.arms if arm.startswith("qat")]
    won = [(arm, f"ptq {arm.removeprefix('qat ')}") for arm, _ in qat]
    base, claims = "everything.mxfp4", []
    for text, a, b in (
        ("NVFP4 loses less than MXFP4", "everything.nvfp4", base),
        ("Scales by ceil lose less than by floor", base, "everything.mxfp4_floor"),
        ("EVEN scales lose less than ceil", "everything.mxfp4_even", base),
        ("Blocks of 16 lose less than of 32", "everything.mxfp4-16", base),
        ("Hadamard helps the indexer", "indexer.mxfp4", "indexer.mxfp4-plain"),
    ):
        claims += [study.Claim(f"{text} ({k})", f"{k} {a}", f"{k} {b}") for k in ("ptq", "qat")]
    claims += [study.Claim(f"QAT beats PTQ on {a.removeprefix('qat ')}", a, b) for a, b in won]
    sections = {"PTQ minus control": ptq, "QAT minus control": qat, "QAT minus PTQ": won}
    title = "Quantize what: scopes, formats, blocks, Hadamard"
    study.write_report(workdir, study.make_report(losses, title, sections, claims))


if __name__ == "__main__":
    command.run(main, quick=SMALL)

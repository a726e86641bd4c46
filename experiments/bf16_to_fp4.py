"""Pre-train in BF16, switch to FP4 quantization-aware training, and measure what it cost.

A scaled-down DeepSeek-V4 is trained on real text; at --qat_start it saves a checkpoint, and arms go
on from it on the same data in the same order: a control in BF16, and QAT in FP4, once over the
report's scope (routed experts, the indexer's query and key) and once over all linear maps. The
control's final weights, rounded without training, are the PTQ arm. All are compared in pairs on the
same held-out documents.

    python launch.py --experiment=bf16_to_fp4 --workdir=runs/demo
    python launch.py --experiment=bf16_to_fp4 --workdir=runs/quick --quick     a minute, no result

DeepSeek's report puts FP4 QAT in post-training (5.2.1). Switching late in pre-training is this
project's own question.
"""

import pathlib
import shlex
import sys
import time

from absl import flags

from v4jax.training import command, recipe

NAME = "bf16_to_fp4"
recipe.define()
SEEDS = flags.DEFINE_integer(
    "seeds", 1, "[run] Repeat with so many seeds, from --seed on: mean, spread.", 1
)
FROM = flags.DEFINE_string(
    "from_checkpoint", None, "[run] <run folder>[@step]: branch off it, no pre-training."
)
QAT_START = flags.DEFINE_float(
    "qat_start", 0.7, "[fp4] The switch: fraction of the steps, or a step.", 0
)
SCOPES = flags.DEFINE_list("scopes", "paper,all_linears", "[fp4] What QAT rounds, an arm each.")
INDEX_SCORES = flags.DEFINE_enum(
    "index_scores", "float32", ("float32", "bfloat16"), "[fp4] Of the indexer, in the QAT arms."
)

# Flags that leave the pre-training as it is: runs of a sweep that differ in these alone share one.
AFTER_SWITCH = (
    "qat_start", "scopes", "index_scores", "eval_windows", "log_every", "profile_steps",
)  # fmt: skip


def describe() -> dict[str, int]:
    """What a sweep's --dry_run says of a run."""
    from v4jax.analysis import provenance

    recipe.shrink(recipe.SMALL)
    vocab_size, seed = flags.FLAGS.vocab_size, flags.FLAGS.seed
    return provenance.sizes(recipe.configure(vocab_size, "", seed))


def scopes():
    """Scope -> what its QAT arm rounds, from the flags."""
    from v4jax import quantization

    found = recipe.scopes()
    if "paper" not in SCOPES.value:
        raise ValueError("--scopes: paper must be among them, the report is built around it")
    extra = (quantization.BF16_INDEX_SCORES,) if INDEX_SCORES.value == "bfloat16" else ()
    return {name: quantization.Quantization(of.rules + extra) for name, of in found.items()}


def experiment(seed: int, workdir: pathlib.Path) -> tuple[dict, dict[str, pathlib.Path]]:
    """Trains and compares all arms of one seed; returns the report and the runs' folders."""
    from v4jax.analysis import comparison, provenance
    from v4jax.analysis.evaluation import Evaluator
    from v4jax.analysis.report import summary, write_report
    from v4jax.distributed import end_if_preempted, is_main, say
    from v4jax.training import switch
    from v4jax.training.context_models import ContextModels

    setup = recipe.prepare()
    trainer = setup.trainer(setup.configure(seed))
    say(provenance.describe(trainer, setup.dataset))
    arms = switch.run_arms(
        trainer,
        workdir,
        switch_step=recipe.switch_step(),
        scopes=scopes(),
        pace=recipe.pace(),
        from_checkpoint=FROM.value,
    )

    say("comparing the arms on the held-out documents")
    seconds = switch.alternate_steps(trainer, arms.control, arms.scopes["paper"])
    arms = arms if setup.mesh is None else arms.on_one_device()
    windows, held_out = setup.windows, setup.held_out.documents
    report = comparison.compare(
        Evaluator(trainer.program, windows, 2 * flags.FLAGS.batch_size), arms
    )
    context = ContextModels.fit([text.encode() for _, text in setup.train.documents])
    report["bits_per_byte"] |= context.bits_per_byte(windows.covered(held_out))
    end_if_preempted("before the continuations")
    report["seconds_per_step"] = seconds | {"phases": comparison.phase_seconds(arms)}
    report["events"] = comparison.events(arms)
    report["continuation"] = comparison.continuations(trainer, arms, held_out)
    end_if_preempted("before the report was written")
    report["what"] = provenance.what(trainer, arms, windows, setup.corpus) | {
        "experiment": NAME,
        "command": shlex.join(["python", "launch.py", f"--experiment={NAME}", *sys.argv[1:]]),
        "preset": flags.FLAGS.preset,
        "seconds": {"total": time.perf_counter() - setup.began},
    }
    if is_main():
        write_report(workdir, report, arms.folders)
    say(summary(report))
    return report, arms.folders


def main():
    from v4jax import distributed
    from v4jax.analysis.report import attach_seeds, summary, write_report

    if FROM.value and SEEDS.value > 1:
        raise ValueError("--from_checkpoint: has one seed, so --seeds must be 1")
    if FROM.value and not flags.FLAGS["qat_start"].using_default_value:
        raise ValueError("--qat_start: with --from_checkpoint the switch is at its step; name none")
    workdir, first = recipe.start(), flags.FLAGS.seed
    results = [experiment(first, workdir)]
    for seed in range(first + 1, first + SEEDS.value):
        results.append(experiment(seed, workdir / f"seed_{seed}"))
    if len(results) > 1 and distributed.is_main():
        reports = [report for report, _ in results]
        report = reports[0] | {"seeds": attach_seeds(reports)}
        write_report(workdir, report, results[0][1])
        print(summary(report))


if __name__ == "__main__":
    command.run(main, quick=recipe.SMALL)

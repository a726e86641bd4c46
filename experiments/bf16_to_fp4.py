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

from v4jax.training import command
from v4jax.training.command import fraction_or_steps, step_range

NAME = "bf16_to_fp4"
string, integer, number = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
WORKDIR = string("workdir", None, "[run] Folder, or gs://BUCKET/PATH.", required=True)
QUICK = flags.DEFINE_bool("quick", False, "[run] Shrink all that you do not set: a smoke test.")
SEED = integer("seed", 0, "[run] Initialisation, data order, hash tables.", 0)
SEEDS = integer("seeds", 1, "[run] Repeat with so many seeds, from --seed on: mean, spread.", 1)
FROM = string("from_checkpoint", None, "[run] <run folder>[@step]: branch off it, no pre-training.")
SAVE_EVERY = integer("save_every", 100, "[run] Steps between checkpoints.", 1)
LOG_EVERY = integer("log_every", 10, "[run] Steps between lines of metrics.jsonl.", 1)
TRACKERS = flags.DEFINE_list("trackers", "", "[run] Of wandb, mlflow: beside TensorBoard.")
PROFILE = string(
    "profile_steps", None, "[run] 10:15 traces steps 10 to 14 of each phase with them."
)
MESH = string("mesh", None, "[devices] data=2,fsdp=4: copies, and parts of the parameters.")
COORDINATOR = string("coordinator", None, "[devices] host:port of the first of several processes.")
PROCESSES = integer("num_processes", None, "[devices] Processes of the run. Slurm, TPUs: found.", 1)
PROCESS_ID = integer("process_id", None, "[devices] Which of them this is, from 0 on.", 0)
PREEMPTIBLE = flags.DEFINE_bool(
    "preemptible", False, "[devices] On SIGTERM save, and exit with 75; always so inside srun."
)
EVAL_WINDOWS = integer("eval_windows", 2048, "[run] At most so many held-out windows.", 1)

DATA = string(
    "data", None, "[data] Text, JSONL, Parquet, folder; task:recall; default: your Python's."
)
TOKENIZER = string("tokenizer", "bpe", "[data] bpe, bytes, or the path of a tokenizer.json.")
VOCAB_SIZE = integer("vocab_size", 2048, "[data] Entries of the BPE.", 257)
LENGTH = integer("sequence_length", 256, "[data] Tokens a row.", 2)
BATCH_SIZE = integer("batch_size", 8, "[data] Rows a step.", 1)

PRESET = flags.DEFINE_enum("preset", "nano", ("nano", "micro", "mini", "small"), "[model] Size.")
DTYPE = flags.DEFINE_enum(
    "compute_dtype",
    "auto",
    ("auto", "bfloat16", "float32"),
    "[model] Of matmuls and activations. auto: bfloat16, but float32 on CPUs, which are slower in "
    "bfloat16. The report says which it was.",
)

STEPS = integer("steps", 640, "[training] Updates in all.", 2)
QAT_START = number("qat_start", 0.7, "[fp4] The switch: fraction of the steps, or a step.", 0)
DECAY_START = number("decay_start", 0.7, "[training] Cosine decay: fraction, or a step.", 0)
FINAL_FRACTION = number(
    "final_fraction", 0.1, "[training] Learning rate at the end, of the peak.", 0
)
WARMUP = number("warmup", 0.06, "[training] Warm-up: fraction, or steps.", 0)
DENSE = number("dense", 0.1, "[training] Dense compressed attention first: fraction, or steps.", 0)
LEARNING_RATE = number("learning_rate", 2.5e-3, "[training] Peak, of Muon and AdamW.", 0)
INDEX_WEIGHT = number("index_weight", 1.0, "[training] Of the indexer's KL; 0 freezes it.", 0)
BALANCE_WEIGHT = number("balance_weight", 1e-4, "[training] Of the balance loss.", 0)
BIAS_SPEED = number("bias_speed", 0.01, "[training] Of the routers' selection bias, a step.", 0)
SCOPES = flags.DEFINE_list("scopes", "paper,all_linears", "[fp4] What QAT rounds, an arm each.")
INDEX_SCORES = flags.DEFINE_enum(
    "index_scores", "float32", ("float32", "bfloat16"), "[fp4] Of the indexer, in the QAT arms."
)

# Flags that leave the pre-training as it is: runs of a sweep that differ in these alone share one.
AFTER_SWITCH = (
    "qat_start", "scopes", "index_scores", "eval_windows", "log_every", "profile_steps",
)  # fmt: skip

SMALL = {
    "steps": 20,
    "batch_size": 4,
    "sequence_length": 64,
    "vocab_size": 512,
    "eval_windows": 32,
    "log_every": 1,
}


def configure(vocab_size: int, data: str, seed: int):
    """The runs' configuration, from the flags: a `RunConfig`."""
    import jax

    from v4jax import presets
    from v4jax.training.optimizer import OptimizerConfig
    from v4jax.training.schedule import ScheduleConfig
    from v4jax.training.step import Objective
    from v4jax.training.trainer import RunConfig

    model = presets.PRESETS[PRESET.value](vocab_size)
    on_cpu = jax.default_backend() == "cpu"
    return RunConfig(
        model=presets.shallow(model) if QUICK.value else model,
        schedule=ScheduleConfig(
            total_steps=STEPS.value,
            warmup_steps=fraction_or_steps("warmup"),
            decay_start=fraction_or_steps("decay_start"),
            final_fraction=FINAL_FRACTION.value,
            dense_steps=fraction_or_steps("dense"),
        ),
        optimizer=OptimizerConfig(
            learning_rate=LEARNING_RATE.value,
            train_indexer=INDEX_WEIGHT.value > 0,
            ns_dtype="float32" if on_cpu else "bfloat16",
        ),
        objective=Objective(
            balance=BALANCE_WEIGHT.value,
            index=INDEX_WEIGHT.value,
            bias_speed=BIAS_SPEED.value,
        ),
        sequence_length=LENGTH.value,
        batch_size=BATCH_SIZE.value,
        seed=seed,
        data=data,
        compute_dtype=DTYPE.value if DTYPE.value != "auto" else ("bfloat16", "float32")[on_cpu],
    )


def describe() -> dict[str, int]:
    """What a sweep's --dry_run says of a run."""
    from v4jax.analysis import provenance

    if QUICK.value:
        command.shrink(SMALL)
    return provenance.sizes(configure(VOCAB_SIZE.value, "", SEED.value))


def scopes():
    """Scope -> what its QAT arm rounds, from the flags."""
    from v4jax import quantization

    for name in SCOPES.value:
        if name not in quantization.SCOPES:
            allowed = ", ".join(quantization.SCOPES)
            raise ValueError(f"--scopes: unknown scope {name!r}, allowed: {allowed}")
    if "paper" not in SCOPES.value:
        raise ValueError("--scopes: paper must be among them, the report is built around it")
    extra = (quantization.BF16_INDEX_SCORES,) if INDEX_SCORES.value == "bfloat16" else ()
    rules = {name: quantization.SCOPES[name].rules + extra for name in SCOPES.value}
    return {name: quantization.Quantization(rule) for name, rule in rules.items()}


def experiment(seed: int, workdir: pathlib.Path) -> tuple[dict, dict[str, pathlib.Path]]:
    """Trains and compares all arms of one seed; returns the report and the runs' folders."""
    from v4jax import parallel
    from v4jax.analysis import comparison, provenance
    from v4jax.analysis.evaluation import Evaluator
    from v4jax.analysis.report import summary, write_report
    from v4jax.distributed import end_if_preempted, is_main, say
    from v4jax.training import run, switch
    from v4jax.training.context_models import ContextModels
    from v4jax.training.corpus import load_corpus, split
    from v4jax.training.data import Dataset, evaluation_windows
    from v4jax.training.schedule import resolve_steps
    from v4jax.training.tokenizer import get_tokenizer

    began = time.perf_counter()
    mesh = parallel.make_mesh(MESH.value)
    parallel.check_rows(mesh, BATCH_SIZE.value)
    corpus = load_corpus(DATA.value)
    say(corpus.description)
    train_part, held_out = split(corpus)
    tokenizer = get_tokenizer(TOKENIZER.value, train_part, VOCAB_SIZE.value, ".cache/text")
    end_if_preempted("before the corpus was tokenized")
    dataset = Dataset.build(train_part.documents, tokenizer, ".cache/text")
    windows = evaluation_windows(held_out.documents, tokenizer, LENGTH.value, EVAL_WINDOWS.value)

    end_if_preempted("before training")
    config = configure(tokenizer.vocab_size, dataset.hash, seed)
    share = parallel.share(mesh)
    batches = dataset.batches(config.sequence_length, config.batch_size, seed, *share)
    trainer = run.Trainer(config, batches, dataset.token_counts(), tokenizer, mesh)
    say(provenance.describe(trainer, dataset))
    arms = switch.run_arms(
        trainer,
        workdir,
        switch_step=resolve_steps("--qat_start", fraction_or_steps("qat_start"), STEPS.value),
        scopes=scopes(),
        pace=run.Pace(
            LOG_EVERY.value,
            SAVE_EVERY.value,
            trackers=tuple(TRACKERS.value),
            profile=step_range("profile_steps", STEPS.value),
        ),
        from_checkpoint=FROM.value,
    )

    say("comparing the arms on the held-out documents")
    seconds = switch.alternate_steps(trainer, arms.control, arms.scopes["paper"])
    arms = arms if mesh is None else arms.on_one_device()
    report = comparison.compare(Evaluator(trainer.program, windows, 2 * BATCH_SIZE.value), arms)
    context = ContextModels.fit([text.encode() for _, text in train_part.documents])
    report["bits_per_byte"] |= context.bits_per_byte(windows.covered(held_out.documents))
    end_if_preempted("before the continuations")
    report["seconds_per_step"] = seconds | {"phases": comparison.phase_seconds(arms)}
    report["continuation"] = comparison.continuations(trainer, arms, held_out.documents)
    end_if_preempted("before the report was written")
    report["what"] = provenance.what(trainer, arms, windows, corpus) | {
        "experiment": NAME,
        "command": shlex.join(["python", "launch.py", f"--experiment={NAME}", *sys.argv[1:]]),
        "preset": PRESET.value,
        "seconds": {"total": time.perf_counter() - began},
    }
    if is_main():
        write_report(workdir, report, arms.folders)
    say(summary(report))
    return report, arms.folders


def main():
    from v4jax import distributed
    from v4jax.analysis.report import attach_seeds, summary, write_report
    from v4jax.training.files import as_path

    if FROM.value and SEEDS.value > 1:
        raise ValueError("--from_checkpoint: has one seed, so --seeds must be 1")
    if FROM.value and not flags.FLAGS["qat_start"].using_default_value:
        raise ValueError("--qat_start: with --from_checkpoint the switch is at its step; name none")
    step_range("profile_steps", STEPS.value)  # wrong values end here
    distributed.start(
        coordinator=COORDINATOR.value,
        num_processes=PROCESSES.value,
        process_id=PROCESS_ID.value,
        preemptible=PREEMPTIBLE.value,
    )
    workdir = as_path(WORKDIR.value)
    results = [experiment(SEED.value, workdir)]
    for seed in range(SEED.value + 1, SEED.value + SEEDS.value):
        results.append(experiment(seed, workdir / f"seed_{seed}"))
    if len(results) > 1 and distributed.is_main():
        reports = [report for report, _ in results]
        report = reports[0] | {"seeds": attach_seeds(reports)}
        write_report(workdir, report, results[0][1])
        print(summary(report))


if __name__ == "__main__":
    command.run(main, quick=SMALL)

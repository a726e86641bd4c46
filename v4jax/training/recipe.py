"""What every training experiment takes from its command line, and the set-up that this makes.

An experiment defines these flags as its own, some with another default, and then its further ones:

    recipe.define(steps=400, batch_size=4)
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import TYPE_CHECKING, Any

from absl import flags

from v4jax.training import command
from v4jax.training.command import fraction_or_steps, starts, step_range

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from v4jax.quantization import Quantization
    from v4jax.training.corpus import Corpus
    from v4jax.training.data import Dataset, EvalWindows
    from v4jax.training.observe import Pace
    from v4jax.training.settings import RunConfig
    from v4jax.training.tokenizer import Tokenizer
    from v4jax.training.trainer import Trainer

F = flags.FLAGS
flags.disclaim_key_flags()  # what `define` defines is its caller's, in --help too


def define(**own: Any) -> None:
    """Defines the flags for the experiment that calls it. own: flag -> its default there."""
    _of_the_run()
    _of_the_training()
    _of_stability()
    for name, value in own.items():
        F.set_default(name, value)


def define_study(**own: Any) -> None:
    """`define`, and --seeds, for an experiment whose sweep is of its own function."""
    define(**own)
    flags.DEFINE_integer("seeds", 3, "[run] The sweep is of so many seeds.", 1)


def each_seed(*settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of a study's sweep: each of `settings`, or of none, with every seed."""
    return [one | {"seed": seed} for one in settings or ({},) for seed in range(F.seeds)]


def _of_the_run() -> None:
    string, integer = flags.DEFINE_string, flags.DEFINE_integer
    string("workdir", None, "[run] Folder, or gs://BUCKET/PATH.", required=True)
    flags.DEFINE_bool("quick", False, "[run] Shrink all that you do not set: a smoke test.")
    integer("seed", 0, "[run] Initialisation, data order, hash tables.", 0)
    integer("save_every", 100, "[run] Steps between checkpoints.", 1)
    integer("log_every", 10, "[run] Steps between lines of metrics.jsonl.", 1)
    integer("probe_every", 0, "[run] Steps between looks at gradients through FP4.", 0)
    flags.DEFINE_list("trackers", "", "[run] Of wandb, mlflow: beside TensorBoard.")
    string("profile_steps", None, "[run] 10:15 traces steps 10 to 14 of each phase with them.")
    string("mesh", None, "[devices] data=2,fsdp=4: copies, and parts of the parameters.")
    string("coordinator", None, "[devices] host:port of the first of several processes.")
    integer("num_processes", None, "[devices] Processes of the run. Slurm, TPUs: found.", 1)
    integer("process_id", None, "[devices] Which of them this is, from 0 on.", 0)
    flags.DEFINE_bool(
        "preemptible", False, "[devices] On SIGTERM save, and exit with 75; always so inside srun."
    )
    integer("eval_windows", 2048, "[run] At most so many held-out windows.", 1)

    string(
        "data", None, "[data] Text, JSONL, Parquet, folder; task:recall; default: your Python's."
    )
    string("tokenizer", "bpe", "[data] bpe, bytes, or the path of a tokenizer.json.")
    integer("vocab_size", 2048, "[data] Entries of the BPE.", 257)
    integer("sequence_length", 256, "[data] Tokens a row.", 2)
    integer("batch_size", 8, "[data] Rows a step.", 1)


def _of_the_training() -> None:
    integer, number = flags.DEFINE_integer, flags.DEFINE_float
    flags.DEFINE_enum(
        "preset", "nano", ("tiny", "pico", "nano", "micro", "mini", "small"), "[model] Size."
    )
    number("swiglu_limit", 10.0, "[model] Clamp of the experts' SwiGLU; 0: none.", 0)
    flags.DEFINE_enum(
        "compute_dtype",
        "auto",
        ("auto", "bfloat16", "float32"),
        "[model] Of matmuls and activations. auto: bfloat16, but float32 on CPUs, which are slower "
        "in bfloat16. The report says which it was.",
    )

    integer("steps", 400, "[training] Updates in all.", 2)
    number("decay_start", 0.7, "[training] Cosine decay: fraction, or a step.", 0)
    number("final_fraction", 0.1, "[training] Learning rate at the end, of the peak.", 0)
    number("warmup", 0.06, "[training] Warm-up: fraction, or steps.", 0)
    number("decay_end", 1.0, "[training] The cosine's end: fraction, or a step.", 0)
    number("dense_until", 0.1, "[training] Dense attention before: fraction, or a step.", 0)
    number("indexer_warmup", 0.0, "[training] Then only the indexer learns: fraction, or steps.", 0)
    number(
        "index_start",
        0.0,
        "[training] The indexer's KL counts from there on: fraction, or a step.",
        0,
    )
    flags.DEFINE_list(
        "lengths", "", "[training] START:TOKENS, growing: 0:64,0.5:256 cuts the first rows in four."
    )
    flags.DEFINE_list("batch_sizes", "", "[training] START:ROWS, growing: 0:4,0.5:8.")
    number("learning_rate", 2.5e-3, "[training] Peak, of Muon and AdamW.", 0)
    number(
        "indexer_learning_rate",
        None,
        "[training] The indexer's own peak; default: as the others'.",
        0,
    )
    flags.DEFINE_enum(
        "clip", "global", ("global", "group"), "[training] Gradients' norm: of all, or by part."
    )
    flags.DEFINE_enum("matrices", "muon", ("muon", "adamw"), "[training] What moves the matrices.")
    flags.DEFINE_enum(
        "newton_schulz",
        "hybrid",
        ("hybrid", "five"),
        "[training] Muon's rows: 8 + 2, or the first 5.",
    )
    number("index_weight", 1.0, "[training] Of the indexer's KL; 0 freezes it.", 0)
    number("balance_weight", 1e-4, "[training] Of the balance loss.", 0)
    number("bias_speed", 0.01, "[training] Of the routers' selection bias, a step.", 0)
    number("z_loss", 0.0, "[training] Weight of the squared log of the softmax's sum.", 0)


def _of_stability() -> None:
    integer, number = flags.DEFINE_integer, flags.DEFINE_float
    flags.DEFINE_enum(
        "on_spike",
        "note",
        ("note", "rollback", "anticipate"),
        "[stability] A jump of the loss: note it; go back and skip its data; go back and route by "
        "older parameters for a while.",
    )
    integer("anticipate_from", None, "[stability] Route by older parameters from this step on.", 0)
    integer("delay_steps", 16, "[stability] By parameters so many steps older.", 0)
    integer("active_steps", 500, "[stability] For so many steps.", 1)
    number("skip_sigma", 0.0, "[stability] Leave out steps so many sigmas out; 0: none.", 0)
    integer("max_nonfinite", 3, "[stability] Not finite in a row until the run goes back.", 1)
    integer("max_rollbacks", 3, "[stability] Times that it does so.", 0)
    number("distill", 0.0, "[fp4] Share of the parent's KL in the loss of QAT, 0 to 1.", 0, 1)
    number("dampening", 0.0, "[fp4] Pull of weights to their rounded value.", 0)
    number("freeze_above", 0.0, "[fp4] Freeze weights that oscillate more often.", 0)
    integer("reset_every", 0, "[fp4] Reset oscillating weights every so many steps.", 0)
    number("ema_decay", 0.0, "[fp4] Round by a mean of the weight with this decay.", 0)
    flags.DEFINE_enum(
        "rounding", "nearest", ("nearest", "stochastic"), "[fp4] Of weights, in training."
    )
    flags.DEFINE_bool("track_oscillation", False, "[fp4] Measure oscillation all the time.")


SMALL = {
    "steps": 20,
    "batch_size": 4,
    "sequence_length": 64,
    "vocab_size": 512,
    "eval_windows": 32,
    "log_every": 1,
}
"""What --quick sets where the user did not."""

TINY = SMALL | {
    "preset": "tiny",
    "steps": 8,
    "batch_size": 2,
    "eval_windows": 8,
    "dense_until": 0.0,
    "matrices": "adamw",
}
"""The same for studies, which are many runs: as few programs as there can be, quick to compile."""


def start() -> pathlib.Path:
    """Starts the run's processes, as the flags say; returns the folder of --workdir."""
    from v4jax import distributed
    from v4jax.training.files import as_path

    step_range("profile_steps", F.steps)  # wrong values end here
    distributed.start(
        coordinator=F.coordinator,
        num_processes=F.num_processes,
        process_id=F.process_id,
        preemptible=F.preemptible,
    )
    return as_path(F.workdir)


def configure(vocab_size: int, data: str, seed: int) -> RunConfig:
    """The runs' configuration, from the flags. data: hash of the documents, or ""."""
    import jax

    from v4jax import presets
    from v4jax.training.losses import Objective
    from v4jax.training.optimizer import OptimizerConfig
    from v4jax.training.remedies import RemedyConfig
    from v4jax.training.schedule import ScheduleConfig
    from v4jax.training.settings import RunConfig
    from v4jax.training.stability import StabilityConfig

    model = presets.PRESETS[F.preset](vocab_size)
    model = dataclasses.replace(model, swiglu_limit=F.swiglu_limit or None)
    on_cpu = jax.default_backend() == "cpu"
    return RunConfig(
        model=presets.shallow(model) if F.quick else model,
        schedule=ScheduleConfig(
            total_steps=F.steps,
            warmup_steps=fraction_or_steps("warmup"),
            decay_start=fraction_or_steps("decay_start"),
            final_fraction=F.final_fraction,
            dense_until=fraction_or_steps("dense_until"),
            decay_end=fraction_or_steps("decay_end"),
            indexer_warmup=fraction_or_steps("indexer_warmup") or 0,
            index_start=fraction_or_steps("index_start") or 0,
            lengths=starts("lengths"),
            batch_sizes=starts("batch_sizes"),
        ),
        optimizer=OptimizerConfig(
            learning_rate=F.learning_rate,
            train_indexer=F.index_weight > 0,
            ns_dtype="float32" if on_cpu else "bfloat16",
            matrices=F.matrices,
            indexer_learning_rate=F.indexer_learning_rate,
            clip=F.clip,
            newton_schulz=F.newton_schulz,
        ),
        objective=Objective(
            balance=F.balance_weight,
            index=F.index_weight,
            bias_speed=F.bias_speed,
            z_loss=F.z_loss,
            distill=F.distill,
        ),
        stability=StabilityConfig(
            on_spike=F.on_spike,
            anticipate_from=F.anticipate_from,
            delay_steps=F.delay_steps,
            active_steps=F.active_steps,
            skip_sigma=F.skip_sigma,
            max_nonfinite=F.max_nonfinite,
            max_rollbacks=F.max_rollbacks,
        ),
        remedies=RemedyConfig(
            dampening=F.dampening,
            freeze_above=F.freeze_above,
            reset_every=F.reset_every,
            ema_decay=F.ema_decay,
            rounding=F.rounding,
            track=F.track_oscillation,
        ),
        sequence_length=F.sequence_length,
        batch_size=F.batch_size,
        seed=seed,
        data=data,
        compute_dtype=F.compute_dtype
        if F.compute_dtype != "auto"
        else ("bfloat16", "float32")[on_cpu],
    )


def shrink(small: dict[str, Any]) -> None:
    """Sets the flags of `small` that were not given, with --quick: for what asks before a run."""
    if F.quick:
        command.shrink(small)


def switch_step() -> int:
    """The step of an experiment's --qat_start."""
    from v4jax.training.schedule import resolve_steps

    return resolve_steps("--qat_start", fraction_or_steps("qat_start"), F.steps)


def scopes() -> dict[str, Quantization]:
    """Scope -> what it rounds, of an experiment's --scopes."""
    from v4jax.quantization import SCOPES

    for name in F.scopes:
        if name not in SCOPES:
            raise ValueError(f"--scopes: unknown scope {name!r}, allowed: {', '.join(SCOPES)}")
    return {name: SCOPES[name] for name in F.scopes}


def pace() -> Pace:
    """How often the runs speak and save."""
    from v4jax.training.observe import Pace

    return Pace(
        F.log_every,
        F.save_every,
        probe_every=F.probe_every,
        trackers=tuple(F.trackers),
        profile=step_range("profile_steps", F.steps),
    )


@dataclasses.dataclass(frozen=True)
class Setup:
    """What does not depend on the seed. train: the documents trained on; dataset: their tokens.
    held_out: the other documents; windows: what is measured of them. began: by perf_counter."""

    mesh: Mesh | None
    corpus: Corpus
    train: Corpus
    held_out: Corpus
    tokenizer: Tokenizer
    dataset: Dataset
    windows: EvalWindows
    began: float

    def configure(self, seed: int) -> RunConfig:
        """`configure` for this data."""
        return configure(self.tokenizer.vocab_size, self.dataset.hash, seed)

    def trainer(self, config: RunConfig) -> Trainer:
        """The trainer of runs with `config`, on this data."""
        from v4jax import parallel
        from v4jax.training.trainer import Trainer

        sizes = config.sequence_length, config.batch_size, config.seed
        batches = self.dataset.batches(*sizes, *parallel.share(self.mesh))
        return Trainer(config, batches.rows, self.dataset.token_counts(), self.tokenizer, self.mesh)


def prepare() -> Setup:
    """Loads and tokenizes the data that the flags name.

    Raises ValueError, one line, on wrong ones.
    """
    from v4jax import parallel
    from v4jax.distributed import end_if_preempted, say
    from v4jax.training.corpus import load_corpus, split
    from v4jax.training.data import Dataset, evaluation_windows
    from v4jax.training.tokenizer import get_tokenizer

    began, mesh = time.perf_counter(), parallel.make_mesh(F.mesh)
    parallel.check_rows(mesh, F.batch_size)
    corpus = load_corpus(F.data)
    say(corpus.description)
    train, held_out = split(corpus)
    tokenizer = get_tokenizer(F.tokenizer, train, F.vocab_size, ".cache/text")
    end_if_preempted("before the corpus was tokenized")
    dataset = Dataset.build(train.documents, tokenizer, ".cache/text")
    windows = evaluation_windows(held_out.documents, tokenizer, F.sequence_length, F.eval_windows)
    end_if_preempted("before training")
    return Setup(mesh, corpus, train, held_out, tokenizer, dataset, windows, began)

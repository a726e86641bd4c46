"""What every training experiment takes from its command line, and the set-up that this makes.

An experiment takes these flags into its own --help, and sets its own defaults for some:

    flags.adopt_module_key_flags(recipe)
    recipe.defaults(steps=400, batch_size=4)

A flag that one experiment alone has stands in that experiment's file.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from typing import TYPE_CHECKING, Any

from absl import flags

from v4jax.training import command
from v4jax.training.command import fraction_or_steps, starts, step_range

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from v4jax.training.corpus import Corpus
    from v4jax.training.data import Dataset, EvalWindows
    from v4jax.training.observe import Pace
    from v4jax.training.settings import RunConfig
    from v4jax.training.tokenizer import Tokenizer
    from v4jax.training.trainer import Trainer

string, integer, number = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
WORKDIR = string("workdir", None, "[run] Folder, or gs://BUCKET/PATH.", required=True)
QUICK = flags.DEFINE_bool("quick", False, "[run] Shrink all that you do not set: a smoke test.")
SEED = integer("seed", 0, "[run] Initialisation, data order, hash tables.", 0)
SAVE_EVERY = integer("save_every", 100, "[run] Steps between checkpoints.", 1)
LOG_EVERY = integer("log_every", 10, "[run] Steps between lines of metrics.jsonl.", 1)
PROBE_EVERY = integer(
    "probe_every", 0, "[run] Steps between looks at gradients through FP4; one costs two steps.", 0
)
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
    "data", None, "[data] Text, JSONL or Parquet, file or folder. Default: your Python's."
)
TOKENIZER = string("tokenizer", "bpe", "[data] bpe, bytes, or the path of a tokenizer.json.")
VOCAB_SIZE = integer("vocab_size", 2048, "[data] Entries of the BPE.", 257)
LENGTH = integer("sequence_length", 256, "[data] Tokens a row.", 2)
BATCH_SIZE = integer("batch_size", 8, "[data] Rows a step.", 1)

PRESET = flags.DEFINE_enum(
    "preset", "nano", ("tiny", "pico", "nano", "micro", "mini", "small"), "[model] Size."
)
SWIGLU_LIMIT = number("swiglu_limit", 10.0, "[model] Clamp of the experts' SwiGLU; 0: none.", 0)
DTYPE = flags.DEFINE_enum(
    "compute_dtype",
    "auto",
    ("auto", "bfloat16", "float32"),
    "[model] Of matmuls and activations. auto: bfloat16, but float32 on CPUs, which are slower in "
    "bfloat16. The report says which it was.",
)

STEPS = integer("steps", 640, "[training] Updates in all.", 2)
DECAY_START = number("decay_start", 0.7, "[training] Cosine decay: fraction, or a step.", 0)
FINAL_FRACTION = number(
    "final_fraction", 0.1, "[training] Learning rate at the end, of the peak.", 0
)
WARMUP = number("warmup", 0.06, "[training] Warm-up: fraction, or steps.", 0)
DECAY_END = number("decay_end", 1.0, "[training] The cosine's end: fraction, or a step.", 0)
DENSE = number("dense_until", 0.1, "[training] Dense attention before: fraction, or a step.", 0)
INDEXER_WARMUP = number(
    "indexer_warmup", 0.0, "[training] Then only the indexer learns: fraction, or steps.", 0
)
INDEX_START = number(
    "index_start", 0.0, "[training] The indexer's KL counts from there on: fraction, or a step.", 0
)
LENGTHS = flags.DEFINE_list(
    "lengths", "", "[training] START:TOKENS, growing: 0:64,0.5:256 cuts the first rows in four."
)
BATCH_SIZES = flags.DEFINE_list("batch_sizes", "", "[training] START:ROWS, growing: 0:4,0.5:8.")
LEARNING_RATE = number("learning_rate", 2.5e-3, "[training] Peak, of Muon and AdamW.", 0)
INDEXER_RATE = number(
    "indexer_learning_rate", None, "[training] The indexer's own peak; default: as the others'.", 0
)
CLIP = flags.DEFINE_enum(
    "clip", "global", ("global", "group"), "[training] Gradients' norm: of all, or by part."
)
MATRICES = flags.DEFINE_enum(
    "matrices", "muon", ("muon", "adamw"), "[training] What moves the matrices."
)
NEWTON_SCHULZ = flags.DEFINE_enum(
    "newton_schulz", "hybrid", ("hybrid", "five"), "[training] Muon's rows: 8 + 2, or the first 5."
)
INDEX_WEIGHT = number("index_weight", 1.0, "[training] Of the indexer's KL; 0 freezes it.", 0)
BALANCE_WEIGHT = number("balance_weight", 1e-4, "[training] Of the balance loss.", 0)
BIAS_SPEED = number("bias_speed", 0.01, "[training] Of the routers' selection bias, a step.", 0)

Z_LOSS = number("z_loss", 0.0, "[training] Weight of the squared log of the softmax's sum.", 0)

ON_SPIKE = flags.DEFINE_enum(
    "on_spike",
    "note",
    ("note", "rollback", "anticipate"),
    "[stability] A jump of the loss: note it; go back and skip its data; go back and route by "
    "older parameters for a while.",
)
ANTICIPATE_FROM = integer(
    "anticipate_from", None, "[stability] Route by older parameters from this step on.", 0
)
DELAY_STEPS = integer("delay_steps", 16, "[stability] By parameters so many steps older.", 0)
ACTIVE_STEPS = integer("active_steps", 500, "[stability] For so many steps.", 1)
SKIP_SIGMA = number(
    "skip_sigma",
    0.0,
    "[stability] Leave out steps whose loss or gradient is so far out; 0: none.",
    0,
)
MAX_NONFINITE = integer(
    "max_nonfinite", 3, "[stability] Steps not finite in a row until the run goes back.", 1
)
MAX_ROLLBACKS = integer("max_rollbacks", 3, "[stability] Times that it does so.", 0)

DISTILL = number("distill", 0.0, "[fp4] Share of the parent's KL in the loss of QAT, 0 to 1.", 0, 1)
DAMPENING = number("dampening", 0.0, "[fp4] Pull of weights to their rounded value.", 0)
FREEZE_ABOVE = number("freeze_above", 0.0, "[fp4] Freeze weights that oscillate more often.", 0)
RESET_EVERY = integer("reset_every", 0, "[fp4] Reset oscillating weights every so many steps.", 0)
EMA_DECAY = number("ema_decay", 0.0, "[fp4] Round by a mean of the weight with this decay.", 0)
ROUNDING = flags.DEFINE_enum(
    "rounding", "nearest", ("nearest", "stochastic"), "[fp4] Of weights, in training."
)
TRACK = flags.DEFINE_bool("track_oscillation", False, "[fp4] Measure oscillation all the time.")

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

_OWN = {flag.name: flag.default for flag in flags.FLAGS.get_flags_for_module(sys.modules[__name__])}


def defaults(**values: Any) -> None:
    """Makes these the defaults of their flags, and this file's those of all others."""
    for name, value in (_OWN | values).items():
        if flags.FLAGS[name].default != value:
            flags.FLAGS.set_default(name, value)


def start() -> pathlib.Path:
    """Starts the run's processes, as the flags say; returns the folder of --workdir."""
    from v4jax import distributed
    from v4jax.training.files import as_path

    step_range("profile_steps", STEPS.value)  # wrong values end here
    distributed.start(
        coordinator=COORDINATOR.value,
        num_processes=PROCESSES.value,
        process_id=PROCESS_ID.value,
        preemptible=PREEMPTIBLE.value,
    )
    return as_path(WORKDIR.value)


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

    limit = SWIGLU_LIMIT.value or None
    model = presets.PRESETS[PRESET.value](vocab_size)
    model = dataclasses.replace(model, swiglu_limit=limit)
    on_cpu = jax.default_backend() == "cpu"
    return RunConfig(
        model=presets.shallow(model) if QUICK.value else model,
        schedule=ScheduleConfig(
            total_steps=STEPS.value,
            warmup_steps=fraction_or_steps("warmup"),
            decay_start=fraction_or_steps("decay_start"),
            final_fraction=FINAL_FRACTION.value,
            dense_until=fraction_or_steps("dense_until"),
            decay_end=fraction_or_steps("decay_end"),
            indexer_warmup=fraction_or_steps("indexer_warmup") or 0,
            index_start=fraction_or_steps("index_start") or 0,
            lengths=starts("lengths"),
            batch_sizes=starts("batch_sizes"),
        ),
        optimizer=OptimizerConfig(
            learning_rate=LEARNING_RATE.value,
            train_indexer=INDEX_WEIGHT.value > 0,
            ns_dtype="float32" if on_cpu else "bfloat16",
            matrices=MATRICES.value,
            indexer_learning_rate=INDEXER_RATE.value,
            clip=CLIP.value,
            newton_schulz=NEWTON_SCHULZ.value,
        ),
        objective=Objective(
            balance=BALANCE_WEIGHT.value,
            index=INDEX_WEIGHT.value,
            bias_speed=BIAS_SPEED.value,
            z_loss=Z_LOSS.value,
            distill=DISTILL.value,
        ),
        stability=StabilityConfig(
            on_spike=ON_SPIKE.value,
            anticipate_from=ANTICIPATE_FROM.value,
            delay_steps=DELAY_STEPS.value,
            active_steps=ACTIVE_STEPS.value,
            skip_sigma=SKIP_SIGMA.value,
            max_nonfinite=MAX_NONFINITE.value,
            max_rollbacks=MAX_ROLLBACKS.value,
        ),
        remedies=RemedyConfig(
            dampening=DAMPENING.value,
            freeze_above=FREEZE_ABOVE.value,
            reset_every=RESET_EVERY.value,
            ema_decay=EMA_DECAY.value,
            rounding=ROUNDING.value,
            track=TRACK.value,
        ),
        sequence_length=LENGTH.value,
        batch_size=BATCH_SIZE.value,
        seed=seed,
        data=data,
        compute_dtype=DTYPE.value if DTYPE.value != "auto" else ("bfloat16", "float32")[on_cpu],
    )


def shrink(small: dict[str, Any]) -> None:
    """Sets the flags of `small` that were not given, with --quick: for what asks before a run."""
    if QUICK.value:
        command.shrink(small)


def pace() -> Pace:
    """How often the runs speak and save."""
    from v4jax.training.observe import Pace

    return Pace(
        LOG_EVERY.value,
        SAVE_EVERY.value,
        probe_every=PROBE_EVERY.value,
        trackers=tuple(TRACKERS.value),
        profile=step_range("profile_steps", STEPS.value),
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

    began, mesh = time.perf_counter(), parallel.make_mesh(MESH.value)
    parallel.check_rows(mesh, BATCH_SIZE.value)
    corpus = load_corpus(DATA.value)
    say(corpus.description)
    train, held_out = split(corpus)
    tokenizer = get_tokenizer(TOKENIZER.value, train, VOCAB_SIZE.value, ".cache/text")
    end_if_preempted("before the corpus was tokenized")
    dataset = Dataset.build(train.documents, tokenizer, ".cache/text")
    windows = evaluation_windows(held_out.documents, tokenizer, LENGTH.value, EVAL_WINDOWS.value)
    end_if_preempted("before training")
    return Setup(mesh, corpus, train, held_out, tokenizer, dataset, windows, began)

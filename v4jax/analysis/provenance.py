"""What produced a number: device, versions, data and sizes, for the top of a report."""

import math
from typing import Any

import jax
import numpy as np

from v4jax.analysis.comparison import PART_WINDOWS
from v4jax.config import CSA
from v4jax.model import part_of
from v4jax.training import flops
from v4jax.training.corpus import Corpus
from v4jax.training.data import Dataset, EvalWindows
from v4jax.training.machine import environment
from v4jax.training.metrics import table
from v4jax.training.stages import rows_before
from v4jax.training.step import TrainState
from v4jax.training.switch import Arms
from v4jax.training.trainer import RunConfig, Trainer


def parameters(trainer: Trainer) -> int:
    """How many parameters the model has, MTP included."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trainer.params))


def describe(trainer: Trainer, dataset: Dataset) -> str:
    """What is about to run: model, training, where the indexer has no choice, FLOPs, bytes."""
    config, env = trainer.config, environment()
    tokens = _tokens(config)
    entries = config.sequence_length // config.model.compress_rates.compressed_sparse_attention
    idle = CSA in config.model.layer_types and entries <= config.model.index_topk
    note = f"\nnote: rows hold {entries} CSA entries, index_topk is {config.model.index_topk}: all "
    note += "are attended, the indexer never chooses; a longer --sequence_length changes that"
    return (
        f"model: {parameters(trainer):,} parameters, {config.model.num_hidden_layers} layers; "
        f"computes in {config.compute_dtype} with float32 masters\n"
        f"training: {config.schedule.total_steps} steps of {config.batch_size} x "
        f"{config.sequence_length} tokens = {tokens:,} tokens, "
        f"{tokens / max(dataset.num_tokens, 1):.2f} epochs; {trainer.tokenizer.name}; "
        f"Python {env['python']}, jax {env['jax']}, {env['device']}, {env['cores']} cores"
        + (note if idle else "")
        + f"\n{flops.describe(config.model, config.sequence_length, config.compute_dtype)}\n"
        + bytes_by_part(trainer.abstract_state())
    )


def _tokens(config: RunConfig) -> int:
    """Tokens of all of a run's steps."""
    total = config.schedule.total_steps
    return config.sequence_length * rows_before(config.schedule, config.batch_size, total)


def bytes_by_part(state: TrainState) -> str:
    """A table: bytes of the state, of one device's share, for each part of the model."""
    columns = ("params", "variables", "opt_state")
    found: dict[str, dict[str, int]] = {}
    for name in columns:
        for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(state, name)):
            part = part_of(jax.tree_util.keystr(path, simple=True, separator="/")) or "counters"
            row = found.setdefault(part, dict.fromkeys(columns, 0))
            row[name] += math.prod(_share(leaf)) * leaf.dtype.itemsize
    found = dict(sorted(found.items(), key=lambda item: -sum(item[1].values())))
    found["sum"] = {name: sum(row[name] for row in found.values()) for name in columns}
    rows = [
        [part, *(f"{n:,}" for n in (*row.values(), sum(row.values())))]
        for part, row in found.items()
    ]
    return table(rows, ("bytes on a device", "parameters", "variables", "optimizer", "sum"))


def _share(leaf) -> tuple[int, ...]:
    """The shape of a leaf's part on one device."""
    sharding = getattr(leaf, "sharding", None)
    return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)


def what(trainer: Trainer, arms: Arms, windows: EvalWindows, corpus: Corpus) -> dict:
    """The report's `what`: sizes, data and environment."""
    config = trainer.config
    predicted = int(windows.mask.sum())
    total = config.schedule.total_steps
    return environment() | {
        "parameters": parameters(trainer),
        "steps": total,
        "switch_step": arms.branch.step,
        "tokens": _tokens(config),
        "batch_size": config.batch_size,
        "sequence_length": config.sequence_length,
        "learning_rate": config.optimizer.learning_rate,
        "seed": config.seed,
        "compute_dtype": config.compute_dtype,
        "corpus": corpus.description,
        "corpus_hash": corpus.hash,
        "tokenizer": trainer.tokenizer.name,
        "vocab_size": config.model.vocab_size,
        "bytes_per_token": float(windows.num_bytes.sum() / predicted),
        "eval_windows": len(windows.tokens),
        "eval_documents": len(set(windows.document.tolist())),
        "eval_tokens": predicted,
        "eval_bytes": int(windows.num_bytes.sum()),
        "part_windows": min(PART_WINDOWS, len(windows.tokens)),
    }


def sizes(config: RunConfig) -> dict[str, int]:
    """Of a run before it starts: `parameters`, and `bytes of state`, which training holds."""
    nothing: Any = None  # batches and tokenizer, which the sizes do not need
    trainer = Trainer(config, nothing, np.ones(config.model.vocab_size), nothing)
    state = trainer.abstract_state()
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "bytes of state": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
    }

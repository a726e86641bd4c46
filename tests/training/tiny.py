"""The smallest run that has everything: CSA, both routers, MTP; and steps that compile quickly."""

from __future__ import annotations

import jax
import numpy as np

from tests.jax_model import QUICK_COMPILE, quick_jit
from v4jax.analysis.evaluation import Evaluator
from v4jax.config import CSA, CompressRates, ModelConfig
from v4jax.training.corpus import Corpus, split
from v4jax.training.data import Dataset
from v4jax.training.losses import Objective
from v4jax.training.optimizer import OptimizerConfig
from v4jax.training.schedule import ScheduleConfig
from v4jax.training.settings import RunConfig
from v4jax.training.tokenizer import Tokenizer, get_tokenizer
from v4jax.training.trainer import Trainer

LENGTH, BATCH_SIZE = 32, 2
STEPS, SWITCH = 24, 12
TIMED = ("seconds_per_step", "model_flops_per_second")
"""The metrics that another run of the same steps does not repeat."""


def model(**changes) -> ModelConfig:
    """A CSA layer with hash routing; MTP's block is sliding and top-k. Every axis takes MXFP4."""
    fields = {
        "vocab_size": 257,
        "hidden_size": 32,
        "layer_types": (CSA,),
        "mlp_layer_types": ("hash_moe",),
        "moe_intermediate_size": 32,
        "num_attention_heads": 2,
        "head_dim": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "o_groups": 2,
        "o_lora_rank": 16,
        "sliding_window": 8,
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 3,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "compress_rates": CompressRates(4, 8),
    }
    return ModelConfig(**fields | changes)


def corpus() -> Corpus:
    """Documents of 20 to 200 bytes."""
    rng = np.random.default_rng(0)
    words = ["def", "return", "x", "y", "+", "-", "(", ")", ":", "\n    ", "for", "in", "0", "1"]
    texts = [" ".join(rng.choice(words, rng.integers(8, 60))) for _ in range(80)]
    return Corpus(tuple((f"{i}.py", text) for i, text in enumerate(texts)), "tiny")


def documents() -> tuple[Dataset, tuple, Tokenizer]:
    """Training documents, held-out documents (name, text), and the bytes tokenizer."""
    train, held_out = split(corpus(), 0.3)
    tokenizer = get_tokenizer("bytes", train)
    return Dataset.build(train.documents, tokenizer), held_out.documents, tokenizer


def schedule(steps: int = STEPS) -> ScheduleConfig:
    """Warm-up for 3 steps, dense for 2, decay from 70% on (step 17)."""
    return ScheduleConfig(steps, warmup_steps=3, decay_start=0.7, dense_until=2)


def config(data: str, **changes) -> RunConfig:
    """24 steps of two rows of 32 tokens, unless changed."""
    fields = {
        "model": model(),
        "schedule": schedule(),
        "optimizer": OptimizerConfig(learning_rate=5e-3),
        "objective": Objective(balance=1e-2, index=1.0, bias_speed=0.01),
        "sequence_length": LENGTH,
        "batch_size": BATCH_SIZE,
        "seed": 0,
        "data": data,
    }
    return RunConfig(**fields | changes)


class QuickTrainer(Trainer):
    """A Trainer whose programs compile in a fraction of the time; the numbers' last bits differ."""

    _jit = staticmethod(quick_jit)

    def _compile(self, lowered):
        return lowered.compile(QUICK_COMPILE)


class QuickEvaluator(Evaluator):
    """An Evaluator whose programs compile in a fraction of the time."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._nll = quick_jit(self._batch_nll, static_argnums=(0, 1))
        self._tokens = quick_jit(self._batch_tokens, static_argnums=(0, 1))
        self._collect = quick_jit(self._batch_collect, static_argnums=0)


def trainer(**changes) -> QuickTrainer:
    """A trainer of `config` with `changes`, on `documents`."""
    dataset, _, tokenizer = documents()
    run = config(dataset.hash, **changes)
    batches = dataset.batches(run.sequence_length, run.batch_size, run.seed)
    return QuickTrainer(run, batches.rows, dataset.token_counts(), tokenizer)


def same_bits(a, b) -> bool:
    """Whether two trees of arrays are equal in structure, dtypes and every bit."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs
    )

"""What the step benchmark times: the same small V4 in v4jax and in transformers, and options of it.

The model is `CONFIG`: four layers of every kind, float32, AdamW, no MTP, 4 x 256 tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from v4jax import presets
from v4jax.config import CSA, HCA, SLIDING, CompressRates, ModelConfig
from v4jax.quantization import NO_QUANTIZATION, PAPER, Quantization
from v4jax.training.anticipation import Active
from v4jax.training.data import Batch
from v4jax.training.losses import Objective, losses
from v4jax.training.optimizer import OptimizerConfig
from v4jax.training.remedies import RemedyConfig
from v4jax.training.schedule import ScheduleConfig
from v4jax.training.settings import RunConfig
from v4jax.training.stability import StabilityConfig
from v4jax.training.step import Parent
from v4jax.training.tokenizer import Tokenizer
from v4jax.training.trainer import Trainer, Variant

BATCH, LENGTH = 4, 256
CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    layer_types=(SLIDING, SLIDING, HCA, CSA),
    mlp_layer_types=("hash_moe", "hash_moe", "moe", "moe"),
    moe_intermediate_size=64,
    num_attention_heads=4,
    head_dim=32,
    q_lora_rank=64,
    qk_rope_head_dim=16,
    o_groups=2,
    o_lora_rank=32,
    sliding_window=64,
    index_n_heads=4,
    index_head_dim=32,
    index_topk=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    compress_rates=CompressRates(4, 128),
    num_nextn_predict_layers=0,
)


@dataclasses.dataclass(frozen=True)
class Option:
    """A variation of the plain step, by name of what is added to it."""

    model: ModelConfig = CONFIG
    optimizer: OptimizerConfig = OptimizerConfig(matrices="adamw", train_indexer=False)
    objective: Objective = Objective(balance=0.0, index=0.0)
    quantization: Quantization = NO_QUANTIZATION
    stability: StabilityConfig = StabilityConfig()
    remedies: RemedyConfig = RemedyConfig()


PLAIN = Option()
QAT = Option(quantization=PAPER)
QUICK = Option(presets.shallow(CONFIG))
"""Two layers instead of four: for smoke tests."""
OPTIONS = {
    "MTP": Option(model=dataclasses.replace(CONFIG, num_nextn_predict_layers=1)),
    "Muon": Option(optimizer=OptimizerConfig(train_indexer=False)),
    "Muon, five steps": Option(
        optimizer=OptimizerConfig(newton_schulz="five", train_indexer=False)
    ),
    "gradients clipped per group": Option(
        optimizer=dataclasses.replace(PLAIN.optimizer, clip="group")
    ),
    "the indexer's KL": Option(
        optimizer=OptimizerConfig(matrices="adamw"), objective=Objective(balance=0.0, index=1.0)
    ),
    "z-loss": Option(objective=dataclasses.replace(PLAIN.objective, z_loss=1e-4)),
    "no clamp in SwiGLU": Option(model=dataclasses.replace(CONFIG, swiglu_limit=None)),
    "outliers left out": Option(stability=StabilityConfig(skip_sigma=6.0)),
    "anticipatory routing": Option(
        stability=StabilityConfig(anticipate_from=0, active_steps=1_000_000)
    ),
    "QAT of experts, index q and k": QAT,
    "QAT, distilled from its parent": dataclasses.replace(
        QAT, objective=dataclasses.replace(PLAIN.objective, distill=0.5)
    ),
    "QAT, dampened": dataclasses.replace(QAT, remedies=RemedyConfig(dampening=1e-3)),
    "QAT, oscillation followed": dataclasses.replace(QAT, remedies=RemedyConfig(track=True)),
    "QAT, frozen": dataclasses.replace(QAT, remedies=RemedyConfig(freeze_above=0.02)),
    "QAT, reset": dataclasses.replace(QAT, remedies=RemedyConfig(reset_every=200)),
    "QAT, rounded by a mean": dataclasses.replace(QAT, remedies=RemedyConfig(ema_decay=0.998)),
    "QAT, rounded at random": dataclasses.replace(
        QAT, remedies=RemedyConfig(rounding="stochastic")
    ),
}


def trainer(option: Option, batch: int = BATCH, length: int = LENGTH) -> Trainer:
    """A Trainer on random tokens, every batch the same."""
    config = RunConfig(
        model=option.model,
        schedule=ScheduleConfig(total_steps=1_000_000, dense_until=0),
        optimizer=option.optimizer,
        objective=option.objective,
        sequence_length=length,
        batch_size=batch,
        seed=0,
        data="random tokens",
        quantization=option.quantization,
        stability=option.stability,
        remedies=option.remedies,
    )
    vocabulary = option.model.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocabulary, (batch, length + 1), np.int32)
    found = Batch(tokens, np.ones_like(tokens))
    no_tokenizer = cast(Tokenizer, None)  # only a run's folder holds one
    return Trainer(config, lambda first, count: found, np.ones(vocabulary), no_tokenizer)


def stepper(trainer: Trainer) -> Callable[[], jax.Array]:
    """A function without arguments that makes the next update, as a run does: -> its loss."""
    config = trainer.config
    first = config.stability.anticipate_from
    active = None if first is None else Active(first, config.stability.active_steps)
    program = Variant(config.quantization, trainer.stages[-1].program, routed=active is not None)
    update = trainer.compiled(program)
    state, step = trainer.initial_state(), 0
    copied = jax.tree.map(jnp.copy, (state.params, state.variables))
    parent = (Parent(*copied),) if config.objective.distill else ()

    def run() -> jax.Array:
        nonlocal state, step
        for ahead in active.ahead(step, config.stability.delay_steps) if active else ():
            state = trainer.look_ahead(state, config.quantization, ahead, 0)
        state, metrics = update(state, *trainer.batch(step), *parent)
        step += 1
        return metrics["loss"]

    return run


def gradient(model: ModelConfig, length: int, tokens: int):
    """Forward and backward without an optimizer, rows of `length` tokens.

    Returns the compiled program and a function without arguments that runs it.
    """
    option = Option(model, OptimizerConfig(), Objective())
    made = trainer(option, tokens // length, length)
    state, batch = made.initial_state(), made.batch(0)

    def total(params, variables, tokens, segment_ids) -> Any:
        out = made.program.bind(params, variables)(tokens[:, :-1], segment_ids[:, :-1])
        found = losses(out, tokens, segment_ids)
        return found["loss"] + 0.3 * found["mtp_loss"] + found["index_loss"]

    arguments = (state.params, state.variables, *map(jnp.asarray, batch))
    program = jax.jit(jax.value_and_grad(total)).lower(*arguments).compile()
    return program, lambda: program(*arguments)

"""One training step and one evaluation step: pure functions, jitted.

    loss = CE + mtp_weight CE_mtp + balance_weight sum balance + index_weight sum KL

Weights are fake-quantized once, before the gradient; the gradient with respect to the rounded
weights is handed to the float32 masters unchanged (straight-through, report 5.2.1).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from v4jax.config import ModelConfig
from v4jax.layers.context import UNROUNDED, IndexFormats
from v4jax.layers.router import updated_bias
from v4jax.model import Output, Transformer
from v4jax.quantization import NO_QUANTIZATION, Quantization, quantize_params, resolve
from v4jax.training.data import predicted
from v4jax.training.schedule import Phase, ScheduleConfig, phase


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights of the losses beside the cross-entropy (report 4.2.2).

    balance: sequence-wise balance loss. index: the indexer's KL, per CSA layer; 0 freezes the
    indexer. bias_speed: step of the routers' selection bias, outside the gradient.
    """

    balance: float = 1e-4
    index: float = 1.0
    bias_speed: float = 0.001

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"Objective.{field.name}: got {value!r}, allowed: a number >= 0")


class TrainState(NamedTuple):
    """Everything that a step changes. Pure nested dicts of arrays.

    step: int32 [], updates done; it is the data position too, and no other randomness exists.
    params: float32 masters. variables: router biases and hash tables. opt_state: the optimizer's.
    """

    step: jax.Array
    params: Any
    variables: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Program:
    """The static half of a model: everything but its arrays.

    `graphdef` and the tree structures come from one abstract model; `bind` puts arrays back.
    """

    config: ModelConfig
    graphdef: nnx.GraphDef
    params_structure: Any
    variables_structure: Any

    @classmethod
    def of(cls, model: Transformer) -> "Program":
        """The program of a model (abstract or not)."""
        graphdef, params, variables = nnx.split(model, nnx.Param, ...)
        structure = jax.tree.structure
        return cls(model.config, graphdef, structure(params), structure(variables))

    def bind(self, params, variables, index: IndexFormats = UNROUNDED) -> Transformer:
        """A model over pure dicts `params`, `variables`, with the indexer's formats set."""
        model = nnx.merge(
            self.graphdef,
            jax.tree.unflatten(self.params_structure, jax.tree.leaves(params)),
            jax.tree.unflatten(self.variables_structure, jax.tree.leaves(variables)),
        )
        model.index_formats = index
        return model


def split_model(model: Transformer) -> tuple[Any, Any]:
    """(params, variables) of a model as pure nested dicts of arrays."""
    _, params, variables = nnx.split(model, nnx.Param, ...)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(variables)


@jax.named_scope("losses")
def losses(out: Output, tokens: jax.Array, segment_ids: jax.Array) -> dict[str, jax.Array]:
    """Scalars `loss` (nats a token), `mtp_loss`, `balance_loss`, `index_loss`.

    tokens, segment_ids: int32 [B, T+1]; out is the model's on tokens[:, :-1]. The MTP loss is
    summed over its targets and divided by the main loss's count, as V3 divides by the length.
    """
    counted = predicted(segment_ids)
    count = jnp.maximum(jnp.sum(counted), 1)
    nll = optax.softmax_cross_entropy_with_integer_labels(out.logits, tokens[:, 1:])
    found = {"loss": jnp.sum(nll * counted) / count}
    if out.mtp_logits is not None:
        both = counted[:, 1:] & counted[:, :-1]
        nll = optax.softmax_cross_entropy_with_integer_labels(out.mtp_logits, tokens[:, 2:])
        found["mtp_loss"] = jnp.sum(nll * both) / count
    blocks = [*out.aux["layers"], *([out.aux["mtp"]] if out.aux["mtp"] else [])]
    for name in ("balance_loss", "index_loss"):
        found[name] = sum((b[name] for b in blocks if name in b), jnp.zeros(()))
    return found


@jax.named_scope("router_bias")
def moved_biases(variables, aux, config: ModelConfig, speed: float):
    """Variables with every router's selection bias moved one step against its load."""
    prefix, unit, repeats = config.schedule
    variables = jax.tree.map(lambda x: x, variables)  # fresh dicts, same arrays

    def move(block, load):
        gate = block["mlp"]["gate"]
        if "e_score_correction_bias" in gate:
            gate["e_score_correction_bias"] = updated_bias(
                gate["e_score_correction_bias"], load, speed
            )

    loads = [layer["expert_load"] for layer in aux["layers"]]
    for i in range(prefix):
        move(variables["layers"][i], loads[i])
    for j in range(unit):
        move(
            variables["units"][j], jnp.stack([loads[prefix + r * unit + j] for r in range(repeats)])
        )
    if aux["mtp"]:
        move(variables["mtp"]["block"], aux["mtp"]["expert_load"])
    return variables


def make_train_step(
    program: Program,
    optimizer: optax.GradientTransformation,
    schedule: ScheduleConfig,
    objective: Objective,
    quantization: Quantization = NO_QUANTIZATION,
    shardings: TrainState | None = None,
):
    """(TrainState, tokens, segment_ids int32 [B, T+1]) -> (TrainState, metrics of scalars).

    The state is donated. metrics: the four losses, `grad_norm`, `lr_scale`, `load_max` (largest
    load of an expert over the mean, over layers). shardings: of the state on a mesh, which it
    keeps; to be traced within `jax.set_mesh`.
    """

    def total(params, variables, tokens, segment_ids, now: Phase, resolved):
        model = program.bind(params, variables, resolved.index)
        dense = now.dense if schedule.sparse_from else False  # static: compiled once
        out = model(tokens[:, :-1], segment_ids[:, :-1], dense_index=dense)
        found = losses(out, tokens, segment_ids)
        loss = found["loss"] + objective.balance * found["balance_loss"]
        if "mtp_loss" in found:
            loss += now.mtp_weight * found["mtp_loss"]
        if objective.index:
            loss += objective.index * found["index_loss"]
        return loss, (found, out.aux)

    def step(state: TrainState, tokens, segment_ids):
        now = phase(schedule, state.step)
        resolved = resolve(quantization, state.params)
        rounded = quantize_params(state.params, resolved.weights)
        grads, (metrics, aux) = jax.grad(total, has_aux=True)(
            rounded, state.variables, tokens, segment_ids, now, resolved
        )
        if shardings is not None:  # each device sums up its part alone
            grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        variables = moved_biases(state.variables, aux, program.config, objective.bias_speed)
        loads = jnp.stack([layer["expert_load"] for layer in aux["layers"]])
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "lr_scale": now.lr_scale,
            "load_max": jnp.max(loads) / jnp.mean(loads),
        }
        return TrainState(state.step + 1, params, variables, opt_state), metrics

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    # The step's count is replicated, and so are metrics.
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, shardings.step))

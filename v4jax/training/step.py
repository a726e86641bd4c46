"""One training step: pure functions, jitted.

Weights are fake-quantized once, before the gradient; the gradient with respect to the rounded
weights is handed to the float32 masters unchanged (straight-through, report 5.2.1).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from v4jax.config import ModelConfig
from v4jax.layers.context import UNROUNDED, IndexFormats
from v4jax.layers.router import load_metrics, updated_bias
from v4jax.model import Transformer, chosen_experts
from v4jax.quantization import Resolved, resolve
from v4jax.training import anticipation, remedies
from v4jax.training.losses import losses
from v4jax.training.schedule import phase
from v4jax.training.settings import RunConfig
from v4jax.training.stability import unusual


class TrainState(NamedTuple):
    """Everything that a step changes. Pure nested dicts of arrays.

    step: int32 [], updates done, or left out as `stability` says; with the data skipped it is the
    data position too, and no other randomness exists. params: float32 masters. variables: router
    biases and hash tables. opt_state: the optimizer's. memory: name -> what an option remembers;
    empty without any.
    """

    step: jax.Array
    params: Any
    variables: Any
    opt_state: Any
    memory: dict[str, Any]


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


@jax.named_scope("metrics")
def seen(aux) -> dict[str, jax.Array]:
    """Metrics, float32 [], of what a forward pass tells of itself.

    load_max: largest load of an expert over the mean, over layers; `load_metrics` of each layer,
    "layer_3/load_max" and so on.
    routing_disagreement, swiglu_clamped, index_kept_mass: means over the layers that tell them.
    """
    layers = {f"layer_{i}": layer for i, layer in enumerate(aux["layers"])}
    layers |= {"mtp": aux["mtp"]} if aux["mtp"] else {}
    found = {
        f"{name}/{metric}": value
        for name, layer in layers.items()
        for metric, value in load_metrics(layer["expert_load"]).items()
    }
    found["load_max"] = jnp.max(jnp.stack([found[f"{i}/load_max"] for i in layers if i != "mtp"]))
    means = {
        "routing_disagreement": "disagreement",
        "swiglu_clamped": "clamped",
        "index_kept_mass": "index_kept_mass",
    }
    for name, source in means.items():
        told = [layer[source] for layer in layers.values() if source in layer]
        if told:
            found[name] = jnp.mean(jnp.stack(told))
    return found


class Parent(NamedTuple):
    """A frozen model to learn from: float32 masters, router biases and hash tables."""

    params: Any
    variables: Any


def _rounded(config: RunConfig, state: TrainState) -> tuple[Resolved, Any]:
    """The formats, and the parameters that the next forward pass computes with."""
    resolved = resolve(config.quantization, state.params)
    known = state.memory.get("remedies", {})
    rounded = remedies.rounded(
        config.remedies, state.params, resolved, known, state.step, config.seed
    )
    return resolved, rounded


def make_loss(program: Program, config: RunConfig, *, only_indexer: bool = False):
    """(params, variables, tokens, segment_ids, step, routes=None, parent=None) -> (loss, (the
    losses of `losses.losses`, the model's aux)): what a step differentiates, with respect to
    params, the rounded weights. step: int32 [], updates done. The others as in `make_train_step`.
    """
    schedule, objective = config.schedule, config.objective

    def loss_of(params, variables, tokens, segment_ids, step, routes=None, parent=None):
        now = phase(schedule, step)
        index = resolve(config.quantization, params).index
        dense = now.dense if schedule.sparse_from else False  # static: compiled once
        inputs = tokens[:, :-1], segment_ids[:, :-1]
        dense = only_indexer or dense
        out = program.bind(params, variables, index)(*inputs, dense_index=dense, routes=routes)
        taught = None
        if parent is not None:
            taught = program.bind(*parent)(*inputs, dense_index=dense).logits
        found = losses(out, tokens, segment_ids, taught)
        if only_indexer:
            return objective.index * found["index_loss"], (found, out.aux)
        loss = found["loss"]
        if parent is not None:
            loss = (1 - objective.distill) * loss + objective.distill * found["distill_loss"]
        loss += objective.balance * found["balance_loss"]
        if objective.z_loss:
            loss += objective.z_loss * found["z_loss"]
        if "mtp_loss" in found:
            loss += now.mtp_weight * found["mtp_loss"]
        if objective.index:
            counts = now.index if schedule.resolve("index_start") else 1.0
            loss += objective.index * counts * found["index_loss"]
        return loss, (found, out.aux)

    return loss_of


def make_train_step(
    program: Program,
    optimizer: optax.GradientTransformation,
    config: RunConfig,
    *,
    only_indexer: bool = False,
    routed: bool = False,
    shardings: TrainState | None = None,
):
    """(TrainState, tokens, segment_ids int32 [B, T+1], Parent?) -> (TrainState, metrics).

    The state is donated. config: of the run, its quantization too. only_indexer: the step is of the
    indexer's warm-up: nothing else moves, and `optimizer` is made for that. routed: experts are
    those that `state.memory` holds for this step (`anticipation`). The parent is given where the
    run learns from one. shardings: of the state on a mesh, which it keeps; to be traced within
    `jax.set_mesh`.

    metrics: the losses, those of `seen`, `grad_norm` before clipping, `lr_scale`, `applied` (1, or
    0 where the step was left out), and what `remedies.metrics` says.
    """
    stability, speed = config.stability, config.objective.bias_speed
    gradient = jax.grad(make_loss(program, config, only_indexer=only_indexer), has_aux=True)

    def step(state: TrainState, tokens, segment_ids, parent: Parent | None = None):
        resolved, rounded = _rounded(config, state)
        memory = dict(state.memory)
        remembered = memory.pop("remedies", {})
        routes = None
        if routed:
            shape = tokens.shape[0], tokens.shape[1] - 1
            routes = anticipation.get(state.memory["routes"], state.step, shape)
        grads, (metrics, aux) = gradient(
            rounded, state.variables, tokens, segment_ids, state.step, routes, parent
        )
        if shardings is not None:  # each device sums up its part alone
            grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        grads = remedies.adjusted(config.remedies, grads, state.params, rounded, resolved)
        norm = optax.tree.norm(grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            params, remembers = remedies.applied(
                config.remedies, state.params, params, resolved, remembered
            )
        variables = state.variables
        if not only_indexer:
            variables = moved_biases(variables, aux, program.config, speed)
        changed = params, variables, opt_state, remembers
        before = state.params, state.variables, state.opt_state, remembered
        with jax.named_scope("guard"):
            applied = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
            if stability.skip_sigma:
                outlier, memory["recent"] = unusual(
                    memory["recent"], stability.skip_sigma, metrics["loss"], norm
                )
                applied &= ~outlier
            changed = jax.tree.map(lambda new, old: jnp.where(applied, new, old), changed, before)
        params, variables, opt_state, remembers = changed
        if remembers:
            memory["remedies"] = remembers
        metrics |= seen(aux) | {
            "grad_norm": norm,
            "lr_scale": phase(config.schedule, state.step).lr_scale,
            "applied": applied.astype(jnp.float32),
        }
        metrics |= remedies.metrics(remembers)
        return TrainState(state.step + 1, params, variables, opt_state, memory), metrics

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    # The step's count is replicated, and so are metrics.
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, shardings.step))


def make_look_ahead(program: Program, config: RunConfig):
    """(ring, TrainState without it, batch, tokens, segment_ids) -> the ring with batch `batch`.

    batch: int32 []; tokens, segment_ids int32 [B, T+1]. One forward pass with the state's
    parameters, as `config` rounds them, without head and losses.
    """

    def look(routes, state: TrainState, batch, tokens, segment_ids):
        resolved, rounded = _rounded(config, state)
        model = program.bind(rounded, state.variables, resolved.index)
        dense = phase(config.schedule, batch).dense
        ids = chosen_experts(model, tokens[:, :-1], segment_ids[:, :-1], dense)
        return anticipation.put(routes, batch, ids)

    return look

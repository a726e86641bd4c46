"""What the runs of one experiment share: model, data, and the programs compiled for them."""

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from v4jax import parallel
from v4jax.model import Transformer
from v4jax.quantization import Quantization, resolve
from v4jax.training import anticipation, remedies, stability
from v4jax.training.data import Batch, cut
from v4jax.training.flops import peak_flops, training_flops
from v4jax.training.gradient_health import make_probe
from v4jax.training.observe import StepWork
from v4jax.training.optimizer import build_optimizer
from v4jax.training.remedies import RemedyConfig
from v4jax.training.schedule import learning_rate_scale
from v4jax.training.settings import RunConfig
from v4jax.training.stages import Stage, check_stages, rows_before, stage_of, stage_table, stages
from v4jax.training.step import (
    Parent,
    Program,
    TrainState,
    make_look_ahead,
    make_loss,
    make_train_step,
    split_model,
)
from v4jax.training.tokenizer import Tokenizer


class Variant(NamedTuple):
    """What distinguishes the compiled steps of the runs.

    stage: `Stage.program`. routed: as in `make_train_step`.
    """

    quantization: Quantization
    stage: tuple[bool, int, int]
    routed: bool = False


class Trainer:
    """What the runs of one experiment share: model, optimizer, data and compiled steps.

    config: the configuration of the runs, but for quantization and parent. rows: (first, count) ->
    so many rows of the training data from `first` on, of which this process has its share
    (`parallel.share`): `Batches.rows`. token_counts: [V], for the hash layers. tokenizer: saved
    with each run. mesh: the devices, None: one.

    Raises ValueError, one line, where rows or parameters do not divide over the mesh.
    """

    def __init__(
        self,
        config: RunConfig,
        rows: Callable[[int, int], Batch],
        token_counts: np.ndarray,
        tokenizer: Tokenizer,
        mesh: Mesh | None = None,
    ):
        parallel.check_rows(mesh, config.batch_size)
        sizes = config.schedule, config.sequence_length, config.batch_size
        learns = config.objective.index if config.optimizer.train_indexer else 0.0
        check_stages(*sizes, index_weight=learns, devices=1 if mesh is None else mesh.size)
        self.stages = stages(*sizes)
        self.config, self.rows, self.tokenizer, self.mesh = config, rows, tokenizer, mesh
        self._counts = token_counts
        self._abstract = nnx.eval_shape(self._model)
        self.program = Program.of(self._abstract)
        self.params = split_model(self._abstract)[0]
        self._aside = concurrent.futures.ThreadPoolExecutor(1, "compile")
        self._steps: dict[Variant, concurrent.futures.Future] = {}
        self._shapes = functools.cache(self._make_shapes)
        self._new = functools.cache(self._make_new)
        self._look = functools.cache(self._make_look)
        self._work = functools.cache(self._work_of)
        self.probe = functools.cache(self._make_probe)

    def run_config(self, quantization: Quantization, parent: str = "", step: int = 0) -> RunConfig:
        """The configuration of a run: of an arm, that branches off the run with hash `parent` at
        `step`, or of one that begins.

        What only concerns arms in FP4 is at its default in others, so that they may be shared.
        """
        config = dataclasses.replace(self.config, quantization=quantization)
        if not quantization.rules:
            plain = dataclasses.replace(config.objective, distill=0.0)
            config = dataclasses.replace(config, objective=plain, remedies=RemedyConfig())
        return dataclasses.replace(config, parent=f"{parent}@{step}") if parent else config

    # ---- the state ----

    def _model(self) -> Transformer:
        return Transformer(
            self.config.model,
            rngs=nnx.Rngs(self.config.seed),
            dtype=jnp.dtype(self.config.compute_dtype),
            token_counts=self._counts,
            hash_seed=self.config.seed,
        )

    def optimizer(self, only_indexer: bool = False):
        """The runs' optimizer; `only_indexer` as in the indexer's warm-up."""
        config, schedule = self.config, self.config.schedule
        return build_optimizer(
            self.params,
            config.model,
            config.optimizer,
            functools.partial(learning_rate_scale, schedule),
            only_indexer=only_indexer,
            index_start=schedule.resolve("index_start"),
        )

    def _initial_state(self, config: RunConfig) -> TrainState:
        params, variables = split_model(self._model())
        optimizer_state, memory = self.optimizer().init(params), _memory(config, params)
        return TrainState(jnp.zeros((), jnp.int32), params, variables, optimizer_state, memory)

    def initial_state(self, config: RunConfig | None = None) -> TrainState:
        """Step 0, from the config's seed. config: of the run; default: as `self.config`."""
        return self._new(self._or(config))()

    def _make_new(self, config: RunConfig):
        start = functools.partial(self._initial_state, config)
        return self._jit(start, out_shardings=self.shardings(config))

    _jit = staticmethod(jax.jit)

    def new_memory(self, config: RunConfig, params: Any) -> dict[str, Any]:
        """`TrainState.memory` of a run that begins with `params`."""
        shardings = self.shardings(config)
        out = None if shardings is None else shardings.memory
        return self._jit(functools.partial(_memory, config), out_shardings=out)(params)

    def _or(self, config: RunConfig | None) -> RunConfig:
        return self.run_config(self.config.quantization) if config is None else config

    def _make_shapes(self, config: RunConfig) -> TrainState:
        return jax.eval_shape(functools.partial(self._initial_state, config))

    def shardings(self, config: RunConfig | None = None) -> TrainState | None:
        """Of the state on the mesh; None without one."""
        if self.mesh is None:
            return None
        parameters = nnx.state(self._abstract, nnx.Param)
        found = parallel.spread(self._shapes(self._or(config)), parameters, self.mesh)
        if "routes" in found.memory:  # its tokens lie as those of a batch
            tokens = PartitionSpec(None, None, parallel.ROWS)
            found.memory["routes"] = NamedSharding(self.mesh, tokens)
        return found

    def abstract_state(self, config: RunConfig | None = None) -> TrainState:
        """Shapes, dtypes and, on a mesh, shardings of the state of a run with `config`."""
        shapes, shardings = self._shapes(self._or(config)), self.shardings(config)
        if shardings is None:
            return shapes
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            shardings,
        )

    # ---- the data ----

    def stage(self, step: int) -> Stage:
        """The stage of update `step` + 1."""
        return stage_of(self.stages, step)

    def rows_before(self, step: int) -> int:
        """Rows of data that the updates before `step` take, where none are skipped."""
        return rows_before(self.config.schedule, self.config.batch_size, step)

    def batch(self, step: int, skipped: int = 0) -> Batch:
        """The batch of update `step` + 1, where the training step wants it, after `skipped` rows of
        data that no update took."""
        stage = self.stage(step)
        batch = self.rows(self.rows_before(step) + skipped, stage.rows)
        return parallel.place_rows(cut(batch, stage.length), self.mesh)

    def work(self, step: int) -> StepWork:
        """What update `step` amounts to, on all devices."""
        return self._work(self.stage(step - 1))

    def _work_of(self, stage: Stage) -> StepWork:
        config = self.config
        tokens = stage.rows * config.sequence_length
        flops = training_flops(config.model, stage.length)
        return StepWork(tokens, tokens * flops, peak_flops(config.compute_dtype))

    def table(self, qat_start: int | None = None) -> str:
        """What the run does when; qat_start: updates before QAT."""
        config = self.config
        return stage_table(
            config.schedule,
            config.optimizer,
            config.sequence_length,
            config.batch_size,
            qat_start=qat_start,
        )

    # ---- the programs ----

    def _over_mesh(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _lowered(self, variant: Variant) -> jax.stages.Lowered:
        config = self.run_config(variant.quantization)
        stage = next(stage for stage in self.stages if stage.program == variant.stage)
        step = make_train_step(
            self.program,
            self.optimizer(stage.only_indexer),
            config,
            only_indexer=stage.only_indexer,
            routed=variant.routed,
            shardings=self.shardings(config),
        )
        shape = stage.shape(config.sequence_length)
        over = None if self.mesh is None else parallel.rows_sharding(self.mesh)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=over)  # segment_ids alike
        state = self.abstract_state(config)
        arguments = (state, tokens, tokens)
        with self._over_mesh():
            if config.objective.distill:
                return step.lower(*arguments, Parent(state.params, state.variables))
            return step.lower(*arguments)

    def _compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        return lowered.compile()

    def start_compiling(self, variant: Variant) -> None:
        """Traces the step of `compiled(variant)` and compiles it in a thread, if not done yet."""
        if variant not in self._steps:
            lowered = self._lowered(variant)
            self._steps[variant] = self._aside.submit(self._compile, lowered)

    def compiled(self, variant: Variant) -> jax.stages.Compiled:
        """A compiled training step of `make_train_step`."""
        self.start_compiling(variant)
        return self._steps[variant].result()

    def step(self, quantization: Quantization) -> jax.stages.Compiled:
        """The compiled training step of the last stage, which most of a run is."""
        return self.compiled(Variant(quantization, self.stages[-1].program))

    def _make_look(self, quantization: Quantization):
        config = self.run_config(quantization)
        shardings = self.shardings(config)
        out = None if shardings is None else shardings.memory["routes"]
        return self._jit(make_look_ahead(self.program, config), donate_argnums=0, out_shardings=out)

    def _make_probe(self, quantization: Quantization):
        """`gradient_health.make_probe`'s function of (params, memory of remedies, step, variables,
        tokens, segment_ids), of the loss without a parent."""
        config = self.run_config(quantization)
        loss = make_loss(self.program, config)

        def of_weights(params, variables, tokens, segment_ids, step):
            return loss(params, variables, tokens, segment_ids, step)[0]

        made = make_probe(of_weights, quantization, config.remedies, config.seed, self._jit)

        def over_mesh(*arguments):
            with self._over_mesh():
                return made(*arguments)

        return over_mesh

    def look_ahead(
        self, state: TrainState, quantization: Quantization, step: int, skipped: int
    ) -> TrainState:
        """The state that knows the experts of the batch of update `step` + 1, by its parameters.

        skipped: as in `batch`.
        """
        memory = dict(state.memory)
        ring = memory.pop("routes")
        rest, batch = state._replace(memory=memory), self.batch(step, skipped)
        with self._over_mesh():
            ring = self._look(quantization)(ring, rest, np.int32(step), *batch)
        return state._replace(memory=memory | {"routes": ring})


def _memory(config: RunConfig, params: Any) -> dict[str, Any]:
    memory: dict[str, Any] = {}
    if config.stability.skip_sigma:
        memory["recent"] = stability.no_steps()
    if config.stability.anticipates:
        tokens = config.batch_size * config.sequence_length
        memory["routes"] = anticipation.ring(config.model, config.stability.delay_steps, tokens)
    if known := remedies.start(config.remedies, params, resolve(config.quantization, params)):
        memory["remedies"] = known
    return memory

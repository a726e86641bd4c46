"""What the runs of one experiment share: their configuration, and the programs compiled for it."""

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from v4jax import config as model_config
from v4jax import parallel
from v4jax.config import ModelConfig
from v4jax.model import Transformer
from v4jax.quantization import NO_QUANTIZATION, Quantization
from v4jax.training.data import Batch
from v4jax.training.flops import peak_flops, training_flops
from v4jax.training.observe import StepWork
from v4jax.training.optimizer import OptimizerConfig, build_optimizer
from v4jax.training.run_config import config_hash
from v4jax.training.schedule import ScheduleConfig, learning_rate_scale
from v4jax.training.step import Objective, Program, TrainState, make_train_step, split_model
from v4jax.training.tokenizer import Tokenizer

COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run's numbers, on one machine.

    data: hash of the tokenized training documents. parent: "<config hash>@<step>" of the run that
    this one branches off, or "".
    """

    model: ModelConfig
    schedule: ScheduleConfig
    optimizer: OptimizerConfig
    objective: Objective
    sequence_length: int
    batch_size: int
    seed: int
    data: str
    compute_dtype: str = "float32"
    quantization: Quantization = NO_QUANTIZATION
    parent: str = ""

    def __post_init__(self):
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"RunConfig.compute_dtype: got {self.compute_dtype!r}, allowed: "
                + " | ".join(COMPUTE_DTYPES)
            )
        if self.optimizer.train_indexer and not self.objective.index:
            raise ValueError(
                "RunConfig.optimizer.train_indexer: got True, allowed: False, as objective.index "
                "is 0: without a gradient the indexer would only decay"
            )
        mtp = self.schedule.mtp_weight or self.schedule.mtp_weight_decayed
        if self.optimizer.train_mtp and self.model.num_nextn_predict_layers and not mtp:
            raise ValueError(
                "RunConfig.optimizer.train_mtp: got True, allowed: False, as MTP weights are 0: "
                "without a gradient the module would only decay"
            )

    def to_dict(self) -> dict:
        """A JSON-able dict that `from_dict` turns back into an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> "RunConfig":
        """Inverse of `to_dict`, also after JSON."""
        rules = tuple(tuple(rule) for rule in fields["quantization"]["rules"])
        return cls(
            **fields
            | {
                "model": model_config.from_dict(fields["model"]),
                "schedule": ScheduleConfig(**fields["schedule"]),
                "optimizer": OptimizerConfig(**fields["optimizer"]),
                "objective": Objective(**fields["objective"]),
                "quantization": Quantization(rules),
            }
        )

    @property
    def hash(self) -> str:
        """12 hex digits."""
        return config_hash(self.to_dict())


class Trainer:
    """What the runs of one experiment share: model, optimizer, data and compiled steps.

    config: the configuration of the runs, but for quantization and parent. batches: the training
    batches, of which this process has its share (`parallel.share`). token_counts: [V], for the hash
    layers. tokenizer: saved with each run. mesh: the devices, None: one. shardings: of the state on
    the mesh.

    Raises ValueError, one line, where batch or parameters do not divide over the mesh.
    """

    def __init__(
        self,
        config: RunConfig,
        batches: Callable[[int], Batch],
        token_counts: np.ndarray,
        tokenizer: Tokenizer,
        mesh: Mesh | None = None,
    ):
        parallel.check_rows(mesh, config.batch_size)
        self.config, self.batches, self.tokenizer, self.mesh = config, batches, tokenizer, mesh
        self._counts = token_counts
        model = nnx.eval_shape(self._model)
        self.program = Program.of(model)
        self.params = split_model(model)[0]
        self.optimizer = build_optimizer(
            self.params,
            config.model,
            config.optimizer,
            functools.partial(learning_rate_scale, config.schedule),
        )
        self.shardings: TrainState | None = None
        if mesh is not None:
            parameters = nnx.state(model, nnx.Param)
            self.shardings = parallel.spread(self._shapes, parameters, mesh)
        self._new = jax.jit(self._initial_state, out_shardings=self.shardings)
        self._aside = concurrent.futures.ThreadPoolExecutor(1, "compile")
        self._steps: dict[Quantization, concurrent.futures.Future] = {}

    def arm_config(self, quantization: Quantization, parent: str, step: int) -> RunConfig:
        """The configuration of an arm that branches off the run with hash `parent` at `step`."""
        return dataclasses.replace(
            self.config, quantization=quantization, parent=f"{parent}@{step}"
        )

    def _model(self) -> Transformer:
        return Transformer(
            self.config.model,
            rngs=nnx.Rngs(self.config.seed),
            dtype=jnp.dtype(self.config.compute_dtype),
            token_counts=self._counts,
            hash_seed=self.config.seed,
        )

    def _initial_state(self) -> TrainState:
        params, variables = split_model(self._model())
        return TrainState(jnp.zeros((), jnp.int32), params, variables, self.optimizer.init(params))

    def initial_state(self) -> TrainState:
        """Step 0, from the config's seed."""
        return self._new()

    @functools.cached_property
    def _shapes(self) -> TrainState:
        return jax.eval_shape(self._initial_state)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and, on a mesh, shardings of the state."""
        if self.shardings is None:
            return self._shapes
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            self._shapes,
            self.shardings,
        )

    @functools.cached_property
    def work(self) -> StepWork:
        """What a training step amounts to, on all devices."""
        config = self.config
        tokens = config.batch_size * config.sequence_length
        flops = training_flops(config.model, config.sequence_length)
        return StepWork(tokens, tokens * flops, peak_flops(config.compute_dtype))

    def batch(self, step: int) -> Batch:
        """Global batch `step` (>= 0), where the training step wants it."""
        return parallel.place_rows(self.batches(step), self.mesh)

    def _lowered(self, quantization: Quantization) -> jax.stages.Lowered:
        step = make_train_step(
            self.program,
            self.optimizer,
            self.config.schedule,
            self.config.objective,
            quantization,
            self.shardings,
        )
        shape = (self.config.batch_size, self.config.sequence_length + 1)
        over = None if self.mesh is None else parallel.rows_sharding(self.mesh)
        rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=over)  # tokens, segment_ids alike
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return step.lower(self.abstract_state(), rows, rows)

    def _compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        return lowered.compile()

    def start_compiling(self, quantization: Quantization) -> None:
        """Traces the step of `step(quantization)` and compiles it in a thread, if not done yet."""
        if quantization not in self._steps:
            lowered = self._lowered(quantization)
            self._steps[quantization] = self._aside.submit(self._compile, lowered)

    def step(self, quantization: Quantization) -> jax.stages.Compiled:
        """The compiled training step of `make_train_step`."""
        self.start_compiling(quantization)
        return self._steps[quantization].result()

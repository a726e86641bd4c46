"""A run: one folder, one configuration, trained from a start to a step, resumable at any instant.

    <run>/config.json      everything that determines its numbers
    <run>/machine.json     device, versions and date of its last start
    <run>/tokenizer.json   the tokenizer it was trained with
    <run>/metrics.jsonl    one line a logged step; <run>/tensorboard repeats it
    <run>/checkpoints/N    the state after N steps

The same command on the same folder goes on from the newest whole checkpoint, bit for bit. A run
may branch off another: it then starts from that run's checkpoint, optimizer and data position.

A run may be of several devices and of several processes (`v4jax.parallel`, `v4jax.distributed`):
all of them call the same functions, the first one writes. What the mesh is does not belong to the
configuration: the numbers differ only as far as the order of float sums goes, so a run may go on
on another one.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from v4jax import config as model_config
from v4jax import distributed, parallel
from v4jax.config import ModelConfig
from v4jax.model import Transformer
from v4jax.quantization import NO_QUANTIZATION, Quantization, lossless_share
from v4jax.training import whereabouts
from v4jax.training.checkpoint import Checkpointer, DamagedError
from v4jax.training.data import Batch
from v4jax.training.files import as_path
from v4jax.training.flops import peak_flops, training_flops
from v4jax.training.machine import write_environment
from v4jax.training.metrics import read_metrics
from v4jax.training.observe import (
    Observer,
    Pace,
    StepWork,
    memory_note,
    name_programs,
    quantization_note,
)
from v4jax.training.optimizer import OptimizerConfig, build_optimizer
from v4jax.training.run_config import (
    canonical,
    check_config,
    config_hash,
    read_config,
    write_config,
    write_source,
)
from v4jax.training.schedule import ScheduleConfig, learning_rate_scale
from v4jax.training.spikes import SpikeWatch
from v4jax.training.step import Objective, Program, TrainState, make_train_step, split_model
from v4jax.training.tokenizer import Tokenizer
from v4jax.training.trackers import open_trackers
from v4jax.training.weight_health import Watch

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


class Branch(NamedTuple):
    """Where a run starts: the checkpoint `step` of the run in `folder`."""

    folder: pathlib.Path
    step: int


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


DEFAULT_PACE = Pace()


def train(
    trainer: Trainer,
    folder: pathlib.Path,
    *,
    stop: int,
    quantization: Quantization = NO_QUANTIZATION,
    branch: Branch | None = None,
    pace: Pace = DEFAULT_PACE,
) -> TrainState:
    """Trains the run in `folder` up to `stop` updates and returns its state; resumes what is there.

    Raises ValueError, one line, where the folder holds another configuration; FloatingPointError
    where the loss is no longer finite; `distributed.Preempted`, with everything saved, after a
    SIGTERM. Several processes train together, on a folder that all of them see.
    """
    config = dataclasses.replace(trainer.config, quantization=quantization)
    if branch is not None:
        config = trainer.arm_config(quantization, read_run_config(branch.folder).hash, branch.step)
    name_programs(pace)
    known = check_config(folder, config.to_dict())
    distributed.barrier("configuration read")
    if not known and distributed.is_main():
        trainer.tokenizer.save(folder)
        write_source(folder)
        write_config(folder, config.to_dict())
    whereabouts.now(f"{folder.name}, before its first step: makes or reads the state, compiles")
    checkpointer = Checkpointer(
        folder / "checkpoints", max_to_keep=pace.max_to_keep, keep=pace.keep
    )
    with checkpointer:
        if max([*checkpointer.steps(), branch.step if branch else 0]) < stop:
            trainer.start_compiling(quantization)  # while the state is made or read
        state, first, meta = _state_to_go_on_from(trainer, checkpointer, config, branch)
        if first > stop:
            raise ValueError(f"{folder} is at step {first} already, past step {stop}")
        if first == stop:
            return state
        if quantization.rules and distributed.is_main():
            print(quantization_note(quantization, trainer.params), flush=True)
        update, start = trainer.step(quantization), branch.step if branch else 0
        lossless = lossless_share(quantization, trainer.params)
        watch = Watch(quantization, trainer.params)
        spikes = SpikeWatch(meta.get("spikes"))
        main = distributed.is_main()
        trackers = open_trackers(pace.trackers, folder, config.to_dict()) if main else ()
        if main:
            write_environment(folder)
            print(memory_note(folder.name, update), flush=True)
        distributed.meet(f"{folder.name} compiled")
        steps = range(first + 1, stop + 1)
        with Observer(folder, steps, trainer.work, pace.profile, trackers) as observer:
            for step in observer.steps():
                logs = step % pace.log_every == 0 or step in (start + 1, stop)
                before = watch.keep(state.params) if watch and logs else {}
                state, metrics = update(state, *trainer.batch(step - 1))
                observer.saw(step, metrics)
                preempted = distributed.preempted()
                ends = preempted or step == stop
                saves = step % pace.save_every == 0 or ends or step in pace.keep
                spike = spikes.saw(step, metrics["loss"], wait=saves)
                if spike:
                    distributed.say(f"{folder.name}: {spike}")
                    metrics |= {"spike_onset": spike.onset, "spike_z": spike.z}
                logs = logs or spike is not None
                if logs or saves:
                    require_finite(metrics, f"{folder.name}, step {step}")
                if logs:
                    if lossless is not None:
                        metrics["fp8_lossless_share"] = lossless(state.params)
                    if before:
                        metrics |= watch.measure(before, state.params)
                    observer.log(step, metrics)
                if saves:
                    observer.settle()
                    meta = {"config": config.to_dict(), "spikes": spikes.state}
                    checkpointer.save(step, state, meta, wait=ends)
                if preempted:
                    raise distributed.Preempted(
                        f"{folder}: SIGTERM, saved at step {step}; the same command goes on"
                    )
    return state


def require_finite(metrics: Mapping[str, jax.Array], where: str) -> None:
    """Raises FloatingPointError where the loss or the gradient that was just applied is not finite.

    Before anything is saved: a restart would go on from what is lost.
    """
    for name in ("loss", "grad_norm"):
        if not np.isfinite(value := float(metrics[name])):
            raise FloatingPointError(f"{where}: {name} is {value}")


def _state_to_go_on_from(
    trainer: Trainer, checkpointer: Checkpointer, config: RunConfig, branch: Branch | None
) -> tuple[TrainState, int, dict[str, Any]]:
    """The run's newest whole checkpoint, else the branch's, else step 0; its step and its meta."""
    try:
        restored = checkpointer.restore(trainer.abstract_state())
    except DamagedError as error:  # the bits come out the same, only later
        print(f"{error}; training the run again from its start", file=sys.stderr, flush=True)
        restored = None
    if restored is not None and restored.meta["config"] != json.loads(canonical(config.to_dict())):
        raise ValueError(f"{checkpointer.folder}/{restored.step} is of another configuration")
    if restored is None and branch is not None:
        with Checkpointer(branch.folder / "checkpoints") as parent:
            restored = parent.restore(trainer.abstract_state(), branch.step)
    step = 0 if restored is None else restored.step
    distributed.agree(step, f"{checkpointer.folder}: the newest step")
    if restored is None:
        return trainer.initial_state(), 0, {}
    return restored.state, restored.step, restored.meta


def read_run_config(folder: str | pathlib.Path) -> RunConfig:
    """The configuration of the run in `folder`. Raises ValueError if there is none."""
    stored = read_config(folder)
    if stored is None:
        raise ValueError(f"{folder} holds no run: there is no config.json")
    return RunConfig.from_dict(stored)


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run. `model` holds the float32 masters and quantizes nothing: for what a QAT run
    computes, `v4jax.quantization.quantized(run.model, run.config.quantization)`."""

    config: RunConfig
    model: Transformer
    tokenizer: Tokenizer
    metrics: list[dict[str, Any]]
    step: int


def _no_batches(step: int) -> Batch:
    raise ValueError(f"a loaded run has no data; batch {step} was asked for")


def load_run(folder: str | pathlib.Path, step: int | None = None) -> Run:
    """Loads a run at `step`, by default its newest whole checkpoint.

    Raises ValueError, one line, where there is no run, no checkpoint, or a damaged one was named.
    """
    folder = as_path(folder)
    config = read_run_config(folder)
    tokenizer = Tokenizer.load(folder)
    trainer = Trainer(config, _no_batches, np.ones(config.model.vocab_size), tokenizer)
    with Checkpointer(folder / "checkpoints") as checkpointer:
        restored = checkpointer.restore(trainer.abstract_state(), step)
    if restored is None:
        raise ValueError(f"{folder} holds no checkpoint yet")
    model = trainer.program.bind(restored.state.params, restored.state.variables)
    return Run(config, model, tokenizer, read_metrics(folder), restored.step)

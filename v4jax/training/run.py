"""A run: one folder, one configuration, trained from a start to a step, resumable at any instant.

    <run>/config.json      everything that determines its numbers
    <run>/machine.json     device, versions and date of its last start
    <run>/tokenizer.json   the tokenizer it was trained with
    <run>/metrics.jsonl    one line a logged step; <run>/tensorboard repeats it
    <run>/events.jsonl     spikes, steps left out, returns to a checkpoint, and what followed
    <run>/checkpoints/N    the state after N steps

The same command on the same folder goes on from the newest whole checkpoint, bit for bit. A run
may branch off another: it then starts from that run's checkpoint, optimizer and data position.

A run may be of several devices and of several processes (`v4jax.parallel`, `v4jax.distributed`):
all of them call the same functions, the first one writes. What the mesh is does not belong to the
configuration: the numbers differ only as far as the order of float sums goes, so a run may go on
on another one.
"""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from v4jax import distributed
from v4jax.model import Transformer
from v4jax.quantization import NO_QUANTIZATION, Quantization, lossless_share
from v4jax.training import weight_health, whereabouts
from v4jax.training.anticipation import Clock
from v4jax.training.checkpoint import Checkpointer, DamagedError, Restored
from v4jax.training.data import Batch
from v4jax.training.files import as_path
from v4jax.training.journal import Journal, of_events, set_aside
from v4jax.training.machine import write_environment
from v4jax.training.metrics import read_metrics
from v4jax.training.observe import (
    Observer,
    Pace,
    memory_note,
    name_programs,
    quantization_note,
)
from v4jax.training.recovery import Return, Ruin, Watch
from v4jax.training.run_config import (
    canonical,
    check_config,
    read_config,
    write_config,
    write_source,
)
from v4jax.training.settings import RunConfig
from v4jax.training.stability import StabilityConfig
from v4jax.training.step import Parent, TrainState
from v4jax.training.tokenizer import Tokenizer
from v4jax.training.trackers import open_trackers
from v4jax.training.trainer import Trainer, Variant


class Branch(NamedTuple):
    """Where a run starts: the checkpoint `step` of the run in `folder`."""

    folder: pathlib.Path
    step: int


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
    where losses stay not finite, as `StabilityConfig` says; `distributed.Preempted`, with all
    saved, after a SIGTERM. Several processes train together, on a folder that all of them see.
    """
    config = trainer.run_config(quantization)
    if branch is not None:
        parent = read_run_config(branch.folder)
        config = trainer.run_config(quantization, parent.hash, branch.step)
    if config.objective.distill and branch is None:
        raise ValueError("Objective.distill: the run has no parent; allowed: 0")
    name_programs(pace)
    known = check_config(folder, config.to_dict())
    distributed.barrier("configuration read")
    if not known and (quantization.rules or branch is None):
        start = branch.step if branch else 0
        table = trainer.table(start if quantization.rules else None)
        distributed.say(f"{folder.name}, to step {stop}:\n{table}")
    if not known and distributed.is_main():
        trainer.tokenizer.save(folder)
        write_source(folder)
        write_config(folder, config.to_dict())
    whereabouts.now(f"{folder.name}, before its first step: makes or reads the state, compiles")
    checkpointer = Checkpointer(
        folder / "checkpoints",
        max_to_keep=max(pace.max_to_keep, checkpoints_needed(config.stability, pace.save_every)),
        keep=pace.keep,
    )
    with checkpointer:
        run = _Run(trainer, folder, config, branch, stop, pace, checkpointer)
        return run.to_its_end()


def checkpoints_needed(stability: StabilityConfig, save_every: int) -> int:
    """How many checkpoints hold one before the onset of any spike; one more is of a SIGTERM."""
    longest = max(stability.max_nonfinite, stability.spikes.lookback) + 1
    return -(-longest // save_every) + 2


@dataclasses.dataclass(frozen=True)
class _Run:
    trainer: Trainer
    folder: pathlib.Path
    config: RunConfig
    branch: Branch | None
    stop: int
    pace: Pace
    checkpointer: Checkpointer

    @property
    def start(self) -> int:
        return self.branch.step if self.branch else 0

    @functools.cached_property
    def weights(self) -> weight_health.Watch:
        """Kept over returns to a checkpoint, as it compiles; `lossless` alike."""
        return weight_health.Watch(self.config.quantization, self.trainer.params)

    @functools.cached_property
    def lossless(self) -> Callable[[Any], jax.Array] | None:
        return lossless_share(self.config.quantization, self.trainer.params)

    def to_its_end(self) -> TrainState:
        trainer, quantization = self.trainer, self.config.quantization
        saved = max([*self.checkpointer.steps(), self.start])
        if saved < self.stop:  # while the state is made or read
            for stage in trainer.stages:
                if saved < stage.last and stage.first < self.stop:
                    trainer.start_compiling(Variant(quantization, stage.program))
        state, first, watch = self._state_to_go_on_from()
        if first > self.stop:
            raise ValueError(f"{self.folder} is at step {first} already, past step {self.stop}")
        if first == self.stop:
            return state
        parent = self._parent()
        if distributed.is_main():
            write_environment(self.folder)
            if quantization.rules:
                print(quantization_note(quantization, trainer.params), flush=True)
            step = trainer.compiled(Variant(quantization, trainer.stage(first).program))
            print(memory_note(self.folder.name, step), flush=True)
        distributed.meet(f"{self.folder.name} compiled")
        while True:
            state, order = self._steps(state, first, watch, parent)
            if order is None:
                return state
            state, first, watch = self._back(order, watch)

    def _steps(
        self, state: TrainState, first: int, watch: Watch, parent: tuple[Parent, ...]
    ) -> tuple[TrainState, Return | None]:
        """Trains from step `first` to the end, or to where the run is to go back."""
        trainer, pace, name = self.trainer, self.pace, self.folder.name
        quantization, stability = self.config.quantization, self.config.stability
        weights, lossless = self.weights, self.lossless
        main = distributed.is_main()
        trackers = open_trackers(pace.trackers, self.folder, self.config.to_dict()) if main else ()
        journal, clock = Journal(self.folder, watch.recovery), Clock()
        steps = range(first + 1, self.stop + 1)
        with Observer(self.folder, steps, trainer.work, pace.profile, trackers) as observer:
            for step in observer.steps():
                now, recovery = step - 1, watch.recovery
                lag = recovery.lag(stability, now)
                for ahead in recovery.ahead(stability, now):
                    skipped = recovery.skipped(ahead)
                    state = trainer.look_ahead(state, quantization, ahead, skipped)
                logs = step % pace.log_every == 0 or step in (self.start + 1, self.stop)
                before = weights.keep(state.params) if weights and logs else {}
                program = trainer.stage(now).program
                update = trainer.compiled(Variant(quantization, program, routed=lag is not None))
                batch = trainer.batch(now, recovery.skipped(now))
                probes = pace.probe_every and step % pace.probe_every == 0
                probed = self._probed(state, batch) if probes else {}
                state, metrics = update(state, *batch, *parent)
                observer.saw(step, metrics)
                clock.saw(lag is not None)
                preempted = distributed.preempted()
                known = len(recovery.events)
                order = watch.saw(step, metrics)
                if step == self.stop and order is None:
                    order = watch.last()
                ends = preempted or step == self.stop or order is not None
                saves = step % pace.save_every == 0 or ends or step in pace.keep
                meta = {"config": self.config.to_dict(), "watch": watch.keep()} if saves else {}
                happened = of_events(watch.recovery.events[known:])
                if logs or ends or probed or happened:
                    metrics |= probed | happened
                    if lag is not None:
                        metrics["routing_lag"] = lag
                    if lossless is not None:
                        metrics["fp8_lossless_share"] = lossless(state.params)
                    if before:
                        metrics |= weights.measure(before, state.params)
                    observer.log(step, metrics)
                journal.tell(watch.recovery)
                if isinstance(order, Ruin):
                    raise FloatingPointError(f"{name}: {order.why}; {self._newest()} is good")
                if isinstance(order, Return):
                    return state, order
                if saves:
                    observer.settle()
                    self.checkpointer.save(step, state, meta, wait=ends)
                if preempted:
                    raise distributed.Preempted(
                        f"{self.folder}: SIGTERM, saved at step {step}; the same command goes on"
                    )
        if line := clock.line():
            distributed.say(f"{name}: {line}")
        return state, None

    def _probed(self, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        """The health of the gradients that the next update follows."""
        probe = self.trainer.probe(self.config.quantization)
        memory = state.memory.get("remedies", {})
        return probe(state.params, memory, state.step, state.variables, *batch, state.step)

    def _newest(self) -> str:
        self.checkpointer.wait()
        steps = self.checkpointer.steps()
        return f"checkpoint {steps[-1]}" if steps else "no checkpoint was made yet; the start"

    def _back(self, order: Return, watch: Watch) -> tuple[TrainState, int, Watch]:
        """Carries out `order`: the state, its step, and what is remembered there.

        Later checkpoints go, the newest first: a run that is killed meanwhile comes here again.
        """
        self.checkpointer.wait()
        regular = (s for s in self.checkpointer.steps() if self._is_regular(s))
        before = [step for step in regular if step < order.before]
        if distributed.is_main():
            for step in reversed(self.checkpointer.steps()):
                if step > max([*before, self.start]):
                    self.checkpointer.remove(step)
        distributed.barrier(f"back before step {order.before}")
        state, first, there = self._state_to_go_on_from()
        rows = self.trainer.rows_before(order.step) - self.trainer.rows_before(first)
        recovery = watch.recovery.back(self.config.stability, order, there.recovery, first, rows)
        if distributed.is_main():
            set_aside(self.folder, first, recovery.rollbacks)
        return state, first, Watch(self.config.stability, recovery)

    def _is_regular(self, step: int) -> bool:
        return step % self.pace.save_every == 0 or step in self.pace.keep

    def _state_to_go_on_from(self) -> tuple[TrainState, int, Watch]:
        """The run's newest whole checkpoint, else the branch's, else step 0; its step and watch."""
        trainer, config, checkpointer = self.trainer, self.config, self.checkpointer
        abstract = trainer.abstract_state(config)
        try:
            restored = checkpointer.restore(abstract)
        except DamagedError as error:  # the bits come out the same, only later
            print(f"{error}; training the run again from its start", file=sys.stderr, flush=True)
            restored = None
        wanted = json.loads(canonical(config.to_dict()))
        if restored is not None and restored.meta["config"] != wanted:
            raise ValueError(f"{checkpointer.folder}/{restored.step} is of another configuration")
        if restored is None and self.branch is not None:
            restored = self._branched()
        step = 0 if restored is None else restored.step
        distributed.agree(step, f"{checkpointer.folder}: the newest step")
        if restored is None:
            state = trainer.initial_state(config)
            return state, 0, Watch.resumed(config.stability, None)
        watch = Watch.resumed(config.stability, restored.meta.get("watch"))
        return restored.state, restored.step, watch

    def _branched(self) -> Restored:
        """The branch's checkpoint; what it remembers for no option of its own begins anew."""
        assert self.branch is not None
        with Checkpointer(self.branch.folder / "checkpoints") as parent:
            theirs = read_run_config(self.branch.folder)
            restored = parent.restore(self.trainer.abstract_state(theirs), self.branch.step)
        assert restored is not None
        state = restored.state
        fresh = self.trainer.new_memory(self.config, state.params)
        same = {
            name: value
            for name, value in state.memory.items()
            if name in fresh and _shapes(value) == _shapes(fresh[name])
        }
        return dataclasses.replace(restored, state=state._replace(memory=fresh | same))

    def _parent(self) -> tuple[Parent, ...]:
        """What an arm learns from: the masters that it began with."""
        if not self.config.objective.distill:
            return ()
        state = self._branched().state
        return (Parent(state.params, state.variables),)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


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


def _no_rows(first: int, count: int) -> Batch:
    raise ValueError(f"a loaded run has no data; {count} rows from {first} on were asked for")


def load_run(folder: str | pathlib.Path, step: int | None = None) -> Run:
    """Loads a run at `step`, by default its newest whole checkpoint.

    Raises ValueError, one line, where there is no run, no checkpoint, or a damaged one was named.
    """
    folder = as_path(folder)
    config = read_run_config(folder)
    tokenizer = Tokenizer.load(folder)
    trainer = Trainer(config, _no_rows, np.ones(config.model.vocab_size), tokenizer)
    with Checkpointer(folder / "checkpoints") as checkpointer:
        restored = checkpointer.restore(trainer.abstract_state(), step)
    if restored is None:
        raise ValueError(f"{folder} holds no checkpoint yet")
    model = trainer.program.bind(restored.state.params, restored.state.variables)
    return Run(config, model, tokenizer, read_metrics(folder), restored.step)

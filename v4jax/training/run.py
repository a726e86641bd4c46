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

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from v4jax import distributed
from v4jax.model import Transformer
from v4jax.quantization import NO_QUANTIZATION, Quantization, lossless_share
from v4jax.training import whereabouts
from v4jax.training.checkpoint import Checkpointer, DamagedError
from v4jax.training.data import Batch
from v4jax.training.files import as_path
from v4jax.training.machine import write_environment
from v4jax.training.metrics import read_metrics
from v4jax.training.observe import (
    Observer,
    Pace,
    memory_note,
    name_programs,
    quantization_note,
)
from v4jax.training.run_config import (
    canonical,
    check_config,
    read_config,
    write_config,
    write_source,
)
from v4jax.training.spikes import SpikeWatch
from v4jax.training.step import TrainState
from v4jax.training.tokenizer import Tokenizer
from v4jax.training.trackers import open_trackers
from v4jax.training.trainer import RunConfig, Trainer
from v4jax.training.weight_health import Watch


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
                spike = spikes.saw(step, metrics["loss"])
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
                    meta = {"config": config.to_dict(), "spikes": spikes.keep()}
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

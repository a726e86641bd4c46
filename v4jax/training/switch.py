"""The switch: arms that go on from one checkpoint, on the same data in the same order.

    pretrain            BF16 up to the switch
    control             BF16 from the switch to the end
    qat, qat_<scope>    FP4 quantization-aware from the switch to the end, one arm a scope
    (ptq                the control's final weights in an arm's forward pass; nothing is trained)

Optimizer state, data position and schedule go on unchanged, so arms differ by the format alone.
"""

import dataclasses
import json
import pathlib
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v4jax import distributed, parallel
from v4jax.quantization import NO_QUANTIZATION, PAPER, Quantization, resolve
from v4jax.training import checkpoint_files
from v4jax.training.checkpoint import Checkpointer
from v4jax.training.files import as_path, in_bucket
from v4jax.training.metrics import MetricsWriter
from v4jax.training.observe import Pace
from v4jax.training.run import Branch, read_run_config, train
from v4jax.training.run_config import check_config, read_config, same_source, write_atomically
from v4jax.training.schedule import phase
from v4jax.training.stages import check_switch, rows_before
from v4jax.training.step import TrainState
from v4jax.training.trainer import Trainer


def arm_name(scope: str) -> str:
    """The folder of a scope's arm: "qat" for the paper's, "qat_<scope>" for others."""
    return "qat" if scope == "paper" else f"qat_{scope}"


@dataclasses.dataclass(frozen=True)
class Arms:
    """Final states. branch: where the arms start. qat, scopes: scope -> final state and formats.
    folders: by run name."""

    branch: Branch
    control: TrainState
    qat: dict[str, TrainState]
    scopes: dict[str, Quantization]
    folders: dict[str, pathlib.Path]

    def on_one_device(self) -> "Arms":
        """The same, with each state whole on the first device of every process: to compare them.

        The comparison knows no mesh: every process makes all of it, and a state must fit a device.
        """
        control, qat = parallel.on_one_device((self.control, self.qat))
        return dataclasses.replace(self, control=control, qat=qat)


def run_arms(
    trainer: Trainer,
    workdir: pathlib.Path,
    *,
    switch_step: int,
    scopes: dict[str, Quantization],
    pace: Pace,
    from_checkpoint: str | None = None,
) -> Arms:
    """Trains, or resumes, every arm below `workdir`: the control and one for each of `scopes`.

    from_checkpoint: "<run folder>[@step]": branch off that run instead of pre-training. Without
    it, the pre-training of a sibling of `workdir` is copied where it is the very same. Raises
    ValueError, one line, where the two do not fit.
    """
    total = trainer.config.schedule.total_steps
    check_switch(trainer.config.schedule, switch_step)
    pace = dataclasses.replace(pace, keep=(switch_step,))
    for quantization in scopes.values():
        resolve(quantization, trainer.params)  # what cannot work ends here, not after pre-training
    if from_checkpoint:
        branch = parse_branch(from_checkpoint)
        check_fit(trainer, branch)
        distributed.say(f"branching off {branch.folder} at step {branch.step}")
    else:
        branch = Branch(workdir / "pretrain", switch_step)
        check_config(branch.folder, trainer.run_config(NO_QUANTIZATION).to_dict())
    check_arms(trainer, workdir, branch, scopes)
    if distributed.is_main():
        write_phases(workdir, trainer, branch, scopes)
    if not from_checkpoint:
        if distributed.is_main():
            shared = shared_pretraining(trainer, workdir, switch_step)
            if shared is not None:
                copy_pretraining(shared, branch.folder)
        distributed.barrier("pre-training copied")
        train(trainer, branch.folder, stop=switch_step, pace=pace)
    control = train(trainer, workdir / "control", stop=total, branch=branch, pace=pace)
    qat = {
        scope: train(
            trainer,
            workdir / arm_name(scope),
            stop=total,
            branch=branch,
            quantization=quantization,
            pace=pace,
        )
        for scope, quantization in scopes.items()
    }
    names = ["control", *map(arm_name, scopes)]
    folders = {"pretrain": branch.folder} | {name: workdir / name for name in names}
    return Arms(branch, control, qat, scopes, folders)


def write_phases(workdir: pathlib.Path, trainer: Trainer, branch: Branch, scopes) -> None:
    """Writes `<workdir>/phases.json`, which says what is to come: [{"name", "first", "last"}, ...],
    a run's folder and the steps that it goes from and to."""
    total = trainer.config.schedule.total_steps
    arms = [("control", branch.step, total)]
    arms += [(arm_name(scope), branch.step, total) for scope in scopes]
    own = [] if branch.folder.parent != workdir else [("pretrain", 0, branch.step)]
    phases = [{"name": name, "first": first, "last": last} for name, first, last in own + arms]
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / "phases.json", json.dumps(phases))


def parse_branch(text: str) -> Branch:
    """ "<run folder>[@step]" -> Branch; without a step, the run's newest checkpoint."""
    folder, at, step = text.rpartition("@")
    if not at or not step.isdecimal():
        folder, step = text, ""
    path = as_path(folder, "--from_checkpoint")
    with Checkpointer(path / "checkpoints") as checkpointer:
        steps = checkpointer.steps()
    if not steps or (step and int(step) not in steps):
        there = ", ".join(map(str, steps)) or "none"
        raise ValueError(f"--from_checkpoint={text}: no such checkpoint; {path} has: {there}")
    return Branch(path, int(step) if step else steps[-1])


def check_fit(trainer: Trainer, branch: Branch) -> None:
    """Raises ValueError, one line naming the fields, where a run cannot branch off another.

    Model, data and what fixes the data position must agree; schedule, optimizer and losses may
    differ: that is what one branches for.
    """
    parent, mine = read_run_config(branch.folder), trainer.config
    names = ("data", "sequence_length", "batch_size", "seed")
    pairs = {name: (getattr(parent, name), getattr(mine, name)) for name in names}
    for field in dataclasses.fields(mine.model):
        pairs[f"model.{field.name}"] = (
            getattr(parent.model, field.name),
            getattr(mine.model, field.name),
        )
    differ = [f"{name} is {a!r} there, {b!r} here" for name, (a, b) in pairs.items() if a != b]
    if differ:
        raise ValueError(f"--from_checkpoint={branch.folder} does not fit: {', '.join(differ)}")
    taken = [rows_before(c.schedule, c.batch_size, branch.step) for c in (parent, mine)]
    if taken[0] != taken[1]:
        raise ValueError(
            f"--from_checkpoint={branch.folder}: --batch_sizes: by step {branch.step} the run "
            f"there has taken {taken[0]} rows of data, this one would have taken {taken[1]}"
        )
    before, after = (dataclasses.astuple(phase(c.schedule, branch.step)) for c in (parent, mine))
    if before != after:
        names = "learning rate (of its peak), MTP weight, dense attention, indexer's loss"
        distributed.say(f"the schedules differ at step {branch.step}: {names}")
        distributed.say(f"  there {[float(x) for x in before]}, here {[float(x) for x in after]}")
    if branch.step >= mine.schedule.total_steps:
        raise ValueError(
            f"--from_checkpoint={branch.folder}@{branch.step}: nothing is left to train, "
            f"the run ends at step {mine.schedule.total_steps}"
        )


def check_arms(
    trainer: Trainer, workdir: pathlib.Path, branch: Branch, scopes: dict[str, Quantization]
) -> None:
    """Raises ValueError, one line, where a folder holds an arm of another branch or configuration.

    Before pre-training goes on, and drops the checkpoint that such an arm branched off.
    """
    config = read_config(branch.folder) and read_run_config(branch.folder)
    parent = (config or trainer.run_config(NO_QUANTIZATION)).hash
    arms = {"control": NO_QUANTIZATION} | {arm_name(s): q for s, q in scopes.items()}
    for name, quantization in arms.items():
        check_config(
            workdir / name, trainer.run_config(quantization, parent, branch.step).to_dict()
        )


def shared_pretraining(trainer: Trainer, workdir: pathlib.Path, step: int) -> Branch | None:
    """The very same pre-training in a folder beside `workdir`, as far as it is of use, or None.

    That is: of an equal configuration, begun by the same code, and its newest checkpoint not past
    `step`, if that is whole. None where the run has begun its own.
    """
    if read_config(workdir / "pretrain") is not None or not workdir.parent.is_dir():
        return None
    best: Branch | None = None
    wanted = trainer.run_config(NO_QUANTIZATION)
    for folder in sorted(workdir.parent.glob("*/pretrain")):
        try:
            if read_run_config(folder).hash != wanted.hash or not same_source(folder):
                continue
            with Checkpointer(folder / "checkpoints") as checkpointer:
                fit = [found for found in checkpointer.steps() if found <= step]
                if fit and (best is None or fit[-1] > best.step):
                    checkpointer.restore(trainer.abstract_state(wanted), fit[-1])
                    best = Branch(folder, fit[-1])
        except (ValueError, TypeError, KeyError):  # another version's, or damaged
            continue
    return best


def copy_pretraining(source: Branch, folder: pathlib.Path) -> None:
    """Makes `folder` the run in `source.folder` as it was at `source.step`, whole or not at all."""
    if _copy_in_bucket(source, folder) if in_bucket(folder) else _copy_on_disk(source, folder):
        what = f"pre-training copied from {source.folder}, {source.step} steps"
        print(f"{what}: same configuration, same code", flush=True)


def _copy_in_bucket(source: Branch, folder: pathlib.Path) -> bool:
    """config.json, which makes it a run, comes last."""
    below: Any = source.folder
    try:
        for name in below.objects():
            if not name.startswith("checkpoints/") and name != "config.json":
                below.joinpath(name).copy_to(folder / name)
        MetricsWriter(folder, source.step).close()  # drops what came after
        checkpoint_files.copy(below / "checkpoints", folder / "checkpoints", source.step)
        below.joinpath("config.json").copy_to(folder / "config.json")
    except FileNotFoundError:  # the sibling trains on, and has dropped it
        return False
    return True


def _copy_on_disk(source: Branch, folder: pathlib.Path) -> bool:
    temporary = folder.with_name("pretrain.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    checkpoint = pathlib.Path("checkpoints", str(source.step))
    try:
        shutil.copytree(source.folder, temporary, ignore=shutil.ignore_patterns("checkpoints"))
        shutil.copytree(source.folder / checkpoint, temporary / checkpoint)
    except (FileNotFoundError, shutil.Error):  # the sibling trains on, and has dropped it
        shutil.rmtree(temporary, ignore_errors=True)
        return False
    MetricsWriter(temporary, source.step).close()  # drops what came after
    temporary.rename(folder)
    return True


def alternate_steps(
    trainer: Trainer, state: TrainState, quantization: Quantization = PAPER, pairs: int = 12
) -> dict:
    """Times a plain and a quantized step in turn, in this process: seconds and their ratio.

    Returns `bf16`, `qat` (medians, s), `ratio` (median of the pairs' ratios) with its quartiles
    `ratio_low`, `ratio_high`, and `pairs`. The state given is not changed.
    """
    updates = {"bf16": trainer.step(NO_QUANTIZATION), "qat": trainer.step(quantization)}
    states = {name: jax.tree.map(_copy, state) for name in updates}
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for i in range(pairs + 1):
        distributed.end_if_preempted("while steps were timed")
        batch = trainer.batch(int(state.step) + i)
        for name, update in updates.items():
            start = time.perf_counter()
            states[name], _ = update(states[name], *batch)
            jax.block_until_ready(states[name])
            seconds[name].append(time.perf_counter() - start)
    bf16, qat = (np.array(seconds[name][1:]) for name in ("bf16", "qat"))  # the first warms up
    low, ratio, high = np.percentile(qat / bf16, [25, 50, 75])
    return {
        "bf16": float(np.median(bf16)),
        "qat": float(np.median(qat)),
        "ratio": float(ratio),
        "ratio_low": float(low),
        "ratio_high": float(high),
        "pairs": pairs,
    }


def _copy(x: jax.Array) -> jax.Array:
    return jax.device_put(jnp.copy(x), x.sharding)

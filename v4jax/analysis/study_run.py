"""What one run of a study measures of its arms, and the files that it leaves for the report."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from v4jax import distributed, parallel
from v4jax.analysis import provenance
from v4jax.analysis.evaluation import Evaluator, per_token
from v4jax.quantization import NO_QUANTIZATION, Quantization
from v4jax.training.files import write_whole
from v4jax.training.machine import environment
from v4jax.training.metrics import read_metrics
from v4jax.training.step import TrainState
from v4jax.training.switch import Arms
from v4jax.training.trainer import Trainer

if TYPE_CHECKING:
    from v4jax.training.recipe import Setup


@dataclasses.dataclass(frozen=True)
class Arm:
    """Weights, and what the forward pass rounds them to. numbers: more to tell of it. dense_index:
    it attends to every visible entry."""

    state: TrainState
    quantization: Quantization = NO_QUANTIZATION
    dense_index: bool = False
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)


def switched(arms: Arms, rounded: Mapping[str, Quantization]) -> dict[str, Arm]:
    """The arms of a switch: control, `ptq <name>` for each of `rounded`, the control's weights
    rounded after training, and `qat <name>` for each that was trained."""
    found = {"control": Arm(arms.control)}
    found |= {f"ptq {name}": Arm(arms.control, q) for name, q in rounded.items()}
    return found | {f"qat {n}": Arm(state, arms.scopes[n]) for n, state in arms.qat.items()}


def finish(
    workdir: pathlib.Path, setup: Setup, trainer: Trainer, arms: Mapping[str, Arm], **what: Any
) -> None:
    """Measures the arms on the held-out windows and writes losses.npz, study.json and result.json.

    trainer: of a program that all arms have. what: more of what the run was, for study.json; a run
    that has no other than its seed may leave it out.
    """
    config, windows = trainer.config, setup.windows
    evaluator = Evaluator(trainer.program, windows, 2 * config.batch_size)
    losses = {}
    for name, arm in arms.items():
        params, variables = arm.state.params, arm.state.variables
        if setup.mesh is not None:
            params, variables = parallel.on_one_device((params, variables))
        losses[name] = evaluator.nll(
            params, variables, arm.quantization, dense_index=arm.dense_index
        )
        distributed.say(f"{name}: {per_token(losses[name], windows):.4f} nats a token, held out")
    if not distributed.is_main():
        return
    steps, size = config.schedule.total_steps, config.sequence_length * config.batch_size
    parameters = provenance.parameters(trainer)
    known = {
        "seed": config.seed,
        "parameters": parameters,
        "steps": steps,
        "tokens": steps * size,
        "tokens_per_parameter": steps * size / parameters,
        "batch_size": config.batch_size,
        "sequence_length": config.sequence_length,
        "learning_rate": config.optimizer.learning_rate,
        "compute_dtype": config.compute_dtype,
        "corpus": setup.corpus.description,
        "tokenizer": setup.tokenizer.name,
        "vocab_size": config.model.vocab_size,
    }
    known |= environment() | {"seconds": time.perf_counter() - setup.began} | what
    known["numbers"] = {name: dict(arm.numbers) for name, arm in arms.items() if arm.numbers}
    kept: dict[str, Any] = {f"arm {name}": nll for name, nll in losses.items()}
    content = io.BytesIO()
    kept |= {"document": windows.document, "tokens": windows.mask.sum(axis=1)}
    np.savez_compressed(content, **kept)
    write_whole(workdir / "losses.npz", content.getvalue())
    write_whole(workdir / "study.json", json.dumps(known, indent=1).encode())
    numbers = {f"{name} loss": per_token(nll, windows) for name, nll in losses.items()}
    write_whole(workdir / "result.json", json.dumps(numbers, indent=1).encode())


def last_metrics(folder: pathlib.Path, prefix: str, names: Sequence[str]) -> dict[str, float]:
    """Of a run's last logged lines that have them: the means over `<prefix>.../<name>`, and over
    what has no "/"."""
    found: dict[str, float] = {}
    for line in read_metrics(folder):
        for name in names:
            keys = [key for key in line if key.startswith(prefix)]
            values = [line[key] for key in keys if key.rpartition("/")[2] == name]
            if values:
                found[name.replace("_", " ")] = float(np.mean(values))
    return found


def speed(folders: Sequence[pathlib.Path]) -> dict[str, float]:
    """`s/step`: the median over the logged steps of a run's parts, without the first of each, which
    compiles; {} where there are no others."""
    rows = [row["seconds_per_step"] for folder in folders for row in read_metrics(folder)[1:]]
    return {"s/step": float(np.median(rows))} if rows else {}

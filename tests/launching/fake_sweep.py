"""Sweeps that nothing ran: a plan, and the files that its runs would have left."""

import dataclasses
import json
import math
import random
from pathlib import Path

from v4jax.launching.plan import make_plan
from v4jax.launching.results import Results, read_results

ERROR = "Traceback (most recent call last):\n  ...\nFloatingPointError: qat, step 31: loss is nan"


def sweep(workdir: Path, settings: list[dict[str, str]], arguments=("--steps=100",)):
    """The plan of a sweep with these settings, written to `workdir`."""
    plan = make_plan("fake", workdir, settings, arguments)
    return dataclasses.replace(plan, fixed=tuple(arguments)).write()


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def finish(run, numbers, state="done", **more) -> None:
    """The launcher's and the experiment's last word on a run."""
    write_json(run.folder / "launch" / "state.json", {"state": state, "attempt": 1, **more})
    if numbers is not None:
        write_json(run.folder / "result.json", numbers)


def curve(folder: Path, losses, first: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": first + i, "loss": loss} for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def simple(workdir: Path, numbers: dict[tuple[str, ...], dict | None], flags) -> Results:
    """A finished sweep: values of `flags` -> a run's numbers, None for one that never started."""
    plan = sweep(workdir, [dict(zip(flags, key, strict=True)) for key in numbers])
    for run, found in zip(plan.runs, numbers.values(), strict=True):
        if found is not None:
            finish(run, found)
    return read_results(workdir)


def realistic(workdir: Path) -> Path:
    """24 runs of two axes and three seeds, some of them in trouble; returns `workdir`."""
    settings = [
        {"learning_rate": rate, "scopes": scope, "seed": str(seed)}
        for rate in ("1e-4", "1e-3", "1e-2", "1e-1")
        for scope in ("paper", "paper,all_linears")
        for seed in range(3)
    ]
    plan = sweep(workdir, settings)
    for i, run in enumerate(plan.runs):
        rate, seed = float(run.settings["learning_rate"]), int(run.settings["seed"])
        wide = "all" in run.settings["scopes"]
        floor = 2 + 0.4 * abs(math.log10(rate) + 2.5) + 0.05 * wide + 0.03 * seed
        noise = random.Random(i)
        losses = [floor + 6 * math.exp(-n / 9) + noise.gauss(0, 0.05) for n in range(400)]
        curve(run.folder / "pretrain", losses[:280])
        curve(run.folder / "control", losses[280:], 281)
        curve(run.folder / "qat", [loss + 0.02 + 0.01 * wide for loss in losses[280:]], 281)
        config = {"optimizer": {"learning_rate": rate}, "seed": seed, "model": {"d_model": 64}}
        write_json(run.folder / "control" / "config.json", {"format": 2, "config": config})
        commit = "3f2a9c1" if i < 20 else "b7710de"
        write_json(
            run.folder / "launch" / "command.json",
            {"commit": commit, "python": "3.13.0", "packages": {"jax": "0.10.2"}, "argv": [str(i)]},
        )
        numbers = {"control/loss": floor, "qat/loss": floor + 0.02, "qat/bits_per_byte": floor / 2}
        finish(run, numbers, exit=0)
    failed, running, missing, diverged = (plan.runs[i] for i in (4, 10, 17, 20))
    finish(failed, None, "failed", exit=1, error=ERROR)
    finish(running, None, "running")
    (missing.folder / "launch" / "state.json").unlink()
    (missing.folder / "result.json").unlink()
    finish(diverged, {"control/loss": "NaN", "qat/loss": "Infinity"}, exit=0)
    return workdir

"""The training step timed: against transformers, with options, by parts, by length, and its start.

Each function measures one thing and returns a JSON-able dict; `text` prints them all.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from v4jax import presets
from v4jax.analysis import (
    benchmark_page,
    roofline,
    step_cases,
    step_parts,
    timing,
    transformers_step,
)
from v4jax.analysis.timing import Spread
from v4jax.model import parameter_counts
from v4jax.training.metrics import table

LENGTHS, QUICK_LENGTHS = (1024, 8192), (64, 256)


def against_transformers(rounds: int, steps: int, threads: int) -> dict[str, Any]:
    """Both sides in turn, `rounds` times `steps` steps; every other round in the other order."""
    run = step_cases.stepper(step_cases.trainer(step_cases.PLAIN))
    jax.block_until_ready(run())

    def ours(count: int) -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(count):
            loss = run()
        jax.block_until_ready(loss)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return wall / count, cpu / count

    batch, length = step_cases.BATCH, step_cases.LENGTH
    with transformers_step.started(step_cases.CONFIG, batch, length, threads) as child:
        sides = {"v4jax": ours, "transformers": child.run}
        samples: dict[str, list] = {name: [] for name in sides}
        ours(steps)
        for i in range(rounds):
            for name in list(sides)[:: -1 if i % 2 else 1]:
                time.sleep(0.05)  # until the other side's threads have stopped waiting for work
                sides[name](1)  # its data back in the caches
                samples[name].append(sides[name](steps))
    wall = {name: np.array(pairs)[:, 0] for name, pairs in samples.items()}
    cpu = {name: np.array(pairs)[:, 1] for name, pairs in samples.items()}
    found = {
        name: {
            "milliseconds": Spread.of(1e3 * wall[name])._asdict(),
            "cpu_milliseconds": Spread.of(1e3 * cpu[name])._asdict(),
            "tokens_a_second": batch * length / float(np.median(wall[name])),
        }
        for name in sides
    }
    ratio = Spread.of(wall["transformers"] / wall["v4jax"])
    cpu_ratio = Spread.of(cpu["transformers"] / cpu["v4jax"])
    return {
        "sides": found,
        "times_as_fast": ratio._asdict(),
        "cpu_seconds_ratio": cpu_ratio._asdict(),
        "versions": transformers_step.versions(),
    }


def options(rounds: int, at_least: float) -> dict[str, Any]:
    """The plain step and each option of it in turn: the plain step's time, and ratios to it."""
    cases = {"plain": step_cases.PLAIN} | step_cases.OPTIONS
    runs = {name: step_cases.stepper(step_cases.trainer(option)) for name, option in cases.items()}
    timed = timing.alternate(runs, rounds, at_least)
    plain = timed.pop("plain")
    return {
        "plain_milliseconds": Spread.of(1e3 * plain.seconds)._asdict(),
        "ratios": {name: timing.ratio(t, plain)._asdict() for name, t in timed.items()},
    }


def parts(peaks: roofline.Peaks, rounds: int, quick: bool = False) -> dict[str, Any]:
    """Where the plain step's time goes, and its FLOPs against the measured peak.

    FLOPs: 6 for each parameter that a token meets, the embedding table left out (2 forward, 4
    backward), so attention's own products are not in them.
    """
    option = step_cases.QUICK if quick else step_cases.PLAIN
    trainer = step_cases.trainer(option)
    program: Any = trainer.step(trainer.config.quantization)
    run = step_cases.stepper(trainer)
    seconds = timing.alternate({"plain": run}, rounds)["plain"].spread().median
    found = step_parts.parts(program, run)
    active = parameter_counts(option.model)["active without the embedding table"]
    flops = 6 * active * step_cases.BATCH * step_cases.LENGTH
    return {
        "parts": [part._asdict() for part in found],
        "flops": flops,
        "peak_flops": peaks.flops["float32"],
        "share_of_peak": flops / seconds / peaks.flops["float32"],
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }


def lengths(rounds: int, quick: bool = False) -> dict[str, Any]:
    """Forward and backward of `nano` at each length, as many tokens as the last has, in turn."""
    model, of = presets.nano(), LENGTHS
    if quick:
        model, of = presets.shallow(model), QUICK_LENGTHS
    tokens = of[-1]
    made = {length: step_cases.gradient(model, length, tokens) for length in of}
    timed = timing.alternate({str(n): run for n, (_, run) in made.items()}, rounds)
    rows = [
        {
            "length": n,
            "microseconds_a_token": Spread.of(1e6 * timed[str(n)].seconds / tokens)._asdict(),
            "times_the_shortest": timing.ratio(timed[str(n)], timed[str(of[0])])._asdict(),
            "temporary_bytes": made[n][0].memory_analysis().temp_size_in_bytes,
        }
        for n in of
    ]
    return {"tokens": tokens, "rows": rows}


def start(launch: pathlib.Path) -> dict[str, float]:
    """Seconds from a process's start to the first loss of `nano` on its terminal.

    Twice in an empty folder: without any cache (compiled programs, tokenizer, token ids), then with
    those that the first left.
    """
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "with the cache"):
            with tempfile.TemporaryDirectory() as workdir:
                found[name] = _seconds_to_first_loss(launch, workdir, cache)
    return found


def _seconds_to_first_loss(launch: pathlib.Path, workdir: str, cache: str) -> float:
    command = [sys.executable, str(launch), "--experiment=bf16_to_fp4", f"--workdir={workdir}/run"]
    environ = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    said = []
    started = time.perf_counter()
    options: dict[str, Any] = {"text": True, "env": environ, "cwd": cache}
    with subprocess.Popen(command, stdout=nothing, stderr=pipe, **options) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if re.search(r"\bloss\s+[\d.]", line):
                process.kill()
                return time.perf_counter() - started
    raise ChildProcessError("the run ended before its first loss: " + " ".join(said[-1:]).strip())


# ---- on paper ----


def page(report: Mapping[str, Any]) -> str:
    """The report as a page of docs/benchmarks; what was not measured is left out."""
    what = report["what"]
    huge = "asked for" if what["huge_pages"] else "NOT asked for: start through launch.py"
    made = [
        f"# A training step on {what['device']}",
        benchmark_page.header(
            report,
            f"Huge pages: {huge}",
            f"{what['rounds']} samples of each side, in turn; median [quartiles] over the rounds",
        ),
    ]
    if "against" in report:
        made.append(_against_text(report["against"]))
    if "options" in report:
        found = report["options"]
        rows = [(name, _ratio(spread)) for name, spread in found["ratios"].items()]
        plain = found["plain_milliseconds"]["median"]
        made.append(f"## Options, against the plain step of {plain:.1f} ms\n\n")
        made[-1] += table(rows, ("with", "times the plain step"))
    if "parts" in report:
        made.append(_parts_text(report["parts"]))
    if "lengths" in report:
        rows = [
            (
                row["length"],
                f"{row['microseconds_a_token']['median']:.1f}",
                _ratio(row["times_the_shortest"]),
                f"{row['temporary_bytes'] / 2**20:.0f}",
            )
            for row in report["lengths"]["rows"]
        ]
        headers = ("length", "us a token", "times the first", "temporary MiB")
        tokens = report["lengths"]["tokens"]
        made.append(f"## `nano`, forward and backward, {tokens} tokens\n\n" + table(rows, headers))
    if "start" in report:
        rows = [(name, f"{seconds:.1f}") for name, seconds in report["start"].items()]
        made.append("## From process start to the first loss of `nano`\n\n")
        made[-1] += table(rows, ("compilation", "seconds"))
    return "\n\n".join(made) + "\n"


def _ratio(spread: Mapping[str, float]) -> str:
    return "{median:.2f} [{low:.2f}, {high:.2f}]".format(**spread)


def _against_text(found: Mapping[str, Any]) -> str:
    rows = [
        (
            name,
            "{median:.1f} [{low:.1f}, {high:.1f}]".format(**side["milliseconds"]),
            f"{side['cpu_milliseconds']['median']:.1f}",
            f"{side['tokens_a_second']:,.0f}",
        )
        for name, side in found["sides"].items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"## A training step of {step_cases.BATCH} x {step_cases.LENGTH} tokens, side by side\n\n"
        + table(rows, ("step of", "ms", "CPU ms", "tokens/s"))
        + f"\n\nv4jax is {_ratio(found['times_as_fast'])} times as fast as {versions} "
        f"(CPU seconds: {_ratio(found['cpu_seconds_ratio'])})"
    )


def _parts_text(found: Mapping[str, Any]) -> str:
    total = sum(part["forward"] + part["backward"] for part in found["parts"])
    rows = [
        (
            part["scope"] or "outside: optimizer, embedding, loss, what XLA adds",
            f"{1e3 * part['forward']:.1f}",
            f"{1e3 * part['backward']:.1f}",
            f"{(part['forward'] + part['backward']) / total:.0%}",
        )
        for part in found["parts"]
    ]
    return (
        "## Where the plain step's time goes (milliseconds of all threads together)\n\n"
        + table(rows, ("part", "forward", "backward", "share"))
        + f"\n\n{found['flops'] / 1e9:.2f} GFLOP of weights a step: {found['share_of_peak']:.0%} "
        f"of the measured peak of {found['peak_flops'] / 1e9:.0f} GFLOP/s; "
        f"{found['temporary_bytes'] / 2**20:.0f} MiB of temporaries"
    )

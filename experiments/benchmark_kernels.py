"""Time the kernels: roofline first, then the ratio to what else there is, side by side.

    python launch.py --experiment=benchmark_kernels
    python launch.py --experiment=benchmark_kernels --output=docs/benchmarks    writes it down too

For each shape: bytes, FLOPs, the ceiling of the ratio, the ratio (all sides in turn in one process,
median and quartiles), the share of the roofline. A ratio above its ceiling fails the run. What this
machine's device cannot run is listed, without numbers. Run it with nothing beside it.
"""

import pathlib
import shlex
import sys

from absl import flags

from v4jax.training import command

NAME = "benchmark_kernels"
QUICK = flags.DEFINE_bool("quick", False, "[run] Tiny shapes: a smoke test, no result.")
ROUNDS = flags.DEFINE_integer("rounds", 20, "[run] Samples of each side.", 2)
AT_LEAST = flags.DEFINE_float("at_least", 0.05, "[run] Seconds a sample lasts, by more calls.", 0)
THREADS = flags.DEFINE_integer("threads", None, "[run] Cores to use; default: all there are.", 1)
OUTPUT = flags.DEFINE_string("output", None, "[run] Folder for a page and JSON of this device.")
ONLY = flags.DEFINE_string("only", "", "[run] Only cases whose name or shape holds this text.")

SMALL = {"rounds": 3, "at_least": 0.001}


def main():
    command.use_cores(THREADS.value)
    import jax

    from v4jax.analysis import kernel_benchmark, kernel_cases, provenance, roofline, timing

    platform = jax.default_backend()
    cases = {"cpu": kernel_cases.cpu_cases(QUICK.value), "gpu": kernel_cases.gpu_cases(QUICK.value)}
    if platform not in cases:
        raise ValueError(f"there are no cases for a {platform.upper()} yet, only for CPU and GPU")
    mine = [c for c in cases[platform] if ONLY.value in f"{c.operation}, {c.shape}"]
    if not mine:
        raise ValueError(f"--only={ONLY.value}: no case of a {platform.upper()} has it in its name")
    what = provenance.environment() | {
        "command": shlex.join(["python", "launch.py", f"--experiment={NAME}", *sys.argv[1:]]),
        "rounds": ROUNDS.value,
        "load_before": timing.load(),
    }
    peaks = roofline.peaks(QUICK.value)
    found = []
    for case in mine:
        found.append(kernel_benchmark.measure(case, peaks, ROUNDS.value, AT_LEAST.value))
        text = kernel_benchmark.case_text(found[-1])
        print(f"{case.operation}: {case.shape}\n\n{text}\n", flush=True)
    not_run = [
        f"{case.operation}: {case.shape}: not run: no {other.upper()}"
        for other, theirs in cases.items()
        if other != platform
        for case in theirs
    ]
    report = {
        "what": what | {"load_after": timing.load()},
        "peaks": peaks,
        "cases": found,
        "not_run": not_run,
    }
    print("\n".join([kernel_benchmark.header(report), "", *not_run]), flush=True)
    try:
        kernel_benchmark.check(found)
    except kernel_benchmark.AboveCeiling as error:
        sys.exit(f"{NAME}: {error}")
    if OUTPUT.value:
        print(f"wrote {kernel_benchmark.write(pathlib.Path(OUTPUT.value), report)}")


if __name__ == "__main__":
    command.run(main, quick=SMALL)

"""Time a whole training step: against transformers, with options, by parts, by length.

    python launch.py --experiment=benchmark_step
    python launch.py --experiment=benchmark_step --output=docs/benchmarks    writes it down too

transformers is timed where torch and transformers are installed (pip install -e '.[interop]').
Through launch.py, as huge pages must be asked for before a process starts. Run it with nothing
beside it.
"""

import os
import pathlib
import shlex
import sys

from absl import flags

from v4jax.training import command

NAME = "benchmark_step"
SECTIONS = ("against", "options", "parts", "lengths", "start")
QUICK = flags.DEFINE_bool("quick", False, "[run] A few samples: a smoke test, no result.")
ROUNDS = flags.DEFINE_integer("rounds", 20, "[run] Samples of each side.", 2)
THREADS = flags.DEFINE_integer("threads", None, "[run] Cores to use; default: all there are.", 1)
ONLY = flags.DEFINE_list("only", list(SECTIONS), f"[run] Of {', '.join(SECTIONS)}.")
OUTPUT = flags.DEFINE_string("output", None, "[run] Folder for a page and JSON of this device.")


def main():
    for name in ONLY.value:
        if name not in SECTIONS:
            raise ValueError(f"--only={name}: allowed: {', '.join(SECTIONS)}")
    threads = command.use_cores(THREADS.value)

    from v4jax.analysis import benchmark_page, provenance, roofline, timing, transformers_step
    from v4jax.analysis import step_benchmark as step

    report = {
        "what": provenance.environment()
        | {
            "command": shlex.join(["python", "launch.py", f"--experiment={NAME}", *sys.argv[1:]]),
            "rounds": ROUNDS.value,
            "huge_pages": "hugetlb" in os.environ.get("GLIBC_TUNABLES", ""),
            "load_before": timing.load(),
        }
    }
    rounds = ROUNDS.value
    if "against" in ONLY.value and transformers_step.versions():
        report["against"] = step.against_transformers(rounds, 1 if QUICK.value else 5, threads)
    if "options" in ONLY.value:
        report["options"] = step.options(rounds, 0.0 if QUICK.value else 0.2)
    if "parts" in ONLY.value:
        report["parts"] = step.parts(roofline.peaks(QUICK.value), rounds, QUICK.value)
    if "lengths" in ONLY.value:
        report["lengths"] = step.lengths(max(2, rounds // 4), QUICK.value)
    if "start" in ONLY.value and not QUICK.value:
        report["start"] = step.start(pathlib.Path(__file__).parents[1] / "launch.py")
    report["what"]["load_after"] = timing.load()
    page = step.page(report)
    print(page, flush=True)
    if OUTPUT.value:
        written = benchmark_page.write(pathlib.Path(OUTPUT.value), "step", report, page)
        print(f"wrote {written}")


if __name__ == "__main__":
    command.run(main, quick={"rounds": 2})

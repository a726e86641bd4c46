"""An experiment of several processes without JAX, for the executors' tests.

python counting.py --workdir=DIR [--steps=N --pause=S --exit=CODE --seed=S ...]

Process 0 counts; every count depends on all before it, so a run that was interrupted only ends with
the same result if it went on exactly. It saves every 5 steps, and on SIGTERM, at which all
processes leave with 75.
"""

import argparse
import hashlib
import json
import os
import pathlib
import signal
import sys
import time

parser = argparse.ArgumentParser()
parser.add_argument("--workdir", type=pathlib.Path, required=True)
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--pause", type=float, default=0.01)
parser.add_argument("--exit", type=int, default=0)
parser.add_argument("--ignore_term", default="no")
parser.add_argument("--dies", type=int, help="this process leaves with 1 at once")
parser.add_argument("--text", default="")
parser.add_argument("--seed", type=int, default=0)


def result(steps: int, seed: int = 0) -> str:
    """What an uninterrupted run of these flags writes."""
    value = str(seed)
    for step in range(steps):
        value = following(value, step)
    return value


def following(value: str, step: int) -> str:
    return hashlib.sha256(f"{value} {step}".encode()).hexdigest()


def main() -> None:
    flags = parser.parse_args()
    process = int(os.environ.get("SLURM_PROCID", 0))
    told = []
    if flags.ignore_term == "no":
        signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f"process {process} of {os.environ.get('SLURM_NTASKS')}, {flags.text!r}", flush=True)
    flags.workdir.mkdir(parents=True, exist_ok=True)
    checkpoint = flags.workdir / "checkpoint.json"
    state = {"step": 0, "value": str(flags.seed)}
    if checkpoint.exists():
        state = json.loads(checkpoint.read_text())

    def write(path: pathlib.Path, value) -> None:
        if process == 0:
            path.with_suffix(".new").write_text(json.dumps(value))
            path.with_suffix(".new").replace(path)

    def log(event: str) -> None:
        if process == 0:
            with open(flags.workdir / "events.txt", "a") as file:
                file.write(f"{event} {state['step']} {time.time()}\n")

    if process == flags.dies:
        sys.exit(1)
    log("begin")
    while state["step"] < flags.steps:
        time.sleep(flags.pause)
        state = {
            "step": state["step"] + 1,
            "value": following(state["value"], state["step"]),
        }
        if told:
            write(checkpoint, state)
            log("saved")
            sys.exit(75)
        if state["step"] % 5 == 0:
            write(checkpoint, state)
    if flags.exit:
        print(f"leaving with {flags.exit}")
        sys.exit(flags.exit)
    write(flags.workdir / "result.json", {"value": state["value"]})
    log("end")


if __name__ == "__main__":
    main()

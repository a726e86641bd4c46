"""An experiment without JAX whose folder may be in a bucket: --workdir=DIR [--seed=0 --steps=3 ...]

Counts steps with a checkpoint after each, and its result depends on all of them.
"""

import json
import sys
import time

from v4jax.training.files import as_path, write_whole

FLAGS = {"workdir": "", "seed": "0", "steps": "3", "seconds": "0.01", "fails": "0"}
FLAGS |= dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
FOLDER, STEPS = as_path(FLAGS["workdir"]), int(FLAGS["steps"])


def put(name: str, value) -> None:
    write_whole(FOLDER / name, json.dumps(value).encode())


def main():
    state = {"starts": 0, "step": 0, "sum": 0, "rows": []}
    if (FOLDER / "checkpoint.json").exists():
        state = json.loads((FOLDER / "checkpoint.json").read_bytes())
    state["starts"] += 1
    put("checkpoint.json", state)
    put("phases.json", [{"name": "train", "first": 0, "last": STEPS}])
    print("start", state["starts"])
    while state["step"] < STEPS:
        time.sleep(float(FLAGS["seconds"]))
        step = state["step"] + 1
        row = {"step": step, "loss": 1 / step, "seconds_per_step": float(FLAGS["seconds"])}
        state["step"], state["rows"] = step, [*state["rows"], row]
        state["sum"] = 31 * state["sum"] + step * (1 + int(FLAGS["seed"]))
        lines = "".join(json.dumps(row) + "\n" for row in state["rows"])
        write_whole(FOLDER / "train" / "metrics.jsonl", lines.encode())
        put("checkpoint.json", state)
        if FLAGS["fails"] == FLAGS["seed"] and state["starts"] == 1:
            sys.exit("it fails the first time")
    put("result.json", {"sum": state["sum"]})


if __name__ == "__main__":
    main()

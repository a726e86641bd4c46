"""An experiment without JAX: python fake_experiment.py --workdir=DIR [--seed=0 --steps=3 ...]

Counts steps, with a checkpoint after each, and writes a result that depends on the flags and on all
steps. It notices a second process in its folder. Flags say how it misbehaves.
"""

import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

FLAGS = {
    "workdir": "", "seed": "0", "steps": "3", "seconds": "0.01", "exits": "", "ignore_term": "0",
    "child": "0", "say": "",
}  # fmt: skip
FLAGS |= dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
FOLDER = pathlib.Path(FLAGS["workdir"])


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    alone = os.open(
        FOLDER / "alone", os.O_CREAT | os.O_RDWR
    )  # the kernel frees the lock when the process ends
    try:
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        (FOLDER / "twice").write_text("a second process met a first")
    with open(FOLDER / "starts", "a") as file:
        file.write(f"{os.getpid()} {os.getppid()}\n")
    starts = len((FOLDER / "starts").read_text().splitlines())
    if FLAGS["ignore_term"] == "1":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if FLAGS["child"] == "1":  # in a session of its own, and it holds the lock too
        program = "import time; time.sleep(600)"
        child = subprocess.Popen(
            [sys.executable, "-c", program], pass_fds=[alone], start_new_session=True
        )
        (FOLDER / "child").write_text(str(child.pid))
    print(FLAGS["say"] or f"start {starts}")
    checkpoint = FOLDER / "checkpoint.json"
    state = {"step": 0, "sum": 0}
    if checkpoint.exists():
        state = json.loads(checkpoint.read_text())
    (FOLDER / "train").mkdir(exist_ok=True)
    phases = [{"name": "train", "first": 0, "last": int(FLAGS["steps"])}]
    (FOLDER / "phases.json").write_text(json.dumps(phases))
    codes = [int(code) for code in FLAGS["exits"].split("+") if code]
    if starts <= len(codes):  # exits=1+75: the first start fails, the second wants another
        print("before the end", "it says this", sep="\n")
        if codes[starts - 1] < 0:
            os.kill(os.getpid(), -codes[starts - 1])
        sys.exit(codes[starts - 1])
    while state["step"] < int(FLAGS["steps"]):
        time.sleep(float(FLAGS["seconds"]))
        step = state["step"] + 1
        state = {"step": step, "sum": 31 * state["sum"] + step * (1 + int(FLAGS["seed"]))}
        row = {"step": step, "loss": 1 / step, "seconds_per_step": float(FLAGS["seconds"])}
        with open(FOLDER / "train" / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        temporary = checkpoint.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        os.replace(temporary, checkpoint)
    (FOLDER / "result.json").write_text(json.dumps({"sum": state["sum"]}))


if __name__ == "__main__":
    main()

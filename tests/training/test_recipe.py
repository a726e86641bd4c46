"""The flags that experiments share, in a process of their own: what they make; defaults."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys
from absl import flags
from v4jax.training import recipe
F = flags.FLAGS

def parse(*arguments, **defaults):
    for flag in F.get_flags_for_module("__main__"):
        delattr(F, flag.name)
    recipe.define(**defaults)
    F(["program", "--workdir=w", *arguments])

def configured(*arguments, **defaults):
    parse(*arguments, **defaults)
    try:
        return recipe.configure(512, "hash", 3).to_dict()
    except ValueError as error:
        return str(error)

shown = [
    configured(),
    configured("--steps=50", steps=400, preset="pico"),
    configured(steps=30),
    configured("--lengths=0:64,0.5:256", "--batch_sizes=0:4,100:8", "--indexer_warmup=0.05",
               "--decay_end=0.9", "--clip=group", "--newton_schulz=five",
               "--indexer_learning_rate=1e-3"),
    configured("--lengths=64"),
    configured("--index_weight=0"),
    configured("--warmup=0.9"),
]
parse("--quick", "--steps=7")
recipe.shrink({"steps": 4, "batch_size": 2})
shown.append([F.steps, F.batch_size])
print(json.dumps(shown))
"""


def test_configurations_and_defaults():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    plain, small, other, full, bad, frozen, late, shrunk = json.loads(run.stdout)
    assert (plain["schedule"]["total_steps"], plain["batch_size"], plain["seed"]) == (400, 8, 3)
    assert plain["data"] == "hash" and plain["model"]["vocab_size"] == 512
    # Zero is the integer that configurations of earlier versions stand for.
    kept = {name: plain["schedule"][name] for name in ("indexer_warmup", "index_start", "lengths")}
    assert json.dumps(kept) == '{"indexer_warmup": 0, "index_start": 0, "lengths": []}'
    assert (small["schedule"]["total_steps"], small["model"]["hidden_size"]) == (50, 64)
    # The flags are of the experiment that defines them: another defines them anew.
    assert (other["schedule"]["total_steps"], other["model"]["hidden_size"]) == (30, 128)
    schedule, optimizer = full["schedule"], full["optimizer"]
    assert schedule["lengths"] == [[0, 64], [0.5, 256]] and schedule["decay_end"] == 0.9
    assert schedule["batch_sizes"] == [[0, 4], [100, 8]] and schedule["indexer_warmup"] == 0.05
    assert (optimizer["clip"], optimizer["newton_schulz"]) == ("group", "five")
    assert optimizer["indexer_learning_rate"] == 1e-3
    assert bad == "--lengths=64: allowed: START:VALUE, such as 0:64 or 0.5:256"
    assert not frozen["optimizer"]["train_indexer"]
    assert "warmup" in late and "\n" not in late
    assert shrunk == [7, 2]

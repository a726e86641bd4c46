"""Experiments in this process: each as if it were the first."""

import json
import logging
import os
import re
import sys

import pytest
from absl import flags

from tests.launching.sweeping import expected, plan_of, states
from v4jax.launching.in_process import InProcess
from v4jax.launching.plan import make_plan
from v4jax.launching.runner import run_plan

EXPERIMENT = """
import os, pathlib, sys
from absl import app, flags, logging
import beside
WORKDIR = flags.DEFINE_string("workdir", None, "folder", required=True)
SEED = flags.DEFINE_integer("seed", 0, "seed")
OTHER = flags.DEFINE_integer("other", 5, "not swept")

def main(argv):
    print("seed", SEED.value, "other", OTHER.value, "token", len(os.environ["V4JAX_CLAIM"]))
    print("to stderr", file=sys.stderr)
    if OTHER.value > 6:
        logging.set_verbosity(logging.ERROR)
        logging.warning("too quiet for seed %d", SEED.value)
        logging.error("seed %d told", SEED.value)
    if SEED.value == 1:
        raise RuntimeError("it broke")
    if SEED.value == 2:
        sys.exit(3)
    if SEED.value == 3:
        sys.exit("a message")
    if SEED.value == 4:
        os.environ["LEFT"] = "behind"
    if SEED.value == 5:
        import signal
        signal.raise_signal(signal.SIGINT)

if __name__ == "__main__":
    app.run(main)
"""


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(EXPERIMENT)
    (tmp_path / "beside.py").write_text("")
    return str(path)


def run(plan, **options):
    executor = InProcess({}, 1)
    return run_plan(plan, executor, parallel=1, retries=options.get("retries", 0))


def test_each_run_has_its_own_flags_log_and_exit_code(tmp_path, experiment):
    before = dict(os.environ), list(sys.argv), list(sys.path), flags.FLAGS.is_parsed()
    settings = [{"seed": str(seed)} for seed in range(5)] + [{"other": "6"}]
    plan = make_plan(experiment, tmp_path / "sweep", settings)
    assert run(plan) == 1
    assert (dict(os.environ), list(sys.argv), list(sys.path), flags.FLAGS.is_parsed()) == before
    assert {"workdir", "seed", "other"}.isdisjoint(flags.FLAGS)
    assert [(s.state, s.exit) for s in states(plan)] == [
        ("done", 0), ("failed", 1), ("failed", 3), ("failed", 1), ("done", 0), ("done", 0),
    ]  # fmt: skip
    logs = [(r.folder / "launch/attempts/1/log.txt").read_text() for r in plan.runs]
    assert logs[0] == "seed 0 other 5 token 32\nto stderr\n"
    assert logs[1].endswith("RuntimeError: it broke\n")
    assert logs[3].endswith("a message\n")
    assert logs[5].startswith("seed 0 other 6")


def test_what_it_logs_is_in_its_log_and_the_loggers_are_left_alone(tmp_path, experiment, capfd):
    def loggers():
        named = logging.root, logging.getLogger("absl")
        return [(logger.level, list(logger.handlers)) for logger in named]

    before = loggers()
    plan = make_plan(experiment, tmp_path / "sweep", [{"other": "7", "seed": s} for s in "67"])
    assert run(plan) == 0
    assert loggers() == before
    assert "told" not in capfd.readouterr().err
    for seed, one in zip("67", plan.runs, strict=True):
        log = (one.folder / "launch/attempts/1/log.txt").read_text()
        assert re.search(rf"^E\d{{4}} .*\] seed {seed} told$", log, re.MULTILINE)
        assert "too quiet" not in log


def test_a_bad_flag_is_the_experiments_own_failure(tmp_path, experiment):
    plan = make_plan(experiment, tmp_path / "sweep", [{"seed": "x"}])
    assert run(plan) == 1
    assert "--seed=x" in (states(plan)[0].error or "")


def test_ctrl_c_ends_the_experiment_and_the_sweep(tmp_path, experiment):
    plan = make_plan(experiment, tmp_path / "sweep", [{"seed": "5"}, {"seed": "0"}])
    assert run(plan) == 130
    assert [s.state for s in states(plan)] == ["preempted", "pending"]


def test_the_numbers_are_those_of_processes(tmp_path):
    plan = plan_of(tmp_path, 2, steps=4, seconds=0)
    assert run(plan) == 0
    for seed, one in enumerate(plan.runs):
        assert json.loads((one.folder / "result.json").read_text()) == expected(seed, 4)


def test_it_has_one_slot_and_no_resources():
    with pytest.raises(ValueError, match="--parallel=2: --executor=in_process runs one at a time"):
        InProcess({}, 2)
    with pytest.raises(ValueError, match="--gpus: --executor=in_process has no such resource"):
        InProcess({"gpus": "1"}, 1)

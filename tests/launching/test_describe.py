"""An experiment's file is asked for its flags in a process of its own, which runs nothing of it."""

import textwrap

import pytest

from v4jax.launching import experiments
from v4jax.launching.experiments import Question, describe

HEAD = """
import sys
from absl import flags
flags.DEFINE_string("workdir", None, "", required=True)
flags.DEFINE_float("learning_rate", 1e-3, "", 0)
flags.DEFINE_integer("seed", 0, "", short_name="s")
flags.DEFINE_bool("quick", False, "")
flags.DEFINE_enum("preset", "nano", ("nano", "micro"), "")
flags.DEFINE_multi_integer("layer", [1], "")
flags.DEFINE_list("scopes", ["a"], "")
F = flags.FLAGS
"""
TAIL = """
if __name__ == "__main__":
    open("it_ran", "w").close()
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes an experiment's file, its body between flags and guard; returns its path."""
    monkeypatch.chdir(tmp_path)

    def write(body="", head=HEAD, tail=TAIL, name="probe.py"):
        (tmp_path / name).write_text(head + textwrap.dedent(body) + tail)
        return str(tmp_path / name)

    yield write
    assert not (tmp_path / "it_ran").exists()


def run(*arguments):
    return [*arguments, "--workdir=w"]


def refusal(experiment, **question):
    with pytest.raises(ValueError) as raised:
        describe(experiment, Question(**question))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_good_flags_pass_and_the_fixed_come_back_in_one_spelling(write):
    probe = write()
    swept = [run("--quick", "-s", "3", f"--learning_rate={rate}") for rate in ("1e-3", "0.5")]
    for fixed in (["--quick", "-s", "3"], ["--quick=true", "--seed=3"], ["--seed", "3", "-quick"]):
        question = Question(swept=["learning_rate"], fixed=fixed, runs=swept)
        assert describe(probe, question).fixed == ("--quick", "--seed=3")
    question = Question(fixed=["--noquick", "--scopes=a,b", "--layer=2", "--layer=3"])
    assert describe(probe, question).fixed == (
        "--layer=2", "--layer=3", "--noquick", "--scopes=a,b",
    )  # fmt: skip


def test_swept_values_come_back_in_one_spelling(write):
    runs = [run("--learning_rate=1e-3", "--quick"), run("--learning_rate=0.001", "--noquick")]
    found = describe(write(), Question(swept=["learning_rate", "quick"], runs=runs)).values
    assert found[0]["learning_rate"] == found[1]["learning_rate"] == "--learning_rate=0.001"
    assert (found[0]["quick"], found[1]["quick"]) == ("--quick", "--noquick")
    assert describe(write(), Question(swept=["seed"], runs=[run()])).values == ({},)


def test_a_misspelt_flag_gets_a_suggestion(write):
    probe = write()
    assert refusal(probe, swept=["learnin_rate"], runs=[run()]) == (
        "--sweep: probe has no flag learnin_rate; did you mean learning_rate?"
    )
    assert refusal(probe, fixed=["--sead=1"], runs=[run("--sead=1")]) == (
        "--sead: probe has no such flag; did you mean seed?"
    )
    assert "did you mean parallel?" in refusal(probe, fixed=["--paralel=2"], others=["parallel"])


def test_a_flag_that_nobody_has_lists_what_the_launcher_has(write):
    message = refusal(write(), fixed=["--gpus=2"], others=["retries", "cores"])
    assert message == "--gpus: probe has no such flag; the launcher's own are: retries, cores"


@pytest.mark.parametrize(
    ("argument", "what"),
    [
        ("--seed=x", "--seed=x"),
        ("--learning_rate=-1", "--learning_rate=-1: -1.0 is not a non-negative number"),
        ("--preset=mega", "should be one of <nano|micro>"),
        ("--quick=perhaps", "--quick=perhaps"),
        ("7", "7: not a flag"),
    ],
)
def test_a_bad_value_ends_in_one_line(write, argument, what):
    probe = write()
    assert what in refusal(probe, fixed=[argument], runs=[run(argument)])
    assert what in refusal(probe, runs=[run(), run(argument)])  # every run's are looked at


def test_required_flags_may_come_from_the_sweep_but_must_come(write):
    probe = write('flags.DEFINE_string("data", None, "", required=True)')
    fixed = ["--quick"]
    question = Question(swept=["data"], fixed=fixed, runs=[run("--quick", "--data=x")])
    assert describe(probe, question).fixed == ("--quick",)
    assert "--data must have a value" in refusal(probe, fixed=fixed, runs=[run("--quick")])


def test_validators_of_the_experiment_are_asked(write):
    probe = write(
        'flags.register_validator("seed", lambda seed: seed < 5, message="below 5, please")'
    )
    assert "below 5, please" in refusal(probe, runs=[run("--seed=4"), run("--seed=5")])


def test_a_flag_is_given_once(write):
    message = refusal(write(), swept=["seed"], fixed=["-s", "1"], runs=[run("-s", "1", "--seed=2")])
    assert message == "--seed: is in a --sweep too; give it once"


def test_an_option_that_the_experiment_has_too_is_not_taken_in_silence(write):
    message = refusal(write(), taken=["quick"], others=["quick"], runs=[run()])
    assert message.startswith("--quick: both probe and the launcher have it")
    assert describe(write(), Question(others=["quick"], runs=[run()])).fixed == ()


def test_a_sweep_names_a_flag_in_full(write):
    said = refusal(write(), swept=["s"], fixed=["--seed=3"], runs=[run("--seed=3", "--s=1")])
    assert said == "--sweep: s is short for seed; write that"


def test_a_sweep_cannot_set_the_folder_that_the_launcher_gives_each_run(write):
    arguments = ["--workdir=a", "--workdir=runs/workdir=a"]
    said = refusal(write(), swept=["workdir"], runs=[arguments])
    assert said.startswith("--sweep: workdir is not for a sweep to set")


def test_an_experiment_without_a_workdir_cannot_be_swept(write):
    probe = write(head='from absl import flags\nflags.DEFINE_integer("seed", 0, "")\n')
    assert "probe has no flag --workdir" in refusal(probe, swept=["seed"], runs=[run("--seed=1")])


def test_functions_give_settings_as_text(write):
    probe = write(
        """
        def pairs():
            return [{"seed": 1, "quick": True}, {"learning_rate": 0.5, "scopes": ["a", "b"]}]
        def broken():
            raise KeyError("no\\nsuch")
        def wrong():
            return [1]
        """
    )
    assert describe(probe, Question(functions=["pairs"])).functions == {
        "pairs": [{"seed": "1", "quick": "true"}, {"learning_rate": "0.5", "scopes": "a,b"}]
    }
    assert "has no function pear" in refusal(probe, functions=["pear"])
    assert refusal(probe, functions=["broken"]).startswith("--sweep broken(): a list of dicts")
    assert refusal(probe, functions=["wrong"]).startswith("--sweep wrong(): a list of dicts")


COLUMNS = """
def describe():
    if F.seed == 9:
        raise ValueError("--seed: 9 is\\nnot for us")
    jax = [name for name in ("jax", "numpy") if name in sys.modules]
    return {"seed": F.seed, "layers": F.layer, "folder": F.workdir, "loaded": jax}
"""


def test_columns_are_of_each_run_and_nothing_stays_from_the_one_before(write):
    answer = describe(
        write(COLUMNS),
        Question(runs=[run("--seed=3", "--layer=5"), ["--workdir=v", "--layer=7"]], columns=True),
    )
    assert answer.columns == (
        {"seed": 3, "layers": [5], "folder": "w", "loaded": []},
        {"seed": 0, "layers": [7], "folder": "v", "loaded": []},
    )
    assert describe(write(COLUMNS), Question(runs=[run("--seed=9")])).columns == ()
    assert describe(write(), Question(runs=[run()], columns=True)).columns == ()


def test_a_describe_that_raises_ends_in_one_line(write):
    message = refusal(write(COLUMNS), runs=[run("--seed=9")], columns=True)
    assert message == "describe(): --seed: 9 is not for us"
    message = refusal(write("def describe(): return 1 / 0"), runs=[run()], columns=True)
    assert message == "describe(): ZeroDivisionError: division by zero"


def test_what_the_file_prints_is_not_taken_for_the_answer(write):
    probe = write("import os\nprint('hello')\nos.system('echo from a child')\n")
    assert describe(probe, Question(fixed=["--quick"])).fixed == ("--quick",)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = (", "was never closed (probe.py, line"),
        ("sys.exit('not today')", "SystemExit: not today"),
        ("flags.DEFINE_integer('seed', 0, '')", "DuplicateFlagError"),
        ("import os; print('so long', file=sys.stderr); os._exit(0)", "so long"),
        ("import os; os.abort()", "its process ended"),
    ],
)
def test_a_file_that_cannot_be_imported_ends_in_one_line(write, body, what):
    message = refusal(write(body))
    assert message.startswith("--experiment=")
    assert "probe.py: " in message
    assert what in message


def test_a_file_without_a_guard_is_not_imported(write):
    probe = write("open('it_ran', 'w').close()", tail="")
    assert '`if __name__ == "__main__":`' in refusal(probe)


def test_a_file_may_import_what_lies_beside_it_and_v4jax(write, tmp_path):
    (tmp_path / "beside.py").write_text("VALUE = 4\n")
    probe = write(
        """
        import dataclasses
        import beside, v4jax
        @dataclasses.dataclass
        class Settings:
            seed: "int"
        def pairs():
            return [{"seed": beside.VALUE}]
        """
    )
    assert describe(probe, Question(functions=["pairs"])).functions == {"pairs": [{"seed": "4"}]}


def test_a_missing_experiment_is_refused(tmp_path):
    assert "did you mean bf16_to_fp4?" in refusal("bf16_to_fp5")
    assert "there is no such file" in refusal(f"{tmp_path}/none.py")


@pytest.mark.parametrize("name", experiments.available())
def test_every_experiment_of_ours_can_be_asked(name):
    assert describe(name, Question(fixed=["--quick"])).fixed == ("--quick",)
    assert "has no flag quik; did you mean quick?" in refusal(name, swept=["quik"])

"""--sweep's text becomes the settings of runs."""

import collections
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4jax.launching.sweep import expand, functions_of, text


def values(flag, spec, **options):
    return [settings[flag] for settings in expand([spec], **options)]


def test_specs_multiply_and_the_last_runs_fastest():
    assert expand(["lr=1e-3,3e-4", "seed=0:3"]) == [
        {"lr": "1e-3", "seed": "0"},
        {"lr": "1e-3", "seed": "1"},
        {"lr": "1e-3", "seed": "2"},
        {"lr": "3e-4", "seed": "0"},
        {"lr": "3e-4", "seed": "1"},
        {"lr": "3e-4", "seed": "2"},
    ]


def test_flags_of_one_spec_go_together():
    assert expand(["  lr=1e-3,3e-4   warmup=[0.1],0.2 ", "seed=7"]) == [
        {"lr": "1e-3", "warmup": "0.1", "seed": "7"},
        {"lr": "3e-4", "warmup": "0.2", "seed": "7"},
    ]


def test_flags_stand_in_the_order_of_the_specs():
    (settings,) = expand(["z=1 y=2", "a=3"])
    assert list(settings) == ["z", "y", "a"]


def test_brackets_keep_commas_ranges_calls_and_the_empty_text():
    spec = "x=[paper,all_linears],[paper],[0:3],[],[uniform(0,1)],[a [b] c],[:-)]"
    assert values("x", spec) == [
        "paper,all_linears", "paper", "0:3", "", "uniform(0,1)", "a [b] c", ":-)",
    ]  # fmt: skip


@given(st.text(st.characters(exclude_characters="[]"), max_size=20))
def test_brackets_keep_any_text(inside):
    assert values("x", f"x=[{inside}],1") == [inside, "1"]


@given(st.integers(-50, 50), st.integers(-50, 50), st.integers(-9, 9).filter(bool))
def test_ranges_are_pythons(start, stop, step):
    expected = [str(number) for number in range(start, stop, step)]
    if expected:
        assert values("x", f"x={start}:{stop}:{step}") == expected
    else:
        with pytest.raises(ValueError, match="the range is empty"):
            expand([f"x={start}:{stop}:{step}"])


def test_ranges_and_values_mix_and_a_colon_elsewhere_is_text():
    assert values("x", "x=0:2,10,7:5:-1") == ["0", "1", "10", "7", "6"]
    assert values("x", "x=gs://bucket/a,host:80") == ["gs://bucket/a", "host:80"]


DRAWS = {
    "uniform": lambda low, high: f"uniform({low},{high})",
    "loguniform": lambda low, high: f"loguniform({low},{high})",
}


@given(
    st.sampled_from(sorted(DRAWS)),
    st.floats(1e-12, 1e12),
    st.floats(1e-12, 1e12),
    st.integers(0, 10),
)
def test_draws_stay_between_their_ends(kind, one, other, seed):
    low, high = sorted((one, other))
    if low == high:
        high = math.nextafter(low, math.inf)  # the narrowest there is
    for value in values("x", f"x={DRAWS[kind](low, high)}", draws=3, seed=seed):
        assert low <= float(value) <= high


@given(st.integers(1, 8), st.integers(0, 8), st.integers(0, 1 << 40))
def test_more_draws_keep_the_old_ones(few, more, seed):
    specs = ["lr=loguniform(1e-4,1e-2)", "a=1,2", "b=choice(x,y,z) c=intuniform(-5,5)"]
    some, many = (
        expand(specs, draws=draws, seed=seed)[:: len(specs) - 1] for draws in (few, few + more)
    )
    assert many[:few] == some


def test_a_draw_depends_on_its_flag_and_the_seed_and_nothing_else():
    alone = values("lr", "lr=uniform(0,1)", draws=5)
    beside = expand(["other=1,2", "wd=uniform(0,1)", "lr=uniform(0,1)"], draws=5)
    assert [settings["lr"] for settings in beside[:5]] == alone
    assert [settings["wd"] for settings in beside[:5]] != alone
    assert values("lr", "lr=uniform(0,1)", draws=5, seed=1) != alone


def test_draws_are_the_same_in_every_version():
    """Else a sweep that is gone on with after an update would get other runs."""
    assert expand(["lr=loguniform(1e-4,1e-2) n=intuniform(1,3) k=choice(a,b)"], draws=3) == [
        {"lr": "0.00655035", "n": "1", "k": "a"},
        {"lr": "0.000258885", "n": "1", "k": "a"},
        {"lr": "0.00284565", "n": "2", "k": "b"},
    ]


def test_all_draws_are_one_axis_in_the_place_of_the_first():
    specs = ["seed=0:2", "lr=uniform(0,1) tag=x,y,z", "depth=1,2", "wd=uniform(0,1)"]
    runs = expand(specs, draws=3)
    assert len(runs) == 2 * 3 * 2
    assert list(runs[0]) == ["seed", "lr", "tag", "wd", "depth"]
    assert [run["tag"] for run in runs] == ["x", "x", "y", "y", "z", "z"] * 2
    assert len({(run["lr"], run["wd"], run["tag"]) for run in runs}) == 3


def test_the_shapes_of_the_distributions():
    count = 4000
    logs = [math.log10(float(v)) for v in values("x", "x=loguniform(1e-4,1e-2)", draws=count)]
    flat = [float(v) for v in values("x", "x=uniform(-4,-2)", draws=count)]
    for sample in (logs, flat):  # a fifth of them in each fifth, within 5 standard deviations
        shares = np.histogram(sample, bins=5, range=(-4, -2))[0] / count
        assert np.abs(shares - 0.2).max() < 5 * math.sqrt(0.2 * 0.8 / count)
    counts = collections.Counter(values("x", "x=intuniform(1,4)", draws=count))
    assert sorted(counts) == ["1", "2", "3", "4"]  # both ends
    assert min(counts.values()) > 0.25 * count - 5 * math.sqrt(count * 0.25 * 0.75)
    counts = collections.Counter(values("x", "x=choice(a,[b,c],7:9)", draws=count))
    assert sorted(counts) == ["7", "8", "a", "b,c"]
    assert min(counts.values()) > 0.25 * count - 5 * math.sqrt(count * 0.25 * 0.75)


def test_a_function_of_the_experiment_gives_whole_runs():
    rows = [{"lr": 1e-3, "quick": True}, {"lr": np.float32(0.5), "scopes": ["a", "b"], "n": 2}]
    assert functions_of(["pairs()", "seed=0:2", "x=uniform(0,1)", " more( ) "]) == ["pairs", "more"]
    assert expand(["pairs()", "seed=0:2"], functions={"pairs": rows}) == [
        {"lr": "0.001", "quick": "true", "seed": "0"},
        {"lr": "0.001", "quick": "true", "seed": "1"},
        {"lr": "0.5", "scopes": "a,b", "n": "2", "seed": "0"},
        {"lr": "0.5", "scopes": "a,b", "n": "2", "seed": "1"},
    ]


def test_values_as_text():
    given = ["x", True, False, 3, 1e-5, np.int64(4), np.float64(0.1), (1, 2), [True, "a"], 10**30]
    assert list(map(text, given)) == [
        "x", "true", "false", "3", "1e-05", "4", "0.1", "1,2", "true,a", "1" + 30 * "0",
    ]  # fmt: skip
    for value in (None, {"a": 1}, object()):
        with pytest.raises(ValueError, match="is not text, a number"):
            text(value)


@pytest.mark.parametrize(
    ("specs", "options", "what"),
    [
        ([""], {}, "is empty"),
        (["lr"], {}, "is not flag=values"),
        (["--lr=1"], {}, "is not flag=values"),
        (["=1"], {}, "is not flag=values"),
        (["lr="], {}, "a value is missing"),
        (["lr=1,,2"], {}, "a value is missing"),
        (["lr=1, 2"], {}, "a value is missing"),
        (["a=1,2 b=1"], {}, "a has 2, b has 1"),
        (["a=1 a=2"], {}, "a is there twice"),
        (["a=1 b=2", "c=1 a=2"], {}, "a is in 'a=1 b=2' too"),
        (["f()", "a=2"], {"functions": {"f": [{}, {"a": 1}]}}, "a is in 'f()' too"),
        (["a=3:3"], {}, "the range is empty"),
        (["a=0:x"], {}, "a range is start:stop"),
        (["a=0:1.5"], {}, "a range is start:stop"),
        (["a=:3"], {}, "a range is start:stop"),
        (["a=0:3:0"], {}, "its step not 0"),
        (["a=0:3:1:1"], {}, "a range is start:stop"),
        (["a=0:100001"], {}, "up to 100000"),
        ([f"a=0:{10**40}"], {}, "up to 100000"),
        (["a=0:1000", "b=0:101"], {}, "101000 runs"),
        (["a=[b"], {}, "] is missing"),
        (["a=b]"], {}, "] closes nothing"),
        (["a=(b]"], {}, "] closes nothing"),
        (["a=uniform(1,2"], {}, ") is missing"),
        (["a=[b]c"], {}, "a bracket holds a whole value"),
        (["a=range(3)"], {}, "draws are uniform, loguniform, intuniform, choice"),
        (["a=1,uniform(0,1)"], {}, "a draw is the only value"),
        (["a=uniform(1)"], {}, "takes two numbers"),
        (["a=uniform(1,2,3)"], {}, "takes two numbers"),
        (["a=uniform(1,1e-3x)"], {}, "takes two numbers"),
        (["a=uniform(2,1)"], {}, "must be below"),
        (["a=uniform(0,nan)"], {}, "must be below"),
        (["a=loguniform(0,1)"], {}, "above 0"),
        (["a=intuniform(0,1.5)"], {}, "two whole numbers"),
        (["a=choice()"], {}, "a value is missing"),
        (["a=uniform(0,1) b=1,2"], {"draws": 3}, "a has 3, b has 2"),
        (["a=1,2"], {"draws": 3}, "no --sweep draws"),
        (["a=uniform(0,1)"], {"draws": 0}, "1 or more"),
        (["f()"], {}, "no function f"),
        (["f()"], {"functions": {"f": []}}, "returned no runs"),
        (["f()"], {"functions": {"f": [{"a": None}]}}, "None is not text"),
    ],
)
def test_mistakes_end_in_one_line_that_names_the_flag(specs, options, what):
    with pytest.raises(ValueError) as raised:
        expand(specs, **options)
    message = str(raised.value)
    assert what in message
    assert "\n" not in message
    assert message.startswith(("--sweep", "--draws="))


FLAGS = ["a", "b", "c", "d"]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_grid_is_the_product(sizes):
    axes = [[f"{flag}{i}" for i in range(size)] for flag, size in zip(FLAGS, sizes, strict=False)]
    specs = [f"{flag}={','.join(axis)}" for flag, axis in zip(FLAGS, axes, strict=False)]
    expected = [dict(zip(FLAGS, row, strict=False)) for row in itertools.product(*axes)]
    assert expand(specs) == expected

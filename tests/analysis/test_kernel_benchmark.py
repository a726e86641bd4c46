"""Rooflines, ceilings, and the cases of the kernels' benchmark; nothing here asserts on seconds."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import compiling_for
from v4jax.analysis import kernel_benchmark, kernel_cases, roofline, timing
from v4jax.analysis.expert_cases import Experts
from v4jax.analysis.kernel_benchmark import AboveCeiling, Case, Claim, Side, check, measure
from v4jax.analysis.roofline import ACCELERATORS, Peaks, Phase, seconds
from v4jax.analysis.selector_cases import Selector

H100 = ACCELERATORS["NVIDIA H100"]
PEAKS = Peaks({"float32": 100.0}, {0: 10.0}, "made up")


# ---- rooflines ----


def test_phases_add_up_and_each_is_bound_by_the_slower():
    assert seconds((Phase(200, 5), Phase(0, 30), Phase(100, 20)), PEAKS) == 2 + 3 + 2


def test_small_data_lie_in_faster_memory():
    peaks = Peaks({}, {100: 9.0, 1000: 5.0, 10000: 6.0}, "")
    assert [peaks.bandwidth(n) for n in (1, 100, 101, 1000, 5000, 99999)] == [9, 9, 6, 6, 6, 5]


@pytest.mark.parametrize("m", [1, 4, 16, 64])
def test_fp4_weights_are_3_76_times_fewer_bytes_while_tokens_are_few(m):
    """At few tokens the weights are nearly all that moves; x and y take the rest of the 3.76."""
    size = Experts(32 * m, 32, 4096, 4096, even=True)
    bf16, fp4 = (seconds(size.work("bfloat16", packed), H100) for packed in (False, True))
    ideal = 64 / 17
    assert ideal * (1 - 0.08 * m / 16) < bf16 / fp4 < ideal
    (phase,) = size.work("bfloat16", True)
    assert phase.bytes / H100.bandwidth(0) > phase.flops / H100.flops["bfloat16"]


def test_fp4_weights_give_no_speed_in_training():
    size = Experts(32 * 1024, 32, 4096, 4096, even=True)
    bf16, fp4 = (seconds(size.work("bfloat16", packed, True), H100) for packed in (False, True))
    assert math.isclose(bf16, fp4)
    assert math.isclose(fp4, 3 * 2 * 32 * 1024 * 4096 * 4096 / 989e12)


def test_the_selector_needs_fp8_for_2x():
    """kernels that write float32 scores against a fused one, 64 heads x 128: between 2 and 2.5."""
    size = Selector(2048, 65536, 64, 128, 512)
    apart, fused = size.separate("bfloat16"), size.fused("bfloat16", "float8", "threshold")
    assert 2 < seconds(apart, H100) / seconds(fused, H100) < 2.5


def test_causal_pairs_are_about_half():
    both = [Selector(64, 64, 2, 32, 8, causal).flops() for causal in (True, False)]
    assert both[0] / both[1] == 65 / 128


def test_an_unknown_accelerator_is_one_line(monkeypatch):
    device = SimpleNamespace(platform="gpu", device_kind="Voodoo 2")
    monkeypatch.setattr(roofline.jax, "devices", lambda: [device])
    with pytest.raises(ValueError, match="no peaks are known of 'Voodoo 2', only of: NVIDIA H100"):
        roofline.peaks()
    device.device_kind = "NVIDIA H100 80GB HBM3"
    assert roofline.peaks() is H100


def test_a_cpus_peaks_are_measured():
    found = roofline.measured((32, 64), 4, 2)
    assert 0 < found.flops["float32"] <= found.flops["bfloat16"]
    assert sorted(found.bandwidths) == [2 * 2**20, 8 * 2**20]
    assert "32, 64 squared" in found.source


# ---- rows ----


@pytest.fixture
def in_turn(monkeypatch):
    """Sides take the seconds that are given by label, whatever they do."""

    def alternate(functions, rounds, at_least):
        for function in functions.values():
            jax.block_until_ready(function())
        return {
            name: timing.Timed(np.full(rounds, SECONDS[name]), np.full(rounds, SECONDS[name]))
            for name in functions
        }

    monkeypatch.setattr(timing, "alternate", alternate)


SECONDS = {"slow": 6.0, "slower": 8.0, "ours": 4.0}


def case(**claim) -> Case:
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    work = {"slow": (Phase(300, 0),), "slower": (Phase(300, 0),), "ours": (Phase(100, 5),)}
    sides = {name: Side(jnp.dot, (x, w), work[name], 1) for name in work}
    one = Claim("ours", ("slower", "slow"), **claim)
    return Case("dot", "4 x 8 x 8", (one,), lambda: sides)


def test_a_row_is_against_the_fastest_baseline(in_turn):
    found = measure(case(reach=1.2, ceiling="measured"), PEAKS, 3, 0)
    (row,) = found["rows"]
    assert row["baseline"] == "slow" and row["ratio"] == {"median": 1.5, "low": 1.5, "high": 1.5}
    assert row["reached"] and row["share_of_roofline"] == 0.25
    assert row["ceiling"] == 6.0 and (row["flops"], row["bytes"]) == (100, 5)
    assert found["sides"]["slow"]["roofline_seconds"] == 3.0
    assert found["memory"]["ours"]["weights"] == 256
    assert found["memory"]["ours"]["peak"] >= 256 + 128 + 128
    check([found])
    (row,) = measure(case(ceiling="roofline"), PEAKS, 3, 0)["rows"]
    assert row["ceiling"] == 3.0 and row["reached"] is None


@pytest.mark.parametrize("kind", ["roofline", "measured"])
def test_a_ratio_above_its_ceiling_is_refused(in_turn, kind):
    slow = Peaks({"float32": 10.0}, {0: 1.0}, "made up")
    found = measure(case(ceiling=kind), PEAKS, 3, 0)
    check([found])
    found["rows"][0]["ratio"]["median"] = 99.0
    with pytest.raises(AboveCeiling, match=r"dot \(4 x 8 x 8\): ours is 99.00 times as fast as sl"):
        check([found])
    if kind == "measured":  # peaks that are too low show too
        with pytest.raises(AboveCeiling):
            check([measure(case(ceiling=kind), slow, 3, 0)])


def test_what_is_written(in_turn, tmp_path):
    report = {
        "what": {
            "device": "CPU, Some Maker (R) 3", "cores": 2, "python": "3", "versions": {"jax": "1"},
            "date": "today", "command": "python launch.py", "rounds": 3, "load_before": 0.5,
            "load_after": None,
        },
        "peaks": PEAKS,
        "cases": [measure(case(reach=0.4), PEAKS, 3, 0)],
        "not_run": ["dot: not run: no GPU"],
    }  # fmt: skip
    page = kernel_benchmark.write(tmp_path, report)
    assert page.name == "kernels-cpu-some-maker-r-3-2-cores-jax-1.md"
    text = page.read_text()
    assert "1.50 [1.50, 1.50]" in text and ">= 0.40 (within 2.5x): yes" in text
    assert "not run: no GPU" in text and "before 0.50, after -" in text
    stored = json.loads(page.with_suffix(".json").read_text())
    assert stored["cases"][0]["rows"][0]["ratio"]["median"] == 1.5


# ---- cases ----


@pytest.mark.slow
def test_cases_of_a_cpu_compute_the_same(in_turn):
    """Sides of a case agree, but for FP4 and for what a dense product stands for."""
    for one in kernel_cases.cpu_cases(quick=True):
        outputs = {name: s.function(*s.arguments) for name, s in one.build().items()}
        names = {name for claim in one.claims for name in (claim.candidate, *claim.baselines)}
        assert names == set(outputs)
        if "ours" in outputs:
            for a, b in zip(*(jax.tree.leaves(outputs[n]) for n in ("ours", "ragged_dot")),
                            strict=True):  # fmt: skip
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
        if "FP4, decoded whole" in outputs:
            whole, parts = outputs["FP4, decoded whole"], outputs["FP4, expert by expert"]
            np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-5)
            assert not np.allclose(whole, outputs["float32"], rtol=1e-3)


def test_full_sizes_are_the_tables():
    shapes = "\n".join(f"{c.operation}: {c.shape}" for c in kernel_cases.cpu_cases())
    for text in (
        "T 4,096, 16 experts, 256 -> 256", "T 64, 16 experts, 512 -> 512",
        "T 2,048, S 2,048, 16 heads x 128, k 512", "m = 1024 an expert",
    ):  # fmt: skip
        assert text in shapes
    shapes = "\n".join(f"{c.operation}: {c.shape}" for c in kernel_cases.gpu_cases())
    for text in ("4096 -> 4096", "2048 -> 4096", "S 8,192, 64 heads x 128, k 1,024", "S 65,536"):
        assert text in shapes


def test_cases_of_a_gpu_are_whole():
    """Their sides trace for a GPU, and their claims name them; running them needs one."""
    with compiling_for("gpu"):
        for one in kernel_cases.gpu_cases(quick=True):
            sides = one.build()
            for claim in one.claims:
                assert {claim.candidate, *claim.baselines} <= set(sides)
            for name, side in sides.items():
                if name != "tokamax":
                    assert jax.tree.leaves(jax.eval_shape(side.function, *side.arguments)), name

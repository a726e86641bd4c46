"""The picture of a QAT run's health: what it says of invented runs, healthy and sick."""

from __future__ import annotations

import json

import numpy as np
import pytest

from v4jax.analysis import health_plot
from v4jax.analysis.health_plot import draw, findings, parts_of, series

PARTS = ("routed_experts", "attention")


def run(steps=range(450, 641, 10), **sick):
    """Metrics of a healthy run; sick: "name" -> (first, last value) of the attention's."""
    rng, rows = np.random.default_rng(0), []
    for step in steps:
        done = (step - steps[0]) / (steps[-1] - steps[0])
        rate = 0.1 + 0.45 * (1 + np.cos(np.pi * done))
        row = {"step": step, "loss": 3.3 - 0.2 * done + 0.03 * rng.standard_normal(),
               "lr_scale": rate}  # fmt: skip
        for part in PARTS:
            healthy = {
                "flipped": 0.03 * rate, "update_over_bin": 0.028 * rate, "at_edge": 0.01,
                "scale_flipped": 2e-4 * rate, "saturated": 0.0, "underflowing": 0.11,
                "snr_db": 18.6, "oscillating_often": 0.01 * rate, "oscillating_far": 0.004,
            }  # fmt: skip
            if step % 50 == 0:
                healthy |= {"ste_cosine": 0.96, "over_noise": 2.0, "zero_gradient": 0.02,
                            "scale_spread": 4.0}  # fmt: skip
            for name in healthy.keys() & sick.keys() if part == "attention" else ():
                first, last = sick[name]
                healthy[name] = first + (last - first) * done
            row |= {f"fp4/{part}/{name}": value for name, value in healthy.items()}
        rows.append(row)
    return rows


def test_nothing_is_said_of_a_healthy_run():
    assert findings(run()) == []
    assert findings([]) == [] == findings([{"step": 1, "loss": 3.0}])


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("over_noise", (2.0, 0.5), "the gradient is 0.82 of rounding's noise: FP4 hides it"),
        ("ste_cosine", (0.9, 0.3), "points elsewhere, cosine 0.43"),
        ("oscillating_often", (0.02, 0.125), "oscillate, 12% often, 0.4% far"),
        ("oscillating_far", (0.02, 0.09), "oscillate, 0.1% often, 8.8% far"),
        ("flipped", (0.03, 0.03), "codes flip 10.4 times as often as updates explain"),
        ("at_edge", (0.01, 0.05), "4.9% of weights lie at the edge of their bin, not 1%"),
        ("scale_spread", (6.0, 19.0), "block scales span 2^16 in a tile: FP8 loses values"),
        ("saturated", (0.0, 0.03), "2.9% of weights saturate"),
        ("underflowing", (0.1, 0.5), "49% of weights are rounded to 0"),
        ("scale_flipped", (0.0, 0.02), "1.9% of weights change their scale every step"),
        ("snr_db", (18.0, 15.0), "signal to noise fell by 2.9 dB"),
        ("zero_gradient", (0.1, 0.8), "weights get no gradient"),
    ],
)
def test_each_illness_is_named(name, values, said):
    found = findings(run(**{name: values}))
    assert len(found) == 1 and found[0].startswith("attention: ") and said in found[0], found


def test_the_worst_comes_first():
    rows = run(zero_gradient=(0.9, 0.9), over_noise=(0.5, 0.5))
    rows[7] |= {"spike_onset": 505, "spike_z": 9.0}
    rows[9] |= {"loss": float("nan")}
    found = findings(rows)
    assert [line.split()[0] for line in found] == ["the", "loss", "attention:", "attention:"]
    assert found[0] == "the loss is not finite at 1 logged steps"
    assert found[1] == "loss spikes began at steps 505" and "noise" in found[2]


def test_what_is_drawn_is_what_was_logged():
    rows = run()
    rows[3]["fp4/attention/flipped"] = float("inf")
    assert parts_of(rows) == list(PARTS)
    assert len(series(rows, "attention", "flipped")) == len(rows) - 1
    probed = series(rows, "routed_experts", "ste_cosine")
    assert probed[:, 0].tolist() == [450, 500, 550, 600] and set(probed[:, 1]) == {0.96}


def texts(figure):
    found = [figure.get_suptitle()]
    for axes in figure.axes:
        found += [axes.get_title(loc="left"), *(text.get_text() for text in axes.texts)]
    return " ".join(found)


def test_the_page_says_what_stands_out_and_what_is_missing():
    figure = draw(run(over_noise=(0.6, 0.6)), "qat")
    said = texts(figure)
    assert "qat: what stands out" in said and "0.60 of rounding's noise" in said
    assert "not measured" not in said and "(l) gradient is 0" in said
    plain = draw([{"step": s, "loss": 3.0} for s in (1, 2)])
    assert "nothing: every number" in texts(plain) and texts(plain).count("not measured") == 11
    draw([]).savefig("/dev/null", format="png", dpi=20)


def test_the_command_writes_the_picture(tmp_path, capsys):
    rows = "".join(json.dumps(row) + "\n" for row in run(saturated=(0.0, 0.1)))
    (tmp_path / "metrics.jsonl").write_text(rows)
    health_plot.main([str(tmp_path)])
    assert (tmp_path / "health.png").read_bytes().startswith(b"\x89PNG")
    assert "of weights saturate" in capsys.readouterr().out

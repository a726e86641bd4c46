"""The picture of experts' load, of invented runs."""

import json

import numpy as np
import pytest

from v4jax.analysis import load_plot
from v4jax.analysis.load_plot import draw, table


def run(layers=("layer_0", "layer_2", "layer_10", "mtp"), steps=range(10, 401, 10)):
    """One layer's router collapses from the middle of the run on."""
    rng, rows = np.random.default_rng(0), []
    for step in steps:
        row = {"step": step, "loss": 3.0}
        for i, layer in enumerate(layers):
            sick = max(0.0, step / 400 - 0.5) if layer == "layer_10" else 0.0
            row[f"{layer}/load_max"] = 1.15 + 0.6 * np.exp(-step / 80) + 5 * sick + 0.05 * i
            row[f"{layer}/dead_experts"] = float(round(8 * sick))
            row[f"{layer}/load_entropy"] = 0.98 - sick - 0.01 * rng.uniform()
        rows.append(row)
    return rows


def test_the_table_is_what_was_logged():
    rows = [{"step": 5}, *run(), {"step": 999, "mtp/load_max": 3.0}]
    layers, steps, values = table(rows, "load_max")
    assert layers == ["layer_0", "layer_2", "layer_10", "mtp"]
    assert steps.tolist() == [*range(10, 401, 10), 999] and values.shape == (4, 41)
    assert values[1, 3] == rows[4]["layer_2/load_max"] and values[3, -1] == 3.0
    assert np.isnan(values[:3, -1]).all()


@pytest.mark.parametrize(
    ("rows", "missing"),
    [
        (run(), 0),
        (run(steps=[7]), 0),
        (run(("mtp",)), 0),
        ([{"step": 1, "load_max": 1.2}], 6),
        ([], 6),
    ],
    ids=["run", "one step", "one layer", "none per layer", "empty"],
)
def test_it_is_drawn(rows, missing):
    figure = draw(rows, "qat")
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts.count("not measured") == missing
    assert figure.get_suptitle() == "qat: experts' load"


def test_the_command_writes_the_picture(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run()))
    load_plot.main([str(tmp_path)])
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")

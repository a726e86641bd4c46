"""Why a QAT run goes wrong, on one page: twelve panels by part of the model, and what stands out.

    python -m v4jax.analysis.health_plot runs/demo/qat          writes runs/demo/qat/health.png

From a run's metrics.jsonl alone: the names are `weight_health`'s, `gradient_health`'s and
`remedies`'. What a run did not measure is said to be missing.
"""

from __future__ import annotations

import dataclasses
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from v4jax.style import DASHES, GREY, LIGHT_GREY, MARKERS, SERIES

Rows = Sequence[Mapping[str, Any]]
PARTS = ("routed_experts", "shared_experts", "attention", "MTP_projections", "others")


@dataclasses.dataclass(frozen=True)
class Panel:
    """names: of metrics, drawn as `fp4/<part>/<name>` times `factor`; a second one is thin and
    dashed. good: what to look for. line: a limit. log: the axis."""

    title: str
    names: tuple[str, ...]
    good: str
    factor: float = 1.0
    line: float | None = None
    log: bool = False


QUESTIONS = ("Does it learn?", "Do weights settle?", "Does FP4 hold them?", "What moves?")
"""Of three panels each, the first one the loss."""

PANELS = (
    Panel("gradient's cosine", ("ste_cosine",), "at rounded weights with at masters; 1: equal"),
    Panel("gradient / noise", ("over_noise",), "below 1, FP4's noise hides it", line=1, log=True),
    Panel("codes flipped, % a step", ("flipped", "update_over_bin"),
          "dashed: were weights even in bins; more: swings", 100),
    Panel("oscillating, %", ("oscillating_often", "oscillating_far"),
          "whole: often (fills for 100 steps); dashed: far", 100),
    Panel("at a bin's edge, %", ("at_edge",), "dotted: were weights even in bins", 100, line=1),
    Panel("signal to noise, dB", ("snr_db",), "of rounding; a fall is lost precision"),
    Panel("saturated, or to 0, %", ("saturated", "underflowing"),
          "saturated: whole, rounded to 0: dashed", 100),
    Panel("spread of scales, log2", ("scale_spread",), "in a tile of 128; above 14 FP8 loses",
          line=14),
    Panel("update / bin", ("update_over_bin",), "should follow the learning rate", log=True),
    Panel("scales changed, % a step", ("scale_flipped",), "each moves its whole block", 100),
    Panel("gradient is 0, %", ("zero_gradient",), "as of experts that got no token", 100),
)  # fmt: skip


def save(path: pathlib.Path, rows: Rows, name: str = "") -> None:
    """Draws a run's metrics into a PNG. name: of the run."""
    from v4jax.analysis.figures import save_figure

    save_figure(path, draw(rows, name))


def draw(rows: Rows, name: str = ""):
    """The matplotlib Figure."""
    from v4jax.analysis.figures import styled

    return styled(_page)(rows, name)


# ---- what stands out ----


def findings(rows: Rows) -> list[str]:
    """A line for each thing that a QAT run may die of and that this one shows, the worst first.

    Of the values at the end: means of the last tenth of the lines that have them. That a gradient
    below the noise stalls training, and that scales may span 2^14, is known; the other limits are
    rules of thumb, beyond what healthy runs of ours showed.
    """
    found: list[tuple[int, str]] = []

    def add(order: int, text: str) -> None:
        found.append((order, text))

    finite = [row for row in rows if np.isfinite(row.get("loss", 0.0))]
    if len(finite) < len(rows):
        add(0, f"the loss is not finite at {len(rows) - len(finite)} logged steps")
    onsets = sorted({int(row["spike_onset"]) for row in rows if "spike_onset" in row})
    if onsets:
        add(1, f"loss spikes began at steps {', '.join(map(str, onsets))}")
    for part in parts_of(rows):
        label = part.replace("_", " ")

        def end(name: str, part: str = part) -> float:
            values = series(rows, part, name)[:, 1]
            return float(np.mean(values[-max(1, len(values) // 10) :])) if len(values) else np.nan

        if (value := end("over_noise")) < 1:
            add(2, f"{label}: the gradient is {value:.2f} of rounding's noise: FP4 hides it")
        if (value := end("ste_cosine")) < 0.5:
            add(2, f"{label}: the gradient at rounded weights points elsewhere, cosine {value:.2f}")
        often, far = end("oscillating_often"), end("oscillating_far")
        if often > 0.1 or far > 0.05:
            add(3, f"{label}: weights oscillate, {_percent(often)} often, {_percent(far)} far")
        flipped, moved = end("flipped"), end("update_over_bin")
        if flipped > 2 * moved:
            add(4, f"{label}: codes flip {flipped / moved:.1f} times as often as updates explain")
        if (value := end("at_edge")) > 0.03:
            add(4, f"{label}: {_percent(value)} of weights lie at the edge of their bin, not 1%")
        if (value := end("scale_spread")) > 14:
            add(5, f"{label}: block scales span 2^{value:.0f} in a tile: FP8 loses values")
        if (value := end("saturated")) > 0.01:
            add(5, f"{label}: {_percent(value)} of weights saturate")
        if (value := end("underflowing")) > 0.3:
            add(5, f"{label}: {_percent(value)} of weights are rounded to 0")
        if (value := end("scale_flipped")) > 0.01:
            add(5, f"{label}: {_percent(value)} of weights change their scale every step")
        snr = series(rows, part, "snr_db")
        if len(snr) and (fall := snr[0, 1] - end("snr_db")) > 1:
            add(6, f"{label}: rounding's signal to noise fell by {fall:.1f} dB")
        if (value := end("zero_gradient")) > 0.5:
            add(6, f"{label}: {_percent(value)} of weights get no gradient")
    return [text for _, text in sorted(found, key=lambda pair: pair[0])]


def _percent(share: float) -> str:
    digits = ".0f" if share >= 0.1 else ".2g"
    return f"{100 * share:{digits}}%" if np.isfinite(share) else "unknown"


def parts_of(rows: Rows) -> list[str]:
    """The parts of the model that have any FP4 metric, in the order of PARTS."""
    names = {name for row in rows for name in row}
    return [part for part in PARTS if any(name.startswith(f"fp4/{part}/") for name in names)]


def series(rows: Rows, part: str, name: str) -> np.ndarray:
    """[n, 2]: step and value where it was measured and is finite."""
    key = f"fp4/{part}/{name}" if part else name
    pairs = [(row["step"], row[key]) for row in rows if np.isfinite(row.get(key, np.nan))]
    return np.array(pairs, float).reshape(-1, 2)


# ---- the page ----


def _page(rows: Rows, name: str):
    from matplotlib.lines import Line2D

    from v4jax.analysis.figures import Drawing

    parts, said = parts_of(rows), findings(rows) or ["nothing: every number is where it should be"]
    lines = [line for text in said for line in textwrap.wrap(f"\u2022 {text}", 110)]
    figure = Drawing(7.2, 8.7 + 0.14 * len(lines))
    grid = figure.add_gridspec(4, 3)
    steps = [row["step"] for row in rows]
    for i, panel in enumerate((None, *PANELS)):
        axes = figure.add_subplot(grid[i // 3, i % 3])
        letter = f"({'abcdefghijkl'[i]}) "
        if panel is None:
            _loss(axes, rows, letter)
        else:
            _panel(axes, rows, parts, panel, letter)
        for row in rows:
            if "spike_onset" in row:
                axes.axvline(row["spike_onset"], color=LIGHT_GREY, linewidth=2.5, zorder=0)
        if steps:
            axes.set_xlim(min(steps), max(max(steps), min(steps) + 1))
        axes.locator_params(axis="x", nbins=4, integer=True)
        axes.tick_params(labelsize=7)
        if i % 3 == 0:
            axes.set_ylabel(QUESTIONS[i // 3], fontweight="bold", labelpad=7)
        if i >= 9:
            axes.set_xlabel("step", fontsize=8)
    handles = [Line2D([], [], **_look(part), label=part.replace("_", " ")) for part in parts]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    title = f"{name}: what stands out" if name else "what stands out"
    figure.suptitle("\n".join([title, *lines]), x=0.02, ha="left", fontsize=8)
    return figure


def _look(part: str) -> dict[str, Any]:
    """Colour, dashes and marker of a part; a second metric is thin and dashed instead."""
    i = PARTS.index(part)
    return {"color": SERIES[i], "marker": MARKERS[i % len(MARKERS)], "markersize": 3.5}


def _title(axes, title: str, note: str) -> None:
    axes.set_title(title, pad=12, fontsize=8.5)
    axes.annotate(note, (0, 1), (0, 3), xycoords="axes fraction", textcoords="offset points",
                  fontsize=6, color=GREY)  # fmt: skip


def _loss(axes, rows: Rows, letter: str) -> None:
    loss = series(rows, "", "loss")
    note = "nats a token"
    if any("spike_onset" in row for row in rows):
        note += "; bars: spikes"
    axes.plot(*loss.T, color="black", linewidth=1.1)
    rate = series(rows, "", "lr_scale")
    if len(rate):
        other = axes.twinx()
        other.plot(*rate.T, color=GREY, linewidth=0.9, linestyle=":")
        other.set_ylim(0, 1.5)
        other.set_yticks([])
        other.spines[:].set_visible(False)
        note += "; dotted: learning rate"
    _title(axes, f"{letter}training loss", note)


def _panel(axes, rows: Rows, parts: Sequence[str], panel: Panel, letter: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    _title(axes, letter + panel.title, panel.good)
    drawn = False
    for part in parts:
        for k, name in enumerate(panel.names):
            points = series(rows, part, name)
            if not len(points):
                continue
            drawn = True
            look = _look(part)
            if k:
                look = {"color": look["color"], "linewidth": 0.9, "dashes": DASHES[1]}
            elif len(points) > 12:
                look |= {"markevery": max(1, len(points) // 5)}
            axes.plot(points[:, 0], panel.factor * points[:, 1], **look)
    if not drawn:
        axes.annotate("not measured", (0.5, 0.5), xycoords="axes fraction", ha="center",
                      color=GREY, fontsize=8)  # fmt: skip
        axes.set_yticks([])
        return
    if panel.line is not None:
        axes.axhline(panel.line, color="black", linewidth=0.9, linestyle=":")
    low, high = axes.get_ylim()
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif panel.names == ("ste_cosine",):
        axes.set_ylim(min(low, 0.9), 1.01)
    elif panel.names == ("snr_db",):
        axes.set_ylim(min(low, high - 2), high)
    else:
        axes.set_ylim(0, max(high, 0.01))


def main(argv: Sequence[str]) -> None:
    """`<run folder>`: writes health.png into it."""
    from v4jax.training.files import as_path
    from v4jax.training.metrics import read_metrics

    for argument in argv:
        folder = as_path(argument)
        rows = read_metrics(folder)
        save(folder / "health.png", rows, folder.name)
        print(f"{folder}/health.png", *findings(rows), sep="\n  ")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])

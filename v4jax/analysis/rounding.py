"""What rounding to a block format does to numbers: measured, and drawn.

All of it goes through `v4jax.numerics`; nothing here knows how a format is coded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from v4jax.analysis.figures import Drawing, styled
from v4jax.numerics import MXFP4, Format, fake_quantize, hadamard
from v4jax.style import BLUE, DASHES, GREEN, GREY, LIGHT_GREY, MARKERS, ORANGE, SERIES

KINDS = {
    "uniform": "uniform in [-1, 1]",
    "Gaussian": "normal",
    "Laplace": "Laplace",
    "Student t, 5": "Student's t with 5 degrees of freedom",
    "outliers": "normal, 4 of 128 channels 20 times as large",
}
"""Name -> what `samples` draws."""


def samples(kind: str, rows: int = 4096, width: int = 128, seed: int = 0) -> np.ndarray:
    """float32 [rows, width] of a distribution; `kind` is one of KINDS, ValueError otherwise."""
    if kind not in KINDS:
        raise ValueError(f"samples: unknown kind {kind!r}, allowed: {', '.join(KINDS)}")
    rng, shape = np.random.default_rng(seed), (rows, width)
    if kind == "uniform":
        x = rng.uniform(-1, 1, shape)
    elif kind == "Laplace":
        x = rng.laplace(size=shape)
    elif kind == "Student t, 5":
        x = rng.standard_t(5, shape)
    else:
        x = rng.standard_normal(shape)
    if kind == "outliers":
        x[:, rng.permutation(width)[: width // 32]] *= 20
    return x.astype(np.float32)


def rounded(x: Array | np.ndarray, fmt: Format = MXFP4, rotate: bool = False) -> Array:
    """x [..., n] after rounding to `fmt`; rotate: by Hadamard's matrix before, and back after."""
    return _rounded(jnp.asarray(x), fmt, rotate)


def _round(x: Array, fmt: Format, rotate: bool) -> Array:
    return hadamard(fake_quantize(hadamard(x), fmt)) if rotate else fake_quantize(x, fmt)


_rounded = jax.jit(_round, static_argnums=(1, 2))


def signal_to_noise(x: Array | np.ndarray, fmt: Format = MXFP4, rotate: bool = False) -> float:
    """10 log10 of sum x^2 / sum (rounded x - x)^2, in dB: 6 dB less is twice the error."""
    exact = np.asarray(x, np.float64)
    error = np.asarray(rounded(x, fmt, rotate), np.float64) - exact
    return float(10 * np.log10(np.sum(exact**2) / np.sum(error**2)))


# ---- the figures ----


@styled
def draw_grid(fmt: Format = MXFP4) -> Drawing:
    """(a) what a value becomes beside a block maximum of 6; (b) by what factor it is off."""
    x = np.linspace(-6, 6, 4801, dtype=np.float32)
    blocks = np.zeros((len(x), fmt.tile[-1]), np.float32)
    blocks[:, 0], blocks[:, 1] = x, 6  # the block's largest value sets its scale, here 1
    y = np.asarray(rounded(blocks, fmt))[:, 0]
    figure = Drawing(6.6, 2.7)
    left, right = figure.subplots(1, 2)
    left.plot(x, x, color=LIGHT_GREY, linewidth=1)
    left.plot(x, y, color=BLUE)
    grid = np.unique(np.abs(y))
    left.plot(np.concatenate([-grid, grid]), np.concatenate([-grid, grid]), "o", color=BLUE,
              markersize=3.5)  # fmt: skip
    left.set_xlabel("value, in a block whose scale is 1")
    left.set_ylabel("rounded")
    left.set_xticks(range(-6, 7, 2))
    left.set_yticks([-6, -4, -2, 0, 2, 4, 6])
    left.set_title(f"(a) the {2 * len(grid) - 1} values of {fmt.name.upper()}")
    positive = x > 0
    right.plot(x[positive], 100 * np.abs(y - x)[positive] / x[positive], color=BLUE)
    right.set_xlabel("value")
    right.set_ylabel("error, % of the value")
    right.set_xlim(0, 6)
    right.set_ylim(0, 105)
    right.set_title("(b) relative error")
    return figure


@styled
def draw_errors(found: Mapping[str, Mapping[str, float]]) -> Drawing:
    """Signal to noise: kind of data -> way of rounding -> dB, a marker a way."""
    ways = list(next(iter(found.values())))
    figure = Drawing(6.6, 0.9 + 0.36 * len(found))
    axes = figure.subplots()
    for i, way in enumerate(ways):
        offset = 0.5 * (i - (len(ways) - 1) / 2) / len(ways)
        y = np.arange(len(found)) + offset
        color = SERIES[i % len(SERIES)]
        axes.plot([values[way] for values in found.values()], y, MARKERS[i % 4], color=color,
                  markersize=6, label=way)  # fmt: skip
    for row in range(len(found)):
        axes.axhline(row, color=LIGHT_GREY, linewidth=0.5, zorder=0)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("signal to noise, dB; to the right is better")
    figure.legend(loc="outside right center")
    return figure


@styled
def draw_block(x: np.ndarray, fmt: Format = MXFP4) -> Drawing:
    """One block [n] before and after rounding: as it is, and rotated before and back after."""
    block = np.asarray(x, np.float32)[None]
    figure = Drawing(6.6, 2.7)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, rotate, title in zip(panels, (False, True), ("as it is", "rotated"), strict=True):
        after = np.asarray(rounded(block, fmt, rotate))[0]
        color = GREEN if rotate else ORANGE
        axes.vlines(range(len(after)), block[0], after, color=color, linewidth=1.2)
        axes.plot(block[0], "o", color=GREY, markersize=4, label="exact")
        axes.plot(after, "D" if rotate else "s", color=color, markerfacecolor="white",
                  markersize=4, label="rounded")  # fmt: skip
        lost = np.sum((after == 0) & (block[0] != 0))
        noise = signal_to_noise(block, fmt, rotate)
        axes.set_title(f"({'ab'[rotate]}) {title}: {noise:.1f} dB, {lost} are 0")
        axes.set_xlabel("channel")
        axes.legend(loc="upper right")
    panels[0].set_ylabel("value")
    panels[0].set_yscale("symlog", linthresh=1)
    panels[0].set_yticks([-10, -1, 0, 1, 10], ["\u221210", "\u22121", "0", "1", "10"])
    reach = np.abs(block).max()
    panels[0].set_ylim(-max(4, -2.5 * block.min()), max(2, 2.5 * reach))
    return figure


@styled
def draw_switch(
    curves: Mapping[str, Sequence[float] | np.ndarray],
    switch: int,
    flat: Mapping[str, float] | None = None,
) -> Drawing:
    """Losses over steps on a log scale, the switch, and levels that no training reaches.

    curves: label -> losses; one that is shorter than the first ends where the first ends. flat:
    label -> a level, drawn from the switch on.
    """
    figure = Drawing(6.6, 2.9)
    axes = figure.subplots()
    total = len(next(iter(curves.values())))
    for i, (label, losses) in enumerate(curves.items()):
        steps = np.arange(total - len(losses), total) + 1
        dashes: Any = (0, DASHES[i % 4]) if DASHES[i % 4] else "-"
        axes.plot(steps, losses, color=SERIES[i % len(SERIES)], linestyle=dashes, label=label)
    for i, (label, level) in enumerate((flat or {}).items(), start=len(curves)):
        axes.hlines(level, switch, total, color=SERIES[i % len(SERIES)], linewidth=1.6,
                    linestyle=(0, DASHES[i % 4]), label=label)  # fmt: skip
    axes.axvline(switch, color="black", linewidth=0.9, linestyle=":")
    axes.annotate(" switch", (switch, 0.03), xycoords=("data", "axes fraction"), fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("relative squared error")
    figure.legend(loc="outside right center")
    return figure

"""The picture of a BF16-to-FP4 experiment: four panels in one style, for a paper's column.

(a) training losses, with each arm's distance to the control after the switch; (b) the paired
differences on held-out text; (c) bits per byte beside context models; (d) index recall by layer, or
the experts' bytes where no recall is defined. Colours are Okabe and Ito's, safe for the
colour-blind, and each stands for one thing in all panels; no distinction rests on colour alone.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from v4jax.analysis.findings import (
    DIFFERENCES,
    Scope,
    at,
    baseline,
    number,
    precision,
    scopes,
    side,
)
from v4jax.style import BLUE, GREEN, GREY, LIGHT_GREY, ORANGE
from v4jax.training.context_models import ORDERS

CONTROL = BLUE
SCOPES = {"": ORANGE, "all_linears.": GREEN}  # by the scope's prefix
# Name of the run -> label, colour, line style and width; the later lie upon the earlier.
RUNS: dict[str, tuple[str, str, Any, float]] = {
    "pretrain": ("pre-training, {base}", GREY, "-", 1.6),
    "control": ("control, {base}", CONTROL, "-", 3.2),
    "qat": ("FP4, paper's scope", SCOPES[""], "-", 1.6),
    "qat_all_linears": ("FP4, all linears", SCOPES["all_linears."], (0, (4, 1.5)), 1.6),
}


def save(
    path: pathlib.Path, report: Mapping[str, Any], histories: Mapping[str, Sequence[Mapping]]
) -> None:
    """Draws the report (JSON-able) and the runs' metrics (rows by run name) into a PNG."""
    from v4jax.analysis.figures import save_figure

    save_figure(path, draw(report, histories))


def draw(report: Mapping[str, Any], histories: Mapping[str, Sequence[Mapping]]):
    """The matplotlib Figure."""
    from v4jax.analysis.figures import styled  # 0.3 s, and only the end of an experiment needs it

    return styled(_panels)(report, histories)


def _panels(report: Mapping[str, Any], histories: Mapping[str, Sequence[Mapping]]):
    from matplotlib.lines import Line2D

    from v4jax.analysis.figures import Drawing

    figure = Drawing(6.6, 6.1)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.1, 1))
    _losses(figure.add_subplot(grid[0, 0]), histories, at(report, "what.switch_step"))
    shown = _drawn(report)
    stack = grid[0, 1].subgridspec(len(shown), 1)
    for i, scope in enumerate(shown):
        axes = figure.add_subplot(stack[i])
        _differences(axes, scope, at(report, "seeds.metrics") or {})
        if i == 0:
            axes.set_title("(b) paired differences", pad=18)
        if i == len(shown) - 1:
            axes.set_xlabel("held-out millinats a token")
    _bits_per_byte(figure.add_subplot(grid[1, 0]), report)
    last = figure.add_subplot(grid[1, 1])
    if not _recall(last, at(report, "recall.detail") or {}):
        _expert_bytes(last, report.get("expert_bytes") or {})
    present = ["pretrain", "control", "qat", *(["qat_all_linears"] if len(shown) > 1 else [])]
    base = baseline(report)
    handles = [
        Line2D([], [], color=color, linestyle=style, linewidth=width, label=label.format(base=base))
        for label, color, style, width in (RUNS[name] for name in present)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), handlelength=1.8)
    figure.supxlabel(_caption(report), fontsize=7, color=GREY)
    return figure


def _drawn(report: Mapping[str, Any]) -> list[Scope]:
    """The scopes that have a colour; the tables hold all."""
    return [scope for scope in scopes(report) if scope.prefix in SCOPES]


def _caption(report: Mapping[str, Any]) -> str:
    what = report["what"]
    seeds = "; ticks: every seed" if report.get("seeds") else ""
    return (
        f"{number(what.get('preset'))}, {number(what.get('parameters'), '.2f', 1e-6)}M parameters, "
        f"{number(what.get('tokens'), '.2f', 1e-6)}M tokens, seed {number(what.get('seed'))}; held "
        f"out: {number(what.get('eval_tokens'), ',')} tokens of "
        f"{number(what.get('eval_documents'), ',')} documents.\n(b) bars: 95% bootstrap intervals "
        f"over documents; hollow: holds 0{seeds}.\n{precision(what)}"
    )


# ---- (a) ----


def _losses(axes, histories: Mapping[str, Sequence[Mapping]], switch: int | None) -> None:
    """Losses of the training batches, smoothed; of pre-training and control the raw ones too."""
    curves = {name: _curve(histories.get(name, ())) for name in RUNS}
    before, seen = curves["pretrain"], []
    if switch is not None:  # an earlier run that the arms branch off may have gone on
        before = before[before[:, 0] <= switch]
    for name, (_, color, style, width) in RUNS.items():
        own = before if name == "pretrain" else curves[name]
        if not len(own):
            continue
        # Each arm goes on from pre-training, so the mean runs across the switch.
        whole = np.concatenate([before, curves["control"] if own is before else own])
        whole[:, 1] = _smooth(whole[:, 1], len(whole) // 40)
        cut = max(0, len(before) - 1)
        line = whole[: len(before)] if own is before else whole[cut:]
        axes.plot(*line.T, color=color, linestyle=style, linewidth=width)
        if name in ("pretrain", "control"):
            axes.plot(*own.T, color=color, alpha=0.25, linewidth=0.7, zorder=1)
        seen.append(own)
    axes.set_title("(a) training loss")
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    if not seen:
        return
    if _after_the_switch(axes, curves):
        _make_room(axes, np.concatenate(seen))
    if switch is not None:
        left, right = axes.get_xlim()
        late = switch > (left + right) / 2
        axes.axvline(switch, 0, 0.27, color="black", linewidth=0.9, linestyle=":")
        axes.annotate(
            " switch ", (switch, 0.015), xycoords=("data", "axes fraction"),
            ha="right" if late else "left", fontsize=8,
        )  # fmt: skip


INSET = (0.42, 0.43, 0.56, 0.44)  # left, bottom, width, height in fractions of panel (a)


def _after_the_switch(axes, curves: Mapping[str, np.ndarray]) -> bool:
    """An inset: each arm's loss minus the control's on the same batch; False if there is none."""
    arms = [name for name in RUNS if name not in ("pretrain", "control")]
    lines = {name: _distance(curves[name], curves["control"]) for name in arms}
    lines = {name: line for name, line in lines.items() if len(line)}
    if not lines:
        return False
    inset = axes.inset_axes(INSET)
    for name, line in lines.items():
        _, color, style, width = RUNS[name]
        inset.plot(*line.T, color=color, alpha=0.3, linewidth=0.7)
        smooth = _smooth(line[:, 1], len(line) // 12)
        inset.plot(line[:, 0], smooth, color=color, linestyle=style, linewidth=width)
    inset.axhline(0, color=CONTROL, linewidth=1.2)
    title = "after the switch: FP4 \u2212 control,\nmillinats a token, same batches"
    inset.set_title(title, fontsize=7.5, fontweight="normal", pad=3)
    inset.tick_params(labelsize=7, length=2.5)
    inset.locator_params(nbins=4)
    return True


def _make_room(axes, points: np.ndarray) -> None:
    """Raises the panel's upper limit until no point lies behind the inset."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    behind = points[points[:, 0] > left + (INSET[0] - 0.08) * (right - left), 1]
    needed = low + (behind.max(initial=low) - low) / (INSET[1] - 0.1)
    axes.set_ylim(low, max(high, needed))


def _curve(rows: Sequence[Mapping]) -> np.ndarray:
    """[n, 2]: step and loss of the rows with a finite loss, by step."""
    pairs = [(row["step"], row["loss"]) for row in rows if np.isfinite(row.get("loss", np.nan))]
    return np.array(sorted(pairs), float).reshape(-1, 2)


def _distance(arm: np.ndarray, control: np.ndarray) -> np.ndarray:
    """[n, 2]: step and loss of arm minus control, in millinats, at the steps that both logged."""
    steps, i, j = np.intersect1d(arm[:, 0], control[:, 0], return_indices=True)
    return np.stack([steps, 1000 * (arm[i, 1] - control[j, 1])], axis=1)


def _smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Means over `reach` values to either side; fewer, but as many, at the start, where a loss is
    steep; at the end the past alone counts on."""
    i = np.arange(len(values))
    left = np.minimum(reach, i)
    right = np.minimum(left, len(values) - 1 - i)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[i + right + 1] - sums[i - left]) / (left + right + 1)


# ---- (b) ----


def _differences(axes, scope, seeds: Mapping[str, Any]) -> None:
    """One scope's paired differences; hollow where the interval holds 0, a tick for each seed."""
    color = SCOPES[scope.prefix]
    axes.axvline(0, color="black", linewidth=0.8, zorder=1)
    for y, name in enumerate(DIFFERENCES):
        interval = scope.found.get(name)
        where = side(interval)
        if not where:
            axes.annotate("not defined", (0, y), (4, 0), textcoords="offset points", va="center")
            continue
        mean, low, high = (1000 * interval[key] for key in ("mean", "low", "high"))
        axes.errorbar(
            mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=color, markersize=5.5,
            markerfacecolor="white" if where == "holds" else color, capsize=3, elinewidth=1.6,
        )  # fmt: skip
        label = f"{mean:+.2f}".replace("-", "\u2212")
        axes.annotate(
            label, (mean, y), (0, 5), textcoords="offset points", ha="center", fontsize=8,
            zorder=1.5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
        )  # fmt: skip
        values = at(seeds.get(f"{scope.prefix}{name}.mean"), "values") or []
        known = [1000 * value for value in values if value is not None]
        axes.plot(known, [y + 0.28] * len(known), "|", color=GREY, markersize=5)
    axes.set_yticks(
        range(len(DIFFERENCES)), [n.replace("-", "\u2212") for n in DIFFERENCES.values()]
    )
    axes.set_ylim(len(DIFFERENCES) - 0.5, -0.75)
    axes.margins(x=0.16)
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.annotate(
        scope.label, (0, 1), (0, 3), xycoords="axes fraction", textcoords="offset points",
        color=color, fontsize=8.5, fontweight="bold",
    )  # fmt: skip


# ---- (c) and (d) ----


def _bits_per_byte(axes, report: Mapping[str, Any]) -> None:
    """Bars from zero: context models, then the arms."""
    bits = report["bits_per_byte"]
    rows: list[tuple[str, Any, str, str | None]] = [
        (name.replace("order", "order "), bits.get(name), LIGHT_GREY, None) for name in ORDERS
    ]
    rows.append(("control", bits.get("control"), CONTROL, None))
    for scope in _drawn(report):
        for arm in ("ptq", "qat"):
            hatch = "////" if arm == "ptq" else None
            label = f"{arm.upper()}, {scope.label}"
            rows.append((label, scope.found["bits_per_byte"].get(arm), SCOPES[scope.prefix], hatch))
    rows = [row for row in rows if row[1] is not None]
    for y, (_, value, color, hatch) in enumerate(rows):
        face = "white" if hatch else color
        axes.barh(y, value, 0.72, color=face, edgecolor=color, hatch=hatch, linewidth=0.8)
        axes.annotate(
            f"{value:.3f}", (value, y), (3, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.16 * max((row[1] for row in rows), default=1))
    axes.tick_params(axis="y", length=0)
    axes.set_title("(c) held-out bits per byte")
    axes.set_xlabel("bits a byte, lower is better")


def _recall(axes, detail: Mapping[str, Any]) -> bool:
    """Recall by CSA layer; False, and nothing drawn, where there is none."""
    kinds = {
        "qk": ("$R_{qk}$, QAT", "o", SCOPES[""], SCOPES[""]),
        "score": ("$R_{score}$, QAT", "s", "white", SCOPES[""]),
        "control_qk": ("$R_{qk}$, PTQ", "D", CONTROL, CONTROL),
    }
    shown = {key: at(detail, f"{key}.per_layer") for key in kinds}
    shown = {key: v for key, v in shown.items() if any(one is not None for one in v or ())}
    if not shown:
        return False
    layers = max(map(len, shown.values()))
    for i, (key, values) in enumerate(shown.items()):
        label, marker, face, color = kinds[key]
        x = np.arange(1, len(values) + 1) + 0.12 * (i - (len(shown) - 1) / 2)
        y = np.array(values, float)
        axes.plot(x, y, marker, color=color, markerfacecolor=face, markersize=6, label=label)
    axes.set_xlim(0.5, layers + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("(d) index recall")
    axes.set_xlabel("CSA layer, from the bottom")
    axes.set_ylabel("share of the top-k kept")
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.legend(loc="lower left", handletextpad=0.2)
    low = np.nanmin(np.concatenate(list(shown.values())).astype(float))
    axes.set_ylim(1 - 1.7 * max(1 - low, 0.01), 1 + 0.12 * max(1 - low, 0.01))
    return True


def _expert_bytes(axes, size: Mapping[str, Any]) -> None:
    """Two bars: the routed experts in BF16 and in FP4."""
    axes.set_title("(d) routed experts' weights")
    axes.set_ylabel("MB")
    values = [(size.get("bf16") or 0) / 1e6, (size.get("fp4") or 0) / 1e6]
    axes.bar(["BF16", "FP4"], values, 0.55, color=[CONTROL, SCOPES[""]])
    for x, value in enumerate(values):
        axes.annotate(f"{value:.2f}", (x, value), (0, 2), textcoords="offset points", ha="center")
    axes.set_ylim(0, 1.15 * max(*values, 1e-6))
    axes.set_xlabel(f"ratio {number(size.get('ratio'), '.2f')}")

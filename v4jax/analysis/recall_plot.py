"""The picture of a study of index selections, in the style of `plots.py`.

(a) recall against k, at the longest length, before and after QAT; (b) against length, at the
model's own k; (c) synthetic data, with and without Hadamard; (d) the loss by selection.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from v4jax.analysis.findings import at, number, side
from v4jax.analysis.plots import CONTROL, SCOPES
from v4jax.style import GREY, LIGHT_GREY

CLAIM = 0.997
SHOWN = {  # arm -> label, colour, marker
    "control": ("control", GREY, "D"),
    "ptq": ("before QAT (PTQ)", CONTROL, "s"),
    "qat": ("after QAT", SCOPES[""], "o"),
}
RECALLS: dict[str, tuple[str, Any]] = {
    "qk": ("FP4 QK", "-"),
    "score": ("BF16 scores", (0, (4, 1.5))),
}
SELECTED = {"fp4": "FP4 QK", "bf16": "BF16 scores", "both": "both", "dense": "all entries"}


def save(path: pathlib.Path, report: Mapping[str, Any]) -> None:
    """Draws the report (JSON-able) into a PNG."""
    from v4jax.analysis.figures import save_figure

    save_figure(path, draw(report))


def draw(report: Mapping[str, Any]):
    """The matplotlib Figure."""
    from v4jax.analysis.figures import styled

    return styled(_panels)(report)


def _panels(report: Mapping[str, Any]):
    from v4jax.analysis.figures import Drawing

    trained, made_up = bool(report["arms"]), bool(report["synthetic"])
    figure = Drawing(6.6, 6.1 if trained else 3.4)
    grid = figure.add_gridspec(2 if trained else 1, 2 if trained else 1)
    if trained:
        _against_k(figure.add_subplot(grid[0, 0]), report)
        _against_length(figure.add_subplot(grid[0, 1]), report)
        _losses(figure.add_subplot(grid[1, 1]), report)
        figure.legend(
            handles=_handles(report), loc="outside upper center", ncols=5, handlelength=1.8
        )
    if made_up:
        _synthetic(figure.add_subplot(grid[1, 0] if trained else grid[0, 0]), report)
    figure.supxlabel(_caption(report), fontsize=7, color=GREY)
    return figure


def main_length(report: Mapping[str, Any]) -> str:
    """The training length, or the first measured where that was not; "" without arms."""
    own = str(at(report, "what.sequence_length"))
    lengths: Mapping[str, Any] = next(iter(report["arms"].values()), {})
    return own if own in lengths else next(iter(lengths), "")


def _handles(report: Mapping[str, Any]):
    from matplotlib.lines import Line2D

    arms = [
        Line2D([], [], color=color, marker=marker, linestyle="", label=label)
        for arm, (label, color, marker) in SHOWN.items()
        if arm in report["arms"]
    ]
    kinds = [
        Line2D([], [], color="black", linestyle=style, label=label)
        for label, style in RECALLS.values()
    ]
    return [*arms, *kinds]


def _caption(report: Mapping[str, Any]) -> str:
    what = report["what"]
    parts = []
    if report["arms"]:
        parts.append(
            f"Trained for {number(what.get('steps'), ',')} steps on {what.get('sequence_length')} "
            f"tokens, k = {what.get('index_topk')}; thin lines: 5th percentile of the queries; "
            "dotted: 0.997, the report's recall of BF16 scores."
        )
        parts.append("(d) 95% bootstrap intervals over documents; hollow: holds 0.")
    if report["synthetic"]:
        sizes = next(iter(report["synthetic"].values()))
        parts.append(f"Synthetic: {list(sizes)[-1]} entries, all of them visible.")
    return "\n".join(parts)


def _line(axes, x, tables: list, arm: str, name: str) -> list[float]:
    """One arm's recall over x, None where not defined; the 5th percentile below it, thin."""
    _, color, marker = SHOWN[arm]
    _, style = RECALLS[name]
    mean, low = (
        np.array([at(one, f"{name}.{key}") for one in tables], float) for key in ("mean", "p5")
    )
    axes.plot(x, mean, color=color, linestyle=style, marker=marker, markersize=4, linewidth=1.4)
    axes.plot(x, low, color=color, linestyle=style, linewidth=0.5, alpha=0.7)
    return [float(v) for v in np.concatenate([mean, low]) if np.isfinite(v)]


def _recall_axes(axes, seen: list[float], ticks: list[int]) -> None:
    axes.axhline(CLAIM, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylabel("share of the top-k kept")
    low = min(seen, default=0.9)
    axes.set_ylim(1 - 1.08 * (1 - low), 1 + 0.05 * (1 - low))


def _against_k(axes, report: Mapping[str, Any]) -> None:
    longest = max(int(n) for arm in report["arms"].values() for n in arm)
    seen: list[float] = []
    ks: list[str] = []
    for arm in SHOWN:
        found = at(report["arms"], f"{arm}.{longest}.recall") or {}
        ks = ks or list(found)
        for name in RECALLS if found else ():
            seen += _line(axes, [int(k) for k in found], list(found.values()), arm, name)
    axes.set_title(f"(a) recall against k, length {longest:,}")
    axes.set_xlabel("k")
    _recall_axes(axes, seen, [int(k) for k in ks])


def _against_length(axes, report: Mapping[str, Any]) -> None:
    own = at(report, "what.index_topk")
    seen: list[float] = []
    lengths: list[int] = []
    for arm in SHOWN:
        found = report["arms"].get(arm) or {}
        lengths = lengths or [int(n) for n in found]
        tables = [at(one, f"recall.{own}") for one in found.values()]
        for name in RECALLS if found else ():
            seen += _line(axes, [int(n) for n in found], tables, arm, name)
    axes.set_title(f"(b) recall against length, k = {own}")
    axes.set_xlabel("tokens a window")
    _recall_axes(axes, seen, lengths)


def _synthetic(axes, report: Mapping[str, Any]) -> None:
    """A row a kind: FP4 with and without rotation, BF16 scores, for the smallest and largest k."""
    marks = {
        "qk_unrotated": ("FP4 QK, no Hadamard", "s", "white"),
        "qk": ("FP4 QK", "s", SCOPES[""]),
        "score": ("BF16 scores", "^", SCOPES["all_linears."]),
    }
    kinds = list(report["synthetic"])
    for y, kind in enumerate(kinds):
        ks = list(report["synthetic"][kind].values())[-1]
        axes.axhline(y, color=LIGHT_GREY, linewidth=0.5, zorder=0)
        ends = [list(ks.items())[i] for i in (0, -1)] if ks else []
        for shift, (k, tables) in zip((-0.16, 0.16), ends, strict=False):
            for name, (_, marker, face) in marks.items():
                value = at(tables, f"{name}.mean")
                edge = SCOPES["all_linears."] if name == "score" else SCOPES[""]
                if value is not None:
                    axes.plot(
                        value, y + shift, marker, color=edge, markerfacecolor=face, markersize=5
                    )
            axes.annotate(
                f"k {k}", (0, y + shift), (2, 0), xycoords=("axes fraction", "data"),
                textcoords="offset points", fontsize=6, va="center", color=GREY,
            )  # fmt: skip
    for label, marker, face in marks.values():
        edge = SCOPES["all_linears."] if marker == "^" else SCOPES[""]
        axes.plot([], [], marker, color=edge, markerfacecolor=face, markersize=5, label=label)
    names = [kind.replace("_", "-\n").replace("positive", "Gaussian,\nw > 0") for kind in kinds]
    axes.set_yticks(range(len(kinds)), [n.replace("gauss", "Gauss") for n in names])
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.axvline(CLAIM, color="black", linewidth=0.8, linestyle=":")
    left, right = axes.get_xlim()
    axes.set_xlim(left - 0.16 * (right - left), right)
    axes.set_title("(c) synthetic data")
    axes.set_xlabel("share of the top-k kept")
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=3, fontsize=7,
                columnspacing=0.8, handletextpad=0.1)  # fmt: skip


def _losses(axes, report: Mapping[str, Any]) -> None:
    """Differences to the exact selection, by arm, at the main length."""
    length = main_length(report)
    arms = [arm for arm in SHOWN if at(report["arms"], f"{arm}.{length}.loss")]
    axes.axvline(0, color="black", linewidth=0.8, zorder=1)
    for i, arm in enumerate(arms):
        _, color, marker = SHOWN[arm]
        for y, name in enumerate(SELECTED):
            interval = at(report["arms"], f"{arm}.{length}.loss.{name}")
            where = side(interval)
            if not where or interval is None:
                continue
            mean, low, high = (1000 * interval[key] for key in ("mean", "low", "high"))
            axes.errorbar(
                mean, y + 0.2 * (i - (len(arms) - 1) / 2), xerr=[[mean - low], [high - mean]],
                fmt=marker, color=color, markerfacecolor="white" if where == "holds" else color,
                markersize=4.5, capsize=2, elinewidth=1.2,
            )  # fmt: skip
    axes.set_yticks(range(len(SELECTED)), SELECTED.values())
    axes.set_ylim(len(SELECTED) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=5)
    axes.set_title("(d) loss against exact selection's")
    axes.set_xlabel(f"held-out millinats a token, length {length}")

"""The study of index selections on paper: a table on the terminal, JSON, Markdown and a picture.

All come from one nested dict, the report, whose keys `recall_study.py` describes: `what`, `sizes`,
`arms`, `paired`, `synthetic`.
"""

import json
import pathlib
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from v4jax.analysis import recall_plot
from v4jax.analysis.findings import SIDES, at, millinats, number, side
from v4jax.analysis.report import bullets, fenced, jsonable
from v4jax.analysis.synthetic import KINDS
from v4jax.training.metrics import table
from v4jax.training.run_config import write_atomically

NAME = "indexer_recall"
CLAIM = 0.997
"""The report's recall (5.2.1), of a top-k selector that BF16 scores make twice as fast."""
COMPARED = {
    "qk": "FP4 QK",
    "qk_unrotated": "FP4 QK, no Hadamard",
    "score": "BF16 scores",
    "score_unrotated": "BF16 scores, no Hadamard",
    "both": "FP4 QK and BF16 scores",
    "score_alone": "BF16 scores of unrounded QK",
    "qk_bf16": "BF16 QK",
}
CHANGES = {
    "fp4": "FP4 QK",
    "bf16": "BF16 scores",
    "both": "FP4 QK and BF16 scores",
    "dense": "all visible entries",
}
ARMS = {"control": "control", "ptq": "PTQ", "qat": "QAT"}

Row = tuple[str, str, str, Mapping[str, Any]]


def write_report(folder: pathlib.Path, report: Mapping[str, Any]) -> None:
    """Writes indexer_recall.json, .md and .png into `folder`, each as a whole."""
    report = jsonable(report)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, allow_nan=False)
    write_atomically(folder / f"{NAME}.json", text + "\n")
    write_atomically(folder / f"{NAME}.md", markdown(report))
    recall_plot.save(folder / f"{NAME}.png", report)


def summary(report: Mapping[str, Any]) -> str:
    """The report for a terminal: recalls at the model's own k, losses, and what they mean."""
    report = jsonable(report)
    own = str(at(report, "what.index_topk"))
    largest = {kind: f"{list(sizes)[-1]} entries" for kind, sizes in report["synthetic"].items()}
    rows = [row for row in _recalls(report) if largest.get(row[0]) == row[1] or row[2] == own]
    parts = [_short_table(rows), _losses(report)]
    lines = [textwrap.fill(x, 100, subsequent_indent="    ") for x in sentences(report)]
    return "\n\n".join([*filter(None, parts), "\n".join(lines)])


def markdown(report: Mapping[str, Any]) -> str:
    """`indexer_recall.md`."""
    what = report["what"]
    sections = [
        "# Which entries the indexer selects in FP4 and with BF16 scores",
        f"![Recall against k and length; loss by selection]({NAME}.png)",
        _what_was_run(what),
        bullets("## What came out", sentences(report)),
        DEFINITIONS,
    ]
    rows = list(_recalls(report))
    for name in COMPARED:
        part = _full_table(rows, name)
        if part:
            sections.append(f"## {COMPARED[name]}\n\n{part}")
    if report["arms"]:
        sections.append(
            "## What it does to the loss\n\n"
            "Held-out loss of each arm's weights under other selections, against the exact one of "
            "the same weights: millinats a token, paired on the same windows, with 95% bootstrap "
            f"intervals over documents.\n\n{_losses(report)}"
        )
        paired = _paired(report)
        if paired:
            sections.append(
                "## What QAT changes\n\nMean recall of QAT minus that of PTQ, paired by query, "
                f"with 95% bootstrap intervals over documents.\n\n{paired}"
            )
    if report["synthetic"]:
        kinds = [f"{_kind(kind)}: {KINDS[kind]}" for kind in report["synthetic"]]
        sections.append(bullets("## The synthetic data", kinds))
    return "\n\n".join(sections) + "\n"


DEFINITIONS = """## What the numbers are

Recall of a selection against another: |top-k of one intersect top-k of the other| / k, over queries
with more than k visible entries, lowest index first among equal scores in both. The DeepSeek-V4
report gives 99.7% (5.2.1) and no definition; this is ours.

- R_qk: FP4 query and key against the same activations unrounded, float32 scores in both. Rotated by
  a Hadamard matrix before rounding, as released, unless it says otherwise.
- R_score: BF16 scores against float32 scores of the same FP4 query and key.
- Mass: the share of the reference's score mass that the selection keeps: the softmax of the
  reference's scores over the visible entries, summed over the entries selected, divided by the same
  sum over the reference's own selection. Defined for scores below 0 too. The indexer's loss trains
  this softmax towards the attention of its layer; of synthetic data its temperature means nothing.

Arms: control computes unrounded; PTQ is the control in the forward pass of QAT, never trained with
FP4; QAT was trained with it. Lengths beyond the training length are extrapolation."""


def sentences(report: Mapping[str, Any]) -> list[str]:
    """What the numbers say, of themselves."""
    found = []
    length, own = recall_plot.main_length(report), str(at(report, "what.index_topk"))
    for arm in report["arms"]:
        tables = at(report["arms"], f"{arm}.{length}.recall.{own}") or {}
        score, qk = at(tables, "score.mean"), at(tables, "qk.mean")
        if score is None or qk is None:
            text = f"no query sees more than {own} entries"
            found.append(f"{_arm(arm)}, length {length}: recall is not defined, {text}.")
            continue
        found.append(
            f"{_arm(arm)}, length {length}, k = {own}: BF16 scores keep {score:.4f} of the "
            f"selection ({_claim(score)} {CLAIM}, the report's figure, which is about them); FP4 "
            f"query and key keep {qk:.4f}."
        )
    for name, label in (("qk", "R_qk"), ("score", "R_score")):
        interval = at(report["paired"], f"{length}.{own}.{name}")
        where = side(interval)
        if where and interval is not None:
            verdict = {
                "below": "QAT lowers it",
                "holds": "no change is resolved",
                "above": "QAT raises it",
            }[where]
            mean, low, high = (100 * interval[key] for key in ("mean", "low", "high"))
            found.append(
                f"{label} of QAT minus PTQ: {mean:+.2f} [{low:+.2f}, {high:+.2f}] points, "
                f"{SIDES[where]}: {verdict}."
            )
    for arm in report["arms"]:
        for at_length, one in report["arms"][arm].items():
            interval = at(one, "loss.both")
            where = side(interval)
            if where and at_length == length:
                meaning = {"below": "lowers", "holds": "is not told apart from", "above": "raises"}
                found.append(
                    f"{_arm(arm)}: FP4 query and key with BF16 scores instead of the exact "
                    f"selection: {millinats(interval)} millinats a token, {SIDES[where]}: it "
                    f"{meaning[where]} the loss of the exact one."
                )
    return [*found, *_synthetic_sentence(report)]


def _synthetic_sentence(report: Mapping[str, Any]) -> list[str]:
    """The least and the most of the kinds, at the smallest k and the largest number of entries."""
    rows = {}
    for kind, sizes in report["synthetic"].items():
        size, ks = list(sizes.items())[-1]
        for k, tables in list(ks.items())[:1]:
            rows[kind] = (k, size, {name: at(tables, f"{name}.mean") for name in COMPARED})
    if not rows:
        return []
    k, size, _ = next(iter(rows.values()))
    parts = []
    for name in ("qk", "qk_unrotated", "score"):
        means = {kind: means[name] for kind, (_, _, means) in rows.items()}
        known = {kind: mean for kind, mean in means.items() if mean is not None}
        if known:
            low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
            parts.append(
                f"{COMPARED[name]} {known[low]:.3f} ({_kind(low)}) to {known[high]:.3f} "
                f"({_kind(high)})"
            )
    return [f"Synthetic data, k = {k} of {size} entries: recall of " + "; of ".join(parts) + "."]


def _claim(score: float) -> str:
    return "at or above" if score >= CLAIM else "below"


def _arm(name: str) -> str:
    return ARMS.get(name, name.replace("qat_", "QAT, ").replace("_", " "))


def _kind(name: str) -> str:
    return name.replace("_", "-").replace("positive", "Gaussian, w > 0").replace("gauss", "Gauss")


def _recalls(report: Mapping[str, Any]) -> Iterator[Row]:
    """(arm or kind, length or number of entries, k, table) of everything measured."""
    for arm, lengths in report["arms"].items():
        for length, one in lengths.items():
            for k, tables in one["recall"].items():
                yield arm, f"{length} tokens", k, tables
    for kind, sizes in report["synthetic"].items():
        for size, ks in sizes.items():
            for k, tables in ks.items():
                yield kind, f"{size} entries", k, tables


def _label(name: str) -> str:
    return _kind(name) if name in KINDS else _arm(name)


def _short_table(rows: list[Row]) -> str:
    columns = ("qk", "qk_unrotated", "score", "score_unrotated", "both")
    lines = []
    for name, size, k, tables in rows:
        means = [at(tables, f"{column}.mean") for column in columns]
        if any(mean is not None for mean in means):
            mass = at(tables, "both.mass.mean")
            lines.append((_label(name), size, k, *means, at(tables, "both.p5"), mass))
    headers = (
        "data", "of", "k", "R_qk", "no Hadamard", "R_score", "no Hadamard", "both",
        "both, 5th pct", "both, mass",
    )  # fmt: skip
    return table(lines, headers)


def _full_table(rows: list[Row], name: str) -> str:
    lines = []
    for data, size, k, tables in rows:
        one = tables.get(name)
        if one is None:
            continue
        numbers = [one[key] for key in ("mean", "p5", "min")]
        mass = [at(one, f"mass.{key}") for key in ("mean", "p5", "min")]
        layers = zip(*(one[f"per_layer{key}"] for key in ("", "_p5", "_min")), strict=True)
        per_layer = "; ".join("/".join(f"{x:.3f}" for x in layer) for layer in layers)
        lines.append(
            (_label(data), size, k, *numbers, *mass, one["queries"])
            + (per_layer if len(one["per_layer"]) > 1 else "-",)
        )
    headers = (
        "data", "of", "k", "recall", "5th pct", "minimum", "mass", "5th pct", "minimum", "queries",
        "per CSA layer",
    )  # fmt: skip
    return table(lines, headers) if lines else ""


def _losses(report: Mapping[str, Any]) -> str:
    rows = [
        (_arm(arm), int(length), one["loss"]["exact"])
        + tuple(millinats(one["loss"].get(name)) for name in CHANGES)
        for arm, lengths in report["arms"].items()
        for length, one in lengths.items()
        if one.get("loss")
    ]
    headers = ("arm", "length", "exact, nats", *(f"{x}, mnats" for x in CHANGES.values()))
    return table(rows, headers) if rows else ""


def _paired(report: Mapping[str, Any]) -> str:
    rows = []
    for length, ks in report["paired"].items():
        for k, found in ks.items():
            cells = []
            for name in ("qk", "score", "both"):
                one = found.get(name)
                values = [at(one, key) for key in ("mean", "low", "high")]
                mean, low, high = (number(value, "+.4f") for value in values)
                cells.append(f"{mean} [{low}, {high}]" if one else None)
            if any(cells):
                rows.append((f"{length} tokens", k, *cells))
    headers = ("of", "k", *(COMPARED[name] for name in ("qk", "score", "both")))
    return table(rows, headers) if rows else ""


def _what_was_run(what: Mapping[str, Any]) -> str:
    versions = what.get("versions") or {}
    lines = [f"Date: {number(what.get('date'))}"]
    if what.get("workdir"):
        lines += [
            f"Runs: {what['workdir']}, trained for {number(what.get('steps'), ',')} steps on rows "
            f"of {number(what.get('sequence_length'))} tokens; index of "
            f"{number(what.get('index_heads'))} heads x {number(what.get('index_width'))}, k = "
            f"{number(what.get('index_topk'))}, an entry for {number(what.get('ratio'))} tokens",
            f"Text: {number(what.get('corpus'))}",
        ]
    lines += [
        f"Machine: {number(what.get('device'))}, {number(what.get('cores'))} cores; Python "
        f"{number(what.get('python'))}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"Seconds: {number(what.get('seconds'), ',.0f')}",
    ]
    return bullets(f"## What was run\n\n{fenced(what.get('command') or '-', 'sh')}", lines)

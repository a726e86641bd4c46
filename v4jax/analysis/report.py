"""The end of an experiment on paper: report.json, report.md, report.png, a table on the terminal.

All come from one nested dict, the report; `v4jax.analysis.findings` says what its numbers mean, and
`v4jax.analysis.plots` draws them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from v4jax.analysis import findings, health_plot, load_plot, plots
from v4jax.analysis.findings import DIFFERENCES, SIDES, at, listed, millinats, number, scopes
from v4jax.training.context_models import ORDERS
from v4jax.training.metrics import read_metrics, table
from v4jax.training.run_config import write_atomically

_OF_A_SCOPE = (
    *(f"{kind}.{arm}" for kind in ("loss", "bits_per_byte") for arm in ("control", "ptq", "qat")),
    "ptq_gap_closed",
    *(f"{name}.mean" for name in DIFFERENCES),
)
OVER_SEEDS = (
    *_OF_A_SCOPE,
    *(f"all_linears.{path}" for path in _OF_A_SCOPE),
    *("recall.qk", "recall.score", "router_agreement.control_qat.mean", "seconds_per_step.ratio"),
)
"""The numbers, by path, whose mean and spread `attach_seeds` gives."""


def write_report(
    folder: pathlib.Path, report: Mapping[str, Any], runs: Mapping[str, pathlib.Path]
) -> None:
    """Writes `report.json`, `report.md`, `report.png` and `result.json`, each as a whole; and
    `health_<run>.png` of each run in FP4, and `load.png`, of the control's experts.

    Args:
      folder: created if it is not there.
      report: the experiment's numbers; floats that are not finite are written as null.
      runs: name -> folder of the runs whose metrics.jsonl are drawn: pretrain, control, qat,
        qat_all_linears; any of them may be missing.
    """
    report = jsonable(report)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    write_atomically(folder / "report.md", markdown(report))
    histories = {name: read_metrics(run) for name, run in runs.items()}
    plots.save(folder / "report.png", report, histories)
    for name, rows in histories.items():
        if any(key.startswith("fp4/") for key in (rows[-1] if rows else ())):
            health_plot.save(folder / f"health_{name}.png", rows, name)
    if histories.get("control"):
        load_plot.save(folder / "load.png", histories["control"], "control")
    write_atomically(folder / "result.json", json.dumps(result(report), indent=1) + "\n")


def result(report: Mapping[str, Any]) -> dict[str, float]:
    """The report's main numbers, name -> number: what a sweep's report compares.

    Losses and differences in nats a token, on the report's scope and, where it is there, over all
    linears; what is not finite is left out.
    """
    found = {"bits_per_byte": report["bits_per_byte"]["control"]}
    for scope in scopes(report):
        prefix = scope.prefix.replace(".", "_")
        losses = scope.found["loss"]
        found |= {f"{prefix}{arm}_loss": losses[arm] for arm in ("control", "ptq", "qat")}
        for name in ("ptq_minus_control", "qat_minus_control", "qat_minus_ptq"):
            found[prefix + name] = scope.found[name]["mean"]
    found |= {f"index_recall_{name}": report["recall"][name] for name in ("qk", "score")}
    found["expert_bytes_ratio"] = report["expert_bytes"]["ratio"]
    found["seconds_per_step"] = report["seconds_per_step"]["bf16"]
    return {name: value for name, value in found.items() if value is not None}


def summary(report: Mapping[str, Any]) -> str:
    """The report for a terminal: a table of the arms, and what its intervals mean."""
    report = jsonable(report)
    what = report["what"]
    lines = [f"{findings.headline(what)}.", findings.precision(what)]
    lines.append(findings.context_models(report))
    for scope in scopes(report):
        lines += [
            "",
            str(scope),
            *(f"  {text}" for text in findings.sentences(scope, findings.baseline(report))),
        ]
    lines += ["", *findings.costs(report), *findings.over_seeds(report)]
    wrapped = (textwrap.fill(line, 100, subsequent_indent="    ") for line in lines)
    return "\n".join([_arms(report), "", *wrapped])


def attach_seeds(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What belongs under `seeds` in a report, from the reports of all seeds: {"seeds": [...],
    "metrics": {path: {"values", "mean", "std"}}} for each path of OVER_SEEDS that one of them has.

    mean and std (n - 1) are over the values that are defined; std is None for fewer than two.
    Raises ValueError without reports.
    """
    if not reports:
        raise ValueError("attach_seeds: got no reports, allowed: one or more")
    reports = [jsonable(report) for report in reports]
    metrics = {}
    for path in OVER_SEEDS:
        values = [at(report, path) for report in reports]
        known = [value for value in values if value is not None]
        if known:
            std = statistics.stdev(known) if len(known) > 1 else None
            metrics[path] = {"values": values, "mean": statistics.fmean(known), "std": std}
    return {"seeds": [at(report, "what.seed") for report in reports], "metrics": metrics}


def jsonable(value: Any) -> Any:
    """Dicts, lists, strings and numbers alone: arrays become lists, dataclasses dicts, and floats
    that are not finite None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    elif hasattr(value, "tolist"):  # an array or a scalar of NumPy or JAX
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, int | str) else str(value)


# ---- report.md ----


def markdown(report: Mapping[str, Any]) -> str:
    """`report.md`: what was run, what came out, and what the intervals mean."""
    sections = [
        f"# {findings.headline(report['what'])}",
        "![Training loss, paired differences, bits per byte, index recall](report.png)",
        _what_was_run(report["what"]),
        _results(report),
        _gap_by_part(report),
        _choices(report),
        bullets("## Bytes, seconds, recall", findings.costs(report)),
        _events(report.get("events") or {}),
        _continuation(report.get("continuation") or {}),
        _seeds(report),
        "The DeepSeek-V4 report puts FP4 QAT in post-training; a switch late in pre-training is "
        "this project's own question.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _events(events: Mapping[str, Sequence[str]]) -> str:
    """Spikes, steps left out, returns to a checkpoint, of every run that had any."""
    lines = [f"{run}: {event}" for run, found in events.items() for event in found]
    return bullets("## Events", lines) if lines else ""


def _what_was_run(what: Mapping[str, Any]) -> str:
    def show(key: str, spec: str = "") -> str:
        return number(what.get(key), spec)

    versions = {"jax": what.get("jax"), "flax": what.get("flax"), **(what.get("versions") or {})}
    seconds = what.get("seconds") or {}
    lines = [
        f"Date: {show('date')}",
        f"Model: preset {show('preset')}, {show('parameters', ',')} parameters",
        f"Training: {show('steps', ',')} steps of {show('batch_size')} x {show('sequence_length')} "
        f"tokens, {show('tokens', ',')} in all; FP4 from step {show('switch_step', ',')} on; "
        f"learning rate {show('learning_rate')}; seed {show('seed')}",
        f"Precision: {findings.precision(what)}",
        f"Text: {show('corpus')} (hash `{show('corpus_hash')}`); tokenizer {show('tokenizer')} of "
        f"{show('vocab_size', ',')} entries, {show('bytes_per_token', '.3f')} bytes a token",
        f"Held out: {show('eval_documents', ',')} documents, {show('eval_windows', ',')} windows, "
        f"{show('eval_tokens', ',')} tokens, {show('eval_bytes', ',')} bytes",
        f"Machine: {show('device')}, {show('cores')} cores; Python {show('python')}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "Seconds: " + ", ".join(f"{name} {number(s, ',.0f')}" for name, s in seconds.items()),
    ]
    return bullets(f"## What was run\n\n{fenced(what.get('command') or '-', 'sh')}", lines)


def _arms(report: Mapping[str, Any]) -> str:
    """The table of arms and context models, for Markdown and the terminal."""
    bits = report["bits_per_byte"]
    base = findings.baseline(report)
    rows: list[tuple] = [
        (f"control, {base}", report["loss"]["control"], bits["control"], None, None)
    ]
    for scope in scopes(report):
        loss, own = scope.found["loss"], scope.found["bits_per_byte"]
        gap, won, left = (millinats(scope.found.get(name)) for name in DIFFERENCES)
        rows.append((f"PTQ, {scope.label}", loss["ptq"], own["ptq"], gap, None))
        rows.append((f"QAT, {scope.label}", loss["qat"], own["qat"], left, won))
    for name in ORDERS:
        label = f"context model, {name.replace('order', 'order ')}"
        rows.append((label, None, bits.get(name), None, None))
    headers = ("arm", "nats/token", "bits/byte", "minus control", "minus PTQ")
    return table(rows, headers)


def _results(report: Mapping[str, Any]) -> str:
    base = findings.baseline(report)
    parts = [
        f"## What came out\n\n{_arms(report)}",
        "Differences in millinats (0.001 nats) a token, paired on the same windows, with 95% "
        "bootstrap intervals over held-out documents; they hold for the weights of this run, and "
        f"another seed adds a spread of its own. Control: {base} to the end. PTQ: the control's "
        "final weights rounded to FP4. QAT: trained in FP4 from the switch on, on the control's "
        "data in the control's order.",
        *(
            bullets(str(scope), findings.sentences(scope, findings.baseline(report)))
            for scope in scopes(report)
        ),
        findings.context_models(report),
    ]
    return "\n\n".join(part for part in parts if part)


def _gap_by_part(report: Mapping[str, Any]) -> str:
    rows = [
        (scope.label, part, millinats(interval), SIDES.get(side, "not defined"))
        for scope in scopes(report)
        for part, interval in (scope.found.get("gap_by_part") or {}).items()
        for side in [findings.side(interval)]
    ]
    if not rows:
        return ""
    windows = number(at(report, "what.part_windows"), ",")
    return (
        "## The gap by part\n\n"
        f"PTQ - control with that part alone in FP4, millinats a token, on the first {windows} "
        "windows. The gaps of the parts need not add up.\n\n"
        + table(rows, ("scope", "in FP4", "PTQ - control", "95% interval"))
    )


def _choices(report: Mapping[str, Any]) -> str:
    """What FP4 changes in the choices of indexers and routers."""
    rows: list[tuple] = []
    names = {"qk": "R_qk, QAT", "score": "R_score, QAT"}
    names |= {"control_qk": "R_qk, PTQ", "control_score": "R_score, PTQ"}
    for key, name in names.items():
        one = at(report, f"recall.detail.{key}") or {}
        values = [one.get(field) for field in ("mean", "min", "p5", "queries")]
        rows.append((name, *values, listed(one.get("per_layer"))))
    recalls = table(rows, ("recall", "mean", "minimum", "5th pct", "queries", "per CSA layer"))
    names = {"control_qat": "control and QAT", "control_ptq": "control and PTQ"}
    rows = []
    for key, name in names.items():
        one = at(report, f"router_agreement.{key}") or {}
        rows.append((name, one.get("mean"), listed(one.get("per_layer"))))
    return (
        "## What indexers and routers choose\n\n"
        "R_qk: the share of the top-k entries that FP4 query and key have in common with the same "
        "activations unrounded. R_score: that of BF16 index scores with float32 scores of the same "
        "FP4 query and key. Over the queries with more than top-k visible entries, lowest index "
        "first among equal scores. PTQ is the control, never trained with FP4.\n\n"
        f"{recalls}\n\n{table(rows, ('experts chosen by both', 'share', 'per routed layer'))}"
    )


def _continuation(found: Mapping[str, Any]) -> str:
    arms = {"prompt": "The prompt", "control": "Continued by control", "qat": "Continued by QAT"}
    blocks = [f"{label}:\n\n{fenced(found[key])}" for key, label in arms.items() if found.get(key)]
    return "\n\n".join(["## One prompt, continued", *blocks]) if blocks else ""


def _seeds(report: Mapping[str, Any]) -> str:
    if not report.get("seeds"):
        return ""
    rows = [
        (name, *(number(one[key], ".5f") for key in ("mean", "std")), listed(one["values"], ".5f"))
        for name, one in report["seeds"]["metrics"].items()
    ]
    numbers = table(rows, ("over seeds", "mean", "std", "each"))
    return f"{bullets('## Seeds', findings.over_seeds(report))}\n\n{numbers}"


def bullets(heading: str, lines: Sequence[str]) -> str:
    """A heading and a Markdown list below it; "" without lines."""
    return heading + "\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""


def fenced(text: str, language: str = "") -> str:
    """A Markdown code block that no text can end; what does not print becomes U+FFFD."""
    text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"

"""What the numbers of a BF16-to-FP4 experiment say, as sentences that follow from them alone.

The numbers are one nested dict, the report (experiments/bf16_to_fp4.py fills it): nats a token, and
intervals {"mean", "low", "high"}, each the mean of a paired difference over held-out text with its
95% bootstrap interval. None stands for what is not defined, anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

DIFFERENCES = {
    "ptq_minus_control": "PTQ - control",
    "qat_minus_ptq": "QAT - PTQ",
    "qat_minus_control": "QAT - control",
}
SIDES = {"below": "wholly below 0", "holds": "which holds 0", "above": "wholly above 0"}

_MEANING = {
    ("ptq_minus_control", "below"): "rounding to FP4 without training lowers the held-out loss",
    ("ptq_minus_control", "holds"): "what rounding to FP4 without training costs is not resolved",
    ("ptq_minus_control", "above"): "rounding to FP4 without training raises the held-out loss",
    ("qat_minus_ptq", "below"): "training in FP4 beats rounding afterwards",
    ("qat_minus_ptq", "holds"): "training in FP4 and rounding afterwards are not told apart",
    ("qat_minus_ptq", "above"): "training in FP4 is worse than rounding afterwards",
    ("qat_minus_control", "below"): "the model trained in FP4 ends better than the one in BF16",
    ("qat_minus_control", "holds"): "the models trained in FP4 and in BF16 are not told apart",
    ("qat_minus_control", "above"): "the model trained in FP4 ends worse than the one in BF16",
}


class Scope(NamedTuple):
    """What was rounded: its name, what that means, the prefix of its paths in the report, its part
    of the report, and to what."""

    label: str
    meaning: str
    prefix: str
    found: Mapping[str, Any]
    format: str = "FP4"

    def __str__(self) -> str:
        return f"{self.label[0].upper()}{self.label[1:]} ({self.meaning}):"


WIDER = {
    "all_linears": (
        "all linears",
        "the paper's scope and every other linear map but embedding, head, routers and "
        "hyper-connections",
        "FP4",
    ),
    "all_linears_fp8": (
        "all linears, FP8",
        "the same weights in FP8, whose rounding is finer: how far two trainings part anyway",
        "FP8",
    ),
}


def scopes(report: Mapping[str, Any]) -> list[Scope]:
    """The scopes that were run, the paper's first."""
    paper = "routed experts, MTP's too, and the indexer's query and key"
    found = [Scope("paper's scope", paper, "", report)]
    for key, part in report.items():
        if isinstance(part, Mapping) and "ptq_minus_control" in part:
            own = (key.replace("_", " "), "as v4jax.quantization.SCOPES has it", "its formats")
            name, meaning, to = WIDER.get(key, own)
            found.append(Scope(name, meaning, f"{key}.", part, to))
    return found


def side(interval: Mapping[str, Any] | None) -> str:
    """Where an interval lies: "below", "holds" (0) or "above"; "" where it is not defined."""
    if any(at(interval, key) is None for key in ("mean", "low", "high")):
        return ""
    assert interval is not None
    if interval["low"] <= 0 <= interval["high"]:
        return "holds"
    return "below" if interval["high"] < 0 else "above"


def sentences(scope: Scope, base: str) -> list[str]:
    """What each difference of a scope means, and the share of the gap that QAT closes.

    base: what the control computed in, as `baseline` says.
    """
    found = []
    for name, label in DIFFERENCES.items():
        interval = scope.found.get(name)
        where = side(interval)
        if not where:
            found.append(f"{label} is not defined.")
            continue
        meaning = _MEANING[name, where].replace("FP4", scope.format).replace("BF16", base)
        found.append(f"{label} = {millinats(interval)} millinats, {SIDES[where]}: {meaning}.")
    return [*found, _gap_closed(scope.found)]


def _gap_closed(found: Mapping[str, Any]) -> str:
    """On (PTQ - QAT) / (PTQ - control), which means little unless there is a gap."""
    share, gap = found.get("ptq_gap_closed"), side(found.get("ptq_minus_control"))
    if gap == "holds":
        return "The share of the gap that QAT closes is not defined: the gap's interval holds 0."
    if gap == "below":
        return "There is no gap to close: PTQ ends better than the control."
    if share is None:
        return "The share of the gap that QAT closes is not defined."
    interval = found.get("ptq_gap_closed_interval")
    where = side(interval)
    between = f" [{interval['low']:.0%}, {interval['high']:.0%}]" if interval and where else ""
    if where == "holds":
        unsure = "an interval that holds 0: whether QAT narrows or widens the gap is not resolved"
        return f"QAT closes {share:.0%}{between} of the gap, {unsure}."
    return f"QAT closes {share:.0%}{between} of the gap{': it widens it' if share < 0 else ''}."


def context_models(report: Mapping[str, Any]) -> str:
    """The control's bits a byte against the order-3 context model's; "" where one is missing."""
    control, order3 = at(report, "bits_per_byte.control"), at(report, "bits_per_byte.order3")
    if control is None or order3 is None:
        return ""
    where = "below" if control < order3 else "not below"
    return (
        f"The control's {control:.3f} bits a byte are {where} the {order3:.3f} of an order-3 "
        "context model on the same text."
    )


def costs(report: Mapping[str, Any]) -> list[str]:
    """What FP4 saves in bytes, costs in seconds, and changes in the indexer's choices."""
    return [
        text for text in (_bytes(report), _seconds(report), _recall(report), _fp8(report)) if text
    ]


def _bytes(report: Mapping[str, Any]) -> str:
    size = report.get("expert_bytes") or {}
    if size.get("ratio") is None:
        return ""
    return (
        f"Routed experts: {number(size.get('bf16'), ',')} bytes in BF16, "
        f"{number(size.get('fp4'), ',')} in FP4, {size['ratio']:.2f} times fewer."
    )


def _seconds(report: Mapping[str, Any]) -> str:
    pace = report.get("seconds_per_step") or {}
    if pace.get("ratio") is None:
        return ""
    low, high = number(pace.get("ratio_low"), ".3f"), number(pace.get("ratio_high"), ".3f")
    return (
        f"A QAT step takes {pace['ratio']:.3f} times as long as an unquantized one (quartiles "
        f"{low} and {high} of {number(pace.get('pairs'))} pairs alternated in one process): "
        f"{number(pace.get('qat'), '.3f')} s against {number(pace.get('bf16'), '.3f')} s. "
        "Both compute in the same dtype: FP4 is simulated in training."
    )


def _recall(report: Mapping[str, Any]) -> str:
    recall = report.get("recall")
    if not recall:
        return ""
    if recall.get("qk") is None and recall.get("score") is None:
        return "Index recall is not defined: no query sees more than top-k entries."
    return (
        f"Index recall of QAT: R_qk {number(recall.get('qk'), '.4f')} (FP4 query and key against "
        f"unrounded), R_score {number(recall.get('score'), '.4f')} (BF16 scores against float32)."
    )


def _fp8(report: Mapping[str, Any]) -> str:
    share = report.get("fp8_lossless_share")
    if share is None:
        return ""
    part = "all" if share == 1 else f"{share:.4%}"
    return f"FP8 holds {part} of the 128x128 tiles of the FP4 weights without loss."


def over_seeds(report: Mapping[str, Any]) -> list[str]:
    """For each scope QAT - PTQ over the seeds: mean, spread, how often below 0; [] for one seed."""
    metrics = at(report, "seeds.metrics") or {}
    found = []
    for scope in scopes(report):
        metric = metrics.get(f"{scope.prefix}qat_minus_ptq.mean")
        if metric is not None:
            known = [value for value in metric["values"] if value is not None]
            spread = number(metric["std"], ".2f", 1000)
            found.append(
                f"Over the seeds {listed(at(report, 'seeds.seeds'), '')}, {scope.label}: QAT - PTQ "
                f"is {number(metric['mean'], '+.2f', 1000)} millinats with standard deviation "
                f"{spread}, below 0 in {sum(value < 0 for value in known)} of {len(known)}."
            )
    return found


def headline(what: Mapping[str, Any]) -> str:
    """Model, size, length and switch."""
    return (
        f"From BF16 to FP4: {number(what.get('preset'))}, "
        f"{number(what.get('parameters'), '.2f', 1e-6)}M parameters, "
        f"{number(what.get('steps'), ',')} steps, switched at step "
        f"{number(what.get('switch_step'), ',')}"
    )


def baseline(report: Mapping[str, Any]) -> str:
    """What the arms that are not quantized really computed in: "BF16", or what stood in for it."""
    dtype = number(at(report, "what.compute_dtype"))
    return "BF16" if dtype == "bfloat16" else dtype


def precision(what: Mapping[str, Any]) -> str:
    """What "BF16" was on the device that ran."""
    dtype, device = number(what.get("compute_dtype")), number(what.get("device"))
    if dtype == "bfloat16":
        return f"BF16 is bfloat16 in the model's matmuls, over float32 masters, on {device}."
    return f"{dtype} on {device} stands in for BF16: the model's matmuls run in {dtype}."


def millinats(interval: Mapping[str, Any] | None) -> str | None:
    """`+1.40 [+1.10, +1.70]`: an interval in thousandths of a nat; None where it is not defined."""
    if not side(interval):
        return None
    mean, low, high = (number(at(interval, key), "+.2f", 1000) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def number(value: Any, spec: str = "", scale: float = 1) -> str:
    """A value, times `scale`, as text; "-" for None."""
    if value is None:
        return "-"
    return format(value * scale if scale != 1 else value, spec)


def listed(values: Sequence[Any] | None, spec: str = ".4f") -> str | None:
    """Values with commas between; None if there are none."""
    return ", ".join(number(value, spec) for value in values) if values else None


def at(tree: Any, path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree

"""What FP4 cost and saved: every arm on the same held-out windows, as one report dict.

`report.py` writes and draws what this measures.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from v4jax import packing
from v4jax.analysis.evaluation import (
    Evaluator,
    bits_per_byte,
    per_token,
    router_agreement,
)
from v4jax.analysis.findings import at
from v4jax.analysis.paired import Interval, Paired
from v4jax.inference.generate import generate
from v4jax.model import Transformer
from v4jax.quantization import (
    NO_QUANTIZATION,
    PARTS,
    Quantization,
    lossless_share,
    quantized,
)
from v4jax.training.journal import read_events
from v4jax.training.metrics import read_metrics
from v4jax.training.recovery import describe
from v4jax.training.switch import Arms
from v4jax.training.trainer import Trainer

PART_WINDOWS = 256  # of the gaps part by part
CHOICE_WINDOWS = 64  # of recall and router agreement


def compare(evaluator: Evaluator, arms: Arms) -> dict:
    """The report's losses, intervals, recalls, agreements and bytes; see report.py for its keys.

    The paper's scope stands at the top level, others under their names (None: not run).
    """
    windows, paired = evaluator.windows, Paired(evaluator.windows)
    control = evaluator.nll(arms.control.params, arms.control.variables)
    gaps = gap_by_part(evaluator, arms, control[:PART_WINDOWS])
    report: dict = {"all_linears": None}
    for scope, state in arms.qat.items():
        quantization = arms.scopes[scope]
        ptq = evaluator.nll(arms.control.params, arms.control.variables, quantization)
        qat = evaluator.nll(state.params, state.variables, quantization)
        nlls = {"control": control, "ptq": ptq, "qat": qat}
        closed = paired.gap_closed(control, ptq, qat)
        found = {
            "loss": {name: per_token(nll, windows) for name, nll in nlls.items()},
            "bits_per_byte": {name: bits_per_byte(nll, windows) for name, nll in nlls.items()},
            "ptq_minus_control": _interval(paired.difference(ptq, control)),
            "qat_minus_control": _interval(paired.difference(qat, control)),
            "qat_minus_ptq": _interval(paired.difference(qat, ptq)),
            "ptq_gap_closed": closed and closed.mean,
            "ptq_gap_closed_interval": closed and _interval(closed),
            "gap_by_part": {p: gap for p, gap in gaps.items() if PARTS[p] in quantization.rules},
        }
        report |= found if scope == "paper" else {scope: found}
    report |= selection(evaluator, arms, CHOICE_WINDOWS)
    trained = arms.qat["paper"]
    report["expert_bytes"] = expert_bytes(evaluator.program.bind(trained.params, trained.variables))
    lossless = lossless_share(arms.scopes["paper"], arms.qat["paper"].params)
    report["fp8_lossless_share"] = float(lossless(arms.qat["paper"].params))
    return report


def _interval(interval: Interval) -> dict[str, float]:
    return dataclasses.asdict(interval)


def gap_by_part(evaluator: Evaluator, arms: Arms, base: np.ndarray) -> dict:
    """PTQ - control with each part of any scope alone in FP4, on the first windows.

    base: the control's nll on them.
    """
    control, count = arms.control, len(base)
    paired = Paired(evaluator.windows, count)
    rules = {rule for scope in arms.scopes.values() for rule in scope.rules}
    gaps = {}
    for part, rule in PARTS.items():
        if rule in rules and not rule[0].startswith("mtp/"):  # MTP is no part of this loss
            nll = evaluator.nll(control.params, control.variables, Quantization((rule,)), count)
            gaps[part] = _interval(paired.difference(nll, base))
    return gaps


def selection(evaluator: Evaluator, arms: Arms, count: int) -> dict:
    """Index recall of the QAT arm and of the control rounded after training; router agreement."""
    quantization, control, qat = arms.scopes["paper"], arms.control, arms.qat["paper"]
    plain = evaluator.choices(control.params, control.variables, NO_QUANTIZATION, count)
    ptq = evaluator.choices(control.params, control.variables, quantization, count)
    trained = evaluator.choices(qat.params, qat.variables, quantization, count)
    top_k = evaluator.program.config.index_topk
    recall, untrained = trained.recalls(top_k), ptq.recalls(top_k)
    learned = [
        i for i, kind in enumerate(evaluator.program.config.mlp_layer_types) if kind == "moe"
    ]
    return {
        "recall": {
            "qk": at(recall, "qk.mean"),
            "score": at(recall, "score.mean"),
            "detail": recall | {f"control_{name}": found for name, found in untrained.items()},
        },
        "router_agreement": {
            "control_qat": router_agreement(plain, trained, learned),
            "control_ptq": router_agreement(plain, ptq, learned),
        },
    }


def phase_seconds(arms: Arms) -> dict[str, float | None]:
    """Median seconds a step of each run, from its metrics, without the first that compiles."""
    seconds = {
        name: [row["seconds_per_step"] for row in read_metrics(folder)][1:]
        for name, folder in arms.folders.items()
    }
    return {name: float(np.median(v)) if v else None for name, v in seconds.items()}


def events(arms: Arms) -> dict[str, list[str]]:
    """A line for each thing that happened to a run: spikes, steps left out, returns."""
    return {run: [describe(e) for e in read_events(at)] for run, at in arms.folders.items()}


def expert_bytes(model: Transformer) -> dict:
    """Bytes of the routed experts in BF16 and in FP4: counted on the arrays of the packed model."""
    packed = packing.pack_experts(model)
    in_bf16 = [w.astype(jnp.bfloat16) for w in packing.expert_arrays(model)]
    bf16, fp4 = (sum(w.nbytes for w in ws) for ws in (in_bf16, packing.expert_arrays(packed)))
    return {"bf16": bf16, "fp4": fp4, "ratio": bf16 / fp4}


def continuations(trainer: Trainer, arms: Arms, documents, num_bytes: int = 200) -> dict:
    """`num_bytes` bytes continued by control and QAT from the same prompt and the same draws.

    The prompt is the beginning of the first of the (name, text) documents that is long enough.
    """
    text = next((text for _, text in documents if len(text) > 400), documents[0][1])
    prompt = text[:240]
    tokenizer, length = trainer.tokenizer, trainer.config.sequence_length
    ids = np.concatenate([[tokenizer.bos_id], tokenizer.encode(prompt)]).astype(np.int32)

    def continued(state, quantization: Quantization) -> str:
        model = quantized(trainer.program.bind(state.params, state.variables), quantization)
        produced = generate(
            model,
            ids,
            num_bytes,  # a token is a byte or more
            length=length,
            temperature=0.8,
            seed=trainer.config.seed,
            forbid=(tokenizer.bos_id,),
        )
        return tokenizer.decode_bytes(produced)[:num_bytes].decode("utf-8", "replace")

    return {
        "prompt": prompt,
        "control": continued(arms.control, NO_QUANTIZATION),
        "qat": continued(arms.qat["paper"], arms.scopes["paper"]),
    }

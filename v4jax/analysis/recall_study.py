"""What rounding does to the indexer's choice, and its choice to the loss.

`recall_report.py` writes and draws what this measures; `recall.py` says what recall and mass are.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from v4jax.analysis import recall, synthetic
from v4jax.analysis.evaluation import Choices, Evaluator, per_token
from v4jax.analysis.paired import Paired
from v4jax.layers.context import UNROUNDED, IndexFormats
from v4jax.numerics import MXFP4
from v4jax.quantization import PAPER, Quantization
from v4jax.training.corpus import Document, load_corpus, split
from v4jax.training.data import Dataset, EvalWindows, evaluation_windows
from v4jax.training.run import Run, load_run
from v4jax.training.step import Program, split_model

SELECTIONS = {
    "fp4": IndexFormats(query=MXFP4, key=MXFP4),
    "bf16": IndexFormats(scores="bf16"),
    "both": IndexFormats(query=MXFP4, key=MXFP4, scores="bf16"),
}
"""What the loss is measured under, beside the exact selection: FP4 query and key, BF16 scores."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """Weights, and what they are rounded to in the forward pass.

    params, variables: of `program`. run: the run that they are from.
    """

    name: str
    run: Run
    program: Program
    params: Any
    variables: Any
    quantization: Quantization


def load_arms(workdir: pathlib.Path, names: Sequence[str]) -> list[Arm]:
    """Arms of the experiment bf16_to_fp4 in `workdir`: control, ptq, qat, qat_<scope>.

    control computes unrounded. ptq: the same weights in the forward pass of qat. Raises ValueError,
    one line, where one is missing or was not trained to its end.
    """
    runs: dict[str, Run] = {}
    arms = []
    for name in names:
        folder = "control" if name == "ptq" else name
        if folder not in runs:
            if not (workdir / folder / "config.json").is_file():
                raise ValueError(
                    f"--arms: {workdir / folder} holds no run; `python launch.py "
                    f"--experiment=bf16_to_fp4 --workdir={workdir}` trains control and qat"
                )
            runs[folder] = load_run(workdir / folder)
        run = runs[folder]
        total = run.config.schedule.total_steps
        if run.step != total:
            raise ValueError(f"--arms: {workdir / folder} is at step {run.step} of {total}")
        quantization = PAPER if name == "ptq" else run.config.quantization
        program = Program.of(run.model)
        arms.append(Arm(name, run, program, *split_model(run.model), quantization))
    return arms


def held_out(run: Run, data: str | None) -> tuple[str, tuple[Document, ...]]:
    """The corpus' description and the documents that the run was not trained on.

    data: as the experiment took it. Raises ValueError where it is not the run's.
    """
    corpus = load_corpus(data)
    train, rest = split(corpus)
    found = Dataset.build(train.documents, run.tokenizer).hash
    if found != run.config.data:
        raise ValueError(
            f"--data: these are not the documents that the run was trained on (their hash is "
            f"{found[:12]}, the run's {run.config.data[:12]}); name the run's own, and the Python "
            "whose standard library it was"
        )
    return corpus.description, rest.documents


@dataclasses.dataclass(frozen=True)
class Sizes:
    """lengths: tokens of a window. top_ks: of the recalls; the model's own k is added.
    recall_tokens, loss_tokens: about so many tokens of each length."""

    lengths: tuple[int, ...]
    top_ks: tuple[int, ...]
    recall_tokens: int
    loss_tokens: int


BATCH_TOKENS = 4096


def study(arms: Sequence[Arm], documents: Sequence[Document], sizes: Sizes) -> dict:
    """{"arms": {arm: {length: {"recall": {k: table}, "loss": {...}}}}, "paired": {...}}.

    loss: `exact` (nats a token), `windows`, `documents` and, for each of SELECTIONS and for `dense`
    (every visible entry attended to), the paired difference to exact. paired: length -> k -> recall
    -> what the first arm trained in FP4 has more of than ptq, where both are among the arms.
    """
    found: dict[str, dict] = {arm.name: {} for arm in arms}
    pairs: dict[str, dict] = {}
    for length in sizes.lengths:
        chosen: dict[str, Choices] = {}
        for arm in arms:
            windows = evaluation_windows(
                documents, arm.run.tokenizer, length, max(1, sizes.loss_tokens // length)
            )
            evaluator = Evaluator(arm.program, windows, max(1, BATCH_TOKENS // length))
            top_ks = tuple(sorted({*sizes.top_ks, arm.program.config.index_topk}))
            count = max(1, sizes.recall_tokens // length)
            choices = evaluator.choices(
                arm.params, arm.variables, arm.quantization, count, top_ks, recall.all_comparisons
            )
            found[arm.name][str(length)] = {
                "recall": {str(k): choices.recalls(k) for k in top_ks},
                "loss": loss(evaluator, arm),
            }
            chosen[arm.name] = choices
            print(f"measured {arm.name} at length {length}", flush=True)
        trained = next((a.name for a in arms if a.name.startswith("qat")), None)
        if trained and "ptq" in chosen:
            pairs[str(length)] = {
                str(k): {
                    name: recall_difference(windows, chosen[trained], chosen["ptq"], k, name)
                    for name in ("qk", "score", "both")
                }
                for k in top_ks
            }
    return {"arms": found, "paired": pairs}


def loss(evaluator: Evaluator, arm: Arm) -> dict:
    """Held-out loss of the arm by selection: exact, and the differences to it."""
    windows, paired = evaluator.windows, Paired(evaluator.windows)

    def nll(index: IndexFormats, dense: bool = False) -> np.ndarray:
        arrays = arm.params, arm.variables, arm.quantization
        return evaluator.nll(*arrays, index=index, dense_index=dense)

    exact = nll(UNROUNDED)
    others = {name: nll(formats) for name, formats in SELECTIONS.items()}
    others["dense"] = nll(UNROUNDED, dense=True)
    return {
        "exact": per_token(exact, windows),
        "windows": len(windows.tokens),
        "documents": paired.documents,
        **{name: dataclasses.asdict(paired.difference(n, exact)) for name, n in others.items()},
    }


def recall_difference(
    windows: EvalWindows, a: Choices, b: Choices, top_k: int, name: str
) -> dict[str, float] | None:
    """Mean recall of a minus that of b, paired by query, over documents; None if undefined."""
    count = len(a.mask)
    if not a.keeps:  # too short for an entry, or no layer that selects
        return None
    values = [
        np.mean([layer[top_k][name].recall for layer in choices.keeps], axis=0)
        for choices in (a, b)
    ]
    counted = a.mask & np.isfinite(values[0])
    if not counted.any():
        return None
    some = EvalWindows(
        windows.tokens[:count], counted, windows.document[:count], windows.num_bytes[:count]
    )
    sums = (np.where(counted, value, 0).sum(axis=1, dtype=np.float64) for value in values)
    return dataclasses.asdict(Paired(some).difference(*sums))


def synthetic_study(
    kinds: Sequence[str], entries: Sequence[int], top_ks: Sequence[int], queries: int, seed: int
) -> dict:
    """Kind -> number of entries -> k -> table, of queries that see all entries."""
    found: dict[str, dict] = {}
    for kind in kinds:
        found[kind] = {}
        for size in entries:
            operands = synthetic.operands(kind, queries, size, seed=seed)
            keeps = recall.keeps(
                operands, 1, tuple(k for k in top_ks if k < size), recall.all_comparisons(), size
            )
            found[kind][str(size)] = {str(k): recall.table([kept]) for k, kept in keeps.items()}
        print(f"measured {kind} data", flush=True)
    return found


def describe(run: Run) -> dict:
    """What a reader of the report must know of the run."""
    model = run.config.model
    return {
        "steps": run.step,
        "sequence_length": run.config.sequence_length,
        "index_topk": model.index_topk,
        "index_heads": model.index_n_heads,
        "index_width": model.index_head_dim,
        "ratio": model.compress_rates.compressed_sparse_attention,
        "compute_dtype": run.config.compute_dtype,
    }

"""Measure what the indexer still selects in FP4 and with BF16 scores, before and after QAT.

DeepSeek's report (5.2.1) gives 99.7% recall at twice the speed; that is about BF16 scores. What FP4
query and key cost is measured apart from it: on the arms that experiment bf16_to_fp4 trained in the
same folder, on their held-out text, and on synthetic data; with and without the Hadamard rotation,
for several k and lengths, with the score mass kept and what the selection does to the loss.

    python launch.py --experiment=indexer_recall --workdir=runs/demo
    python launch.py --experiment=indexer_recall --workdir=runs/any --arms=     synthetic data alone
"""

import shlex
import sys
import time

from absl import flags

from v4jax.training import command
from v4jax.training.files import as_path

NAME = "indexer_recall"
integer, names = flags.DEFINE_integer, flags.DEFINE_list
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "[run] Folder of the runs, or gs://BUCKET/PATH; the result goes there too.",
    required=True,
)
QUICK = flags.DEFINE_bool("quick", False, "[run] Shrink all that you do not set: a smoke test.")
SEED = integer("seed", 0, "[run] Of the synthetic data.", 0)

ARMS = names("arms", "control,ptq,qat", "[arms] control, ptq, qat, qat_<scope>; none if empty.")
DATA = flags.DEFINE_string(
    "data", None, "[arms] Text that the runs were trained on. Default: your Python's."
)
LENGTHS = names("lengths", "256,512,1024", "[arms] Tokens of a window.")
TOP_K = names("top_k", "4,8,16,32,64", "[arms] k of the recalls, beside the model's own.")
RECALL_TOKENS = integer("recall_tokens", 16384, "[arms] Of each length, for recalls.", 1)
LOSS_TOKENS = integer("loss_tokens", 65536, "[arms] Of each length, for losses.", 1)

KINDS = names(
    "synthetic",
    "gaussian,positive,outliers,clustered,near_duplicates",
    "[synthetic] Kinds of data; none if empty.",
)
ENTRIES = names("entries", "1024,4096", "[synthetic] Numbers of entries.")
QUERIES = integer("queries", 256, "[synthetic] Queries of 16 heads x 128.", 1)
SYNTHETIC_K = names("synthetic_top_k", "64,128,512", "[synthetic] k of the recalls.")

SMALL = {
    "lengths": ["64"],
    "top_k": ["2"],
    "recall_tokens": 512,
    "loss_tokens": 512,
    "entries": ["256"],
    "queries": 32,
    "synthetic_top_k": ["16", "64"],
}


def numbers(flag) -> tuple[int, ...]:
    """The whole numbers above 0 of a list flag."""
    if not all(text.strip().isdecimal() and int(text) for text in flag.value):
        raise ValueError(f"--{flag.name}={','.join(flag.value)}: allowed: numbers above 0, commas")
    return tuple(sorted({int(text) for text in flag.value}))


def main():
    from v4jax.analysis import provenance, recall_report, recall_study

    began, workdir = time.perf_counter(), as_path(WORKDIR.value)
    sizes = recall_study.Sizes(
        numbers(LENGTHS), numbers(TOP_K), RECALL_TOKENS.value, LOSS_TOKENS.value
    )
    what = provenance.environment() | {"experiment": NAME, "seed": SEED.value}
    report: dict = {"arms": {}, "paired": {}}
    arms = recall_study.load_arms(workdir, ARMS.value)
    if arms:
        corpus, documents = recall_study.held_out(arms[0].run, DATA.value)
        what |= recall_study.describe(arms[0].run) | {"workdir": str(workdir), "corpus": corpus}
        report = recall_study.study(arms, documents, sizes)
    report["synthetic"] = recall_study.synthetic_study(
        KINDS.value, numbers(ENTRIES), numbers(SYNTHETIC_K), QUERIES.value, SEED.value
    )
    report["what"] = what | {
        "command": shlex.join(["python", "launch.py", f"--experiment={NAME}", *sys.argv[1:]]),
        "seconds": time.perf_counter() - began,
    }
    recall_report.write_report(workdir, report)
    print(recall_report.summary(report), flush=True)


if __name__ == "__main__":
    command.run(main, quick=SMALL)

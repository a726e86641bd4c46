"""One process that evaluates, over and over, until test_processes.py ends it.

    python -m tests.training.evaluation_worker FOLDER TIMES SECONDS

Who is who comes from the environment; each batch takes SECONDS. Says on stdout each evaluation that
it begins.
"""

import sys
import time

import numpy as np

from tests.training import tiny
from v4jax import distributed
from v4jax.analysis.evaluation import Evaluator
from v4jax.layers.context import UNROUNDED
from v4jax.training.data import evaluation_windows

ROWS = 4


def main(times: int, seconds: float) -> None:
    distributed.start()
    _, documents, tokenizer = tiny.documents()
    windows = evaluation_windows(documents, tokenizer, tiny.LENGTH, 10 * ROWS)
    evaluator = Evaluator(tiny.trainer().program, windows, ROWS)

    def nll(*_):
        time.sleep(seconds)
        return np.zeros(ROWS)

    evaluator._nll = nll  # compiles nothing; the loop over batches is the real one
    for i in range(times):
        print("evaluation", i + 1, flush=True)
        evaluator.nll({}, {}, index=UNROUNDED)
    print("done", flush=True)


if __name__ == "__main__":
    with distributed.errors_end_at_once():
        main(int(sys.argv[2]), float(sys.argv[3]))

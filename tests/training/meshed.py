"""The tiny run on a mesh: eight rows of 29 tokens a step, and two layers that are scanned over."""

from __future__ import annotations

from jax.sharding import Mesh

from tests.training import tiny
from v4jax import parallel
from v4jax.config import CSA
from v4jax.training.trainer import Trainer

ROWS, LENGTH = 8, 29
"""Of no axis of a parameter is the length a factor, nor the number of CSA's entries, 7."""


def model():
    """Two layers alike, without MTP: one block to compile."""
    return tiny.model(
        layer_types=(CSA, CSA),
        mlp_layer_types=("moe", "moe"),
        num_nextn_predict_layers=0,
        scan_layers=True,
    )


def trainer(mesh: Mesh | None, **changes) -> Trainer:
    """A trainer of `tiny.config` with this model and `changes`, of this process's share."""
    dataset, _, tokenizer = tiny.documents()
    fields = {"model": model(), "batch_size": ROWS, "sequence_length": LENGTH}
    run = tiny.config(dataset.hash, **fields | changes)
    batches = dataset.batches(run.sequence_length, run.batch_size, run.seed, *parallel.share(mesh))
    return tiny.QuickTrainer(run, batches.rows, dataset.token_counts(), tokenizer, mesh)

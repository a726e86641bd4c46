"""The process that test_resume.py kills: two runs, to the switch in BF16 and on from it in QAT.

    python tests/training/resume_worker.py FOLDER [STEP]

Says on stdout where it is; kills itself before the checkpoint of STEP would be there, if asked.
"""

import functools
import os
import pathlib
import signal
import sys

from tests.training import tiny
from v4jax.quantization import PAPER
from v4jax.training import checkpoint
from v4jax.training.checkpoint import Checkpointer
from v4jax.training.files import as_path
from v4jax.training.observe import Pace
from v4jax.training.remedies import RemedyConfig
from v4jax.training.run import Branch, train
from v4jax.training.schedule import ScheduleConfig
from v4jax.training.stability import StabilityConfig

SWITCH, STEPS = tiny.SWITCH, tiny.STEPS
PACE = Pace(log_every=2, save_every=3, keep=(SWITCH,))


def say(*words) -> None:
    print(*words, flush=True)


def speak_of_checkpoints(die_before: int | None) -> None:
    """`saving N` when a save of step N has been handed to its thread; `restored RUN N`."""
    save, restore, write = Checkpointer.save, Checkpointer.restore, checkpoint.write_atomically

    @functools.wraps(save)
    def spoken_save(self, step, *arguments, **options):
        saved = save(self, step, *arguments, **options)
        say("saving", step)
        return saved

    @functools.wraps(restore)
    def spoken_restore(self, *arguments, **options):
        restored = restore(self, *arguments, **options)
        say("restored", self.folder.parent.name, restored and restored.step)
        return restored

    def deadly_write(path, text):  # the record is the last file of a checkpoint
        if path.parent.name == f"tmp-{die_before}":
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, text)

    Checkpointer.save, Checkpointer.restore = spoken_save, spoken_restore
    checkpoint.write_atomically = deadly_write


def trainer() -> tiny.QuickTrainer:
    """Every phase of the recipe within a few steps: dense, the indexer alone, sparse; short rows
    and small batches, then whole ones; a remedy that remembers, where there is QAT."""
    schedule = ScheduleConfig(
        STEPS,
        warmup_steps=2,
        decay_start=0.7,
        dense_until=2,
        indexer_warmup=3,
        lengths=((0, tiny.LENGTH // 2), (5, tiny.LENGTH)),
        batch_sizes=((0, tiny.BATCH_SIZE // 2), (5, tiny.BATCH_SIZE)),
    )
    stability = StabilityConfig(skip_sigma=6.0)
    return tiny.trainer(
        schedule=schedule, stability=stability, remedies=RemedyConfig(freeze_above=0.02)
    )


def main(folder: pathlib.Path, die_before: int | None = None) -> None:
    speak_of_checkpoints(die_before)
    shared = trainer()
    batch = shared.batch

    def spoken_batch(step, skipped):
        say("step", step + 1)
        return batch(step, skipped)

    shared.batch = spoken_batch  # type: ignore[method-assign]
    train(shared, folder / "pretrain", stop=SWITCH, pace=PACE)
    branch = Branch(folder / "pretrain", SWITCH)
    train(shared, folder / "qat", stop=STEPS, branch=branch, quantization=PAPER, pace=PACE)
    say("done")


if __name__ == "__main__":
    main(as_path(sys.argv[1]), *map(int, sys.argv[2:]))

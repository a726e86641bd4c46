"""A run's stages: what learns, and the shapes of a step, over its steps; their checks and table.

Report 4.2.2: dense attention, a short stage in which only the indexer learns, sparse attention;
rows of growing length; batches of growing size. The data are rows of the run's sequence length T
throughout: a step takes the next `rows` of them, and cuts each into T / L rows of `length` L. So a
step of `rows` has the same tokens at every length, and the position in the data, in rows, is a
pure function of the step.
"""

import itertools
from typing import NamedTuple

from v4jax.training.metrics import table
from v4jax.training.optimizer import OptimizerConfig
from v4jax.training.schedule import ScheduleConfig, learning_rate_scale, named, phase


class Stage(NamedTuple):
    """Steps that are alike: those after `first` updates, up to `last` updates (range(first, last)).

    only_indexer: only the indexer learns, from its loss alone. dense: CSA attends to all visible
    entries. length: tokens a row. rows: rows of the run's sequence length that a step takes.
    Steps of one `program` share a compiled one.
    """

    first: int
    last: int
    only_indexer: bool
    dense: bool
    length: int
    rows: int

    @property
    def program(self) -> tuple[bool, int, int]:
        """(only_indexer, length, rows)."""
        return self.only_indexer, self.length, self.rows

    def shape(self, sequence_length: int) -> tuple[int, int]:
        """Of a step's tokens and segment_ids on all devices: rows of `length` + 1."""
        return self.rows * (sequence_length // self.length), self.length + 1


def stages(schedule: ScheduleConfig, sequence_length: int, batch_size: int) -> tuple[Stage, ...]:
    """The stages of a run in order: they cover its steps, each once."""
    dense, sparse = schedule.resolve("dense_until"), schedule.sparse_from
    lengths = schedule.starts("lengths", sequence_length)
    rows = schedule.starts("batch_sizes", batch_size)
    borders = {0, dense, sparse, *(at for at, _ in (*lengths, *rows)), schedule.total_steps}
    within = sorted(at for at in borders if at <= schedule.total_steps)
    return tuple(
        Stage(at, end, dense <= at < sparse, at < sparse, _value(lengths, at), _value(rows, at))
        for at, end in itertools.pairwise(within)
    )


def stage_of(found: tuple[Stage, ...], step: int) -> Stage:
    """The stage of the step that follows `step` updates; the last one for those past the end."""
    return next((stage for stage in found if step < stage.last), found[-1])


def rows_before(schedule: ScheduleConfig, batch_size: int, step: int) -> int:
    """Rows of the run's sequence length that `step` (>= 0) updates have taken."""
    starts = schedule.starts("batch_sizes", batch_size)
    ends = [*(at for at, _ in starts[1:]), step]
    return sum(
        rows * (min(end, step) - at)
        for (at, rows), end in zip(starts, ends, strict=True)
        if at < step
    )


def _value(starts: tuple[tuple[int, int], ...], step: int) -> int:
    return [value for at, value in starts if at <= step][-1]


# ---- what cannot be ----


def check_stages(
    schedule: ScheduleConfig,
    sequence_length: int,
    batch_size: int,
    *,
    index_weight: float,
    devices: int = 1,
) -> None:
    """Raises ValueError, one line, where the stages do not fit the run.

    index_weight: of the indexer's loss; 0 where no indexer learns. devices: of the mesh, over
    which rows are spread.
    """
    if schedule.resolve("indexer_warmup") and not index_weight:
        raise ValueError(
            f"{named('indexer_warmup')}: got {schedule.indexer_warmup!r}, allowed: 0, as the "
            "weight of the indexer's loss (--index_weight) is 0 and nothing would learn"
        )
    lengths = [length for _, length in schedule.starts("lengths", sequence_length)]
    wrong = [length for length in lengths if sequence_length % length]
    if wrong or lengths[-1] != sequence_length:
        raise ValueError(
            f"{named('lengths')}: got {lengths}, allowed: divisors of --sequence_length="
            f"{sequence_length}, the last one {sequence_length}"
        )
    rows = [rows for _, rows in schedule.starts("batch_sizes", batch_size)]
    if rows[-1] != batch_size or any(count % devices for count in rows):
        multiples = f"multiples of the mesh's {devices} devices, " if devices > 1 else ""
        raise ValueError(
            f"{named('batch_sizes')}: got {rows}, allowed: {multiples}the last one --batch_size="
            f"{batch_size}"
        )


def check_switch(schedule: ScheduleConfig, step: int) -> None:
    """Raises ValueError, one line, where QAT cannot begin after `step` updates."""
    total = schedule.total_steps
    first, last = schedule.resolve("dense_until"), schedule.sparse_from
    if not 0 < step < total:
        raise ValueError(f"--qat_start: step {step} is not within 1..{total - 1}")
    if first < step < last:
        raise ValueError(
            f"--qat_start: step {step} is within the indexer's warm-up, allowed: up to {first} "
            f"(--dense_until) or from {last} on (--dense_until + --indexer_warmup)"
        )


# ---- the table ----


def stage_table(
    schedule: ScheduleConfig,
    optimizer: OptimizerConfig,
    sequence_length: int,
    batch_size: int,
    *,
    qat_start: int | None = None,
) -> str:
    """What a run does when: one line wherever anything changes. Steps count from 1, as in metrics.

    qat_start: updates before QAT begins; None: it never does.
    """
    found = stages(schedule, sequence_length, batch_size)
    borders = {at for stage in found for at in (stage.first, stage.last)}
    borders |= {schedule.resolve(name) for name in ("warmup_steps", "decay_start", "decay_end")}
    borders |= {schedule.resolve("index_start")} if optimizer.train_indexer else set()
    borders |= {qat_start} if qat_start is not None else set()
    within = sorted(at for at in borders if at <= schedule.total_steps)
    rows = []
    for at, end in itertools.pairwise(within):
        stage, now = stage_of(found, at), phase(schedule, at)
        scales = [float(learning_rate_scale(schedule, step)) for step in (at, end - 1)]
        indexer_scales = [1.0, 1.0] if stage.only_indexer else scales
        main = not stage.only_indexer
        indexer = optimizer.train_indexer and bool(now.index)
        peak = optimizer.indexer_learning_rate or optimizer.learning_rate
        rows.append(
            (
                f"{at + 1}-{end}",
                ("all" if indexer else "all but indexer") if main else "indexer",
                _rates(optimizer.learning_rate, scales) if main else "-",
                _rates(peak, indexer_scales) if indexer else "-",
                f"{float(now.mtp_weight):.3g}" if main else "-",
                "dense" if stage.dense else "sparse",
                f"{stage.length:,}",
                f"{stage.shape(sequence_length)[0]:,}",
                f"{(end - at) * stage.rows * sequence_length:,}",
                "BF16" if qat_start is None or at < qat_start else "QAT",
            )
        )
    headers = ("steps", "learns", "learning rate", "indexer's", "MTP weight", "attention")
    return table(rows, (*headers, "tokens a row", "rows", "tokens", "weights"))


def _rates(peak: float, scales: list[float]) -> str:
    """The learning rates of a first and a last step."""
    first, last = (f"{peak * scale:.3g}" for scale in scales)
    return first if first == last else f"{first} to {last}"

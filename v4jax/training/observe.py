"""What one sees of a run while it trains: progress, metrics, utilisation, a profile, where it is.

Nothing here changes a number of the run. The first process speaks for all; SIGUSR1 reaches each.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from v4jax import distributed
from v4jax.quantization import Quantization, resolve
from v4jax.quantization import table as quantized_table
from v4jax.training import files, whereabouts
from v4jax.training.metrics import MetricsWriter, Progress, table
from v4jax.training.trackers import Tracker

STEP = "train"
"""The name of a step's marker in a profile."""


@dataclasses.dataclass(frozen=True)
class Pace:
    """How often a run speaks and saves, in steps. Does not change its numbers.

    probe_every: how often gradients through FP4 weights are looked at (`gradient_health`), which
    takes about two steps; 0: never.
    keep: checkpoints that are never deleted, as later runs branch off them. trackers: beside
    TensorBoard, see `v4jax.training.trackers`. profile: the steps to trace, as metrics count them.
    """

    log_every: int = 10
    save_every: int = 100
    max_to_keep: int = 2
    probe_every: int = 0
    keep: tuple[int, ...] = ()
    trackers: tuple[str, ...] = ()
    profile: range | None = None


@dataclasses.dataclass(frozen=True)
class StepWork:
    """What a step amounts to. peak: FLOP/s of all devices, None where no maker says."""

    tokens: int
    flops: float
    peak: float | None

    def speed(self, seconds: float) -> dict[str, float]:
        """Metrics of a step that took `seconds`: `model_flops_per_second`, and `mfu`, its share of
        the peak."""
        rate = self.flops / seconds
        found = {"model_flops_per_second": rate}
        return found if self.peak is None else found | {"mfu": rate / self.peak}

    @property
    def peak_tokens(self) -> float | None:
        """Tokens a second at a utilisation of 1."""
        return None if self.peak is None else self.peak / self.flops * self.tokens


class Observer:
    """Watches the steps of one run; a context manager around them.

    folder: the run's. steps: those to come, counted as in the metrics, from 1 on. work: of each.
    trackers: told every line of metrics, closed with it.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        steps: range,
        work: Callable[[int], StepWork],
        profile: range | None = None,
        trackers: Sequence[Tracker] = (),
    ):
        self._folder, self._steps, self._work, self._profile = folder, steps, work, profile
        self._open = contextlib.ExitStack()
        self._writer: MetricsWriter | None = None
        self._progress: Progress | None = None
        if distributed.is_main():
            writer = MetricsWriter(folder, steps.start - 1, trackers)
            first = work(steps.start)
            progress = Progress(folder.name, steps.stop - 1, first.tokens, peak=first.peak_tokens)
            self._writer = self._open.enter_context(writer)
            self._progress = self._open.enter_context(progress)
        self._at = steps.start - 1
        self._latest: jax.Array | None = None
        self._since, self._logged = time.perf_counter(), self._at
        whereabouts.now(self._where)

    def __enter__(self) -> "Observer":
        return self

    def __exit__(self, *error: Any) -> None:
        whereabouts.now(f"{self._folder.name}, after step {self._at} of {self._steps.stop - 1}")
        self._open.__exit__(*error)

    def steps(self) -> Iterable[int]:
        """The steps to come; those to profile are traced meanwhile, by the first process alone."""
        window = self._profile
        if window is None or not distributed.is_main():
            return self._steps
        within = range(max(window.start, self._steps.start), min(window.stop, self._steps.stop))
        return self._traced(within) if within else self._steps

    def _traced(self, window: range) -> Iterator[int]:
        yield from range(self._steps.start, window.start)
        folder = self._folder / "profile"
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # its frames would bury the device's operations
        jax.block_until_ready(self._latest)  # steps before must not reach into the trace
        with files.filled(folder) as here:
            jax.profiler.start_trace(here, create_perfetto_trace=True, profiler_options=options)
            self._start_clock()
            try:
                for step in window:
                    with jax.profiler.StepTraceAnnotation(STEP, step_num=step):
                        yield step
                jax.block_until_ready(self._latest)
            finally:
                jax.profiler.stop_trace()
        print(profile_note(folder, window), flush=True)
        self._start_clock()  # writing the trace is no part of a step
        yield from range(window.stop, self._steps.stop)

    def saw(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Call after each step; waits for no device but to draw a line of progress."""
        self._at, self._latest = step, metrics["loss"]
        if self._progress:
            self._progress.tokens_per_step = self._work(step).tokens
            self._progress.update(step, metrics["loss"])

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes a step's metrics, which have been waited for, with its time and speed."""
        now = time.perf_counter()
        if self._writer:
            seconds = (now - self._since) / (step - self._logged)
            timed = {"seconds_per_step": seconds} | self._work(step).speed(seconds)
            self._writer.write(step, {**metrics, **timed})
        self._since, self._logged = now, step

    def settle(self) -> None:
        """Returns when all lines are where readers look for them: before a step is saved."""
        if self._writer:
            self._writer.settle()

    def _start_clock(self) -> None:
        self._since, self._logged = time.perf_counter(), self._at

    def _where(self) -> str:
        """phase, step and, of the first process, what its line of progress says."""
        if self._progress is not None and (found := self._progress.line()) is not None:
            return " ".join(found.split())
        return f"{self._folder.name} {self._at}/{self._steps.stop - 1}"


def name_programs(pace: Pace) -> None:
    """Before a run that is to be profiled compiles: has the cache of programs tell names apart.

    To it one compiled from older sources is as good, and its operations bear the names of those.
    """
    if pace.profile is not None:
        jax.config.update("jax_compilation_cache_include_metadata_in_key", True)


def quantization_note(quantization: Quantization, params: Any) -> str:
    """A table: which tensor is in which format from here on, and bytes before and after."""
    rows = quantized_table(resolve(quantization, params), params)
    total = ("sum", "", "", sum(row[3] for row in rows), sum(row[4] for row in rows))
    headers = ("quantized from here on", "shape", "format", "bytes in BF16", "bytes now")
    return table([*rows, total], headers)


def memory_note(name: str, step: jax.stages.Compiled) -> str:
    """What the compiled step of the phase `name` needs on a device, in bytes, as XLA plans it."""
    try:
        found = step.memory_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        found = None
    if found is None:
        return f"{name}: this device's compiler does not say what memory a step needs"
    return (
        f"{name}: a step needs {found.argument_size_in_bytes:,} bytes of arguments (state and "
        f"batch), {found.temp_size_in_bytes:,} of temporaries (gradients, activations) and "
        f"{found.output_size_in_bytes - found.alias_size_in_bytes:,} of outputs beside the state"
    )


def profile_note(folder: pathlib.Path, window: range) -> str:
    """Where a profile lies and how to open it."""
    return (
        f"profile of steps {window.start}:{window.stop} in {folder}: "
        f"xprof --logdir={folder}, or open its perfetto_trace.json.gz at https://ui.perfetto.dev"
    )

"""Functions timed side by side: in turn, in one process, each round one sample of every function.

A ratio of two functions is the median of the rounds' ratios, so that what slows the machine for a
while slows both. CPU seconds stand beside wall seconds: rounds in which something else had a core
show as CPU seconds over wall seconds below the number of threads that the function keeps busy.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values) -> "Spread":
        low, median, high = np.percentile(values, [25, 50, 75])
        return cls(float(median), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Timed:
    """Samples of one function, one a round. seconds, cpu: wall and CPU seconds a call, [R]."""

    seconds: np.ndarray
    cpu: np.ndarray

    def spread(self) -> Spread:
        """Of the wall seconds a call."""
        return Spread.of(self.seconds)

    def busy(self) -> float:
        """CPU seconds over wall seconds: how many cores the process had, on the whole."""
        return float(self.cpu.sum() / self.seconds.sum())


def alternate(
    functions: Mapping[str, Callable[[], Any]], rounds: int = 20, at_least: float = 0.02
) -> dict[str, Timed]:
    """Times functions in turn, `rounds` times, every other round in the reverse order.

    A function's first calls, which compile and warm up, do not count. A sample is as many calls in
    a row as last `at_least` seconds. Each call is waited for (`jax.block_until_ready`).
    """
    calls = {name: _calls(function, at_least) for name, function in functions.items()}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for i in range(rounds):
        for name in list(functions)[:: -1 if i % 2 else 1]:
            samples[name].append(_sample(functions[name], calls[name]))
    columns = {name: np.array(pairs).T for name, pairs in samples.items()}
    return {name: Timed(seconds, cpu) for name, (seconds, cpu) in columns.items()}


def ratio(a: Timed, b: Timed) -> Spread:
    """How many times as long a takes as b, over the rounds."""
    return Spread.of(a.seconds / b.seconds)


def load() -> float | None:
    """Processes that wanted a core during the last minute, on average; None if not known."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _calls(function: Callable[[], Any], at_least: float) -> int:
    """How many calls make a sample; compiles and warms up on the way."""
    jax.block_until_ready(function())
    once = min(_sample(function, 1)[0] for _ in range(2))
    return max(1, round(at_least / max(once, 1e-9)))


def _sample(function: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Wall and CPU seconds a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(function())
    wall_after, cpu_after = time.perf_counter(), time.process_time()
    return (wall_after - wall) / calls, (cpu_after - cpu) / calls

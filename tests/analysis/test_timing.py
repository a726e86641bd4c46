"""Timing in turn, on a clock that the timed functions themselves move."""

from __future__ import annotations

import numpy as np
import pytest

from v4jax.analysis import timing
from v4jax.analysis.timing import Spread, Timed, alternate, ratio


class Clock:
    """Wall and CPU seconds; `function` makes calls that take given seconds and are noted."""

    def __init__(self, monkeypatch):
        self.wall = self.cpu = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.wall)
        monkeypatch.setattr(timing.time, "process_time", lambda: self.cpu)

    def function(self, name, *seconds, cores=1.0):
        """Its n-th call takes the n-th of `seconds`, the later ones the last."""
        left = list(seconds)

        def call():
            now = left.pop(0) if len(left) > 1 else left[0]
            self.calls.append(name)
            self.wall += now
            self.cpu += cores * now

        return call


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_rounds_alternate_and_first_calls_do_not_count(clock):
    functions = {"a": clock.function("a", 9.0, 1.0), "b": clock.function("b", 7.0, 2.0)}
    found = alternate(functions, rounds=3, at_least=0)
    warm = 3  # one that compiles, two that tell how long it takes
    assert clock.calls[2 * warm :] == ["a", "b", "b", "a", "a", "b"]
    assert found["a"].seconds.tolist() == [1.0] * 3 and found["b"].seconds.tolist() == [2.0] * 3
    assert ratio(found["b"], found["a"]) == Spread(2.0, 2.0, 2.0)


def test_short_functions_are_called_more_often(clock):
    found = alternate({"a": clock.function("a", 0.001, cores=2)}, rounds=2, at_least=0.02)
    assert len(clock.calls) == 3 + 2 * 20
    np.testing.assert_allclose(found["a"].seconds, 0.001)
    assert found["a"].busy() == pytest.approx(2.0)


def test_a_ratio_is_of_rounds_not_of_medians():
    a = Timed(np.array([1.0, 4.0, 2.0]), np.zeros(3))
    b = Timed(np.array([1.0, 2.0, 4.0]), np.zeros(3))
    assert ratio(a, b) == Spread(1.0, 0.75, 1.5)
    assert a.spread() == Spread(2.0, 1.5, 3.0)


def test_the_load_is_a_number_or_unknown(monkeypatch):
    assert timing.load() is None or timing.load() >= 0
    monkeypatch.setattr(timing.os, "getloadavg", lambda: (_ for _ in ()).throw(OSError()))
    assert timing.load() is None

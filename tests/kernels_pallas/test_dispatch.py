"""Who runs an operation: the best that can, the one named, or one line that says why not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from absl import logging

from kernels_pallas import compiling_for, index_select, select_topk
from kernels_pallas.dispatch import choose, needs, platform

CANDIDATES = {"fast": "needs a TPU, this is cpu", "good": None, "plain": None}


def test_none_takes_the_first_that_can_run_and_a_name_is_taken_as_it_is():
    assert choose("op", None, CANDIDATES) == "good"
    assert choose("op", "plain", CANDIDATES) == "plain"


@pytest.mark.parametrize(
    ("implementation", "candidates", "message"),
    [
        ("swift", CANDIDATES, "op: implementation='swift', allowed: None, fast, good, plain"),
        (
            "fast",
            CANDIDATES,
            "op: implementation='fast' cannot run: needs a TPU, this is cpu; possible: None, good, "
            "plain",
        ),
        (None, {"fast": "no", "good": "never"}, "op: nothing can run this: fast: no; good: never"),
    ],
)
def test_what_cannot_run_ends_in_one_line(implementation, candidates, message):
    with pytest.raises(ValueError) as error:
        choose("op", implementation, candidates)
    assert str(error.value) == message


def test_a_choice_is_logged_once(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *args: lines.append(text % args))
    for detail in ("S 64", "S 64", "S 128"):
        choose("logged once", None, CANDIDATES, detail)
    choose("logged once", "plain", CANDIDATES, "S 64")
    assert lines == ["logged once: good on cpu (S 64)", "logged once: good on cpu (S 128)"]


def test_platform_may_be_another_than_this_machines():
    assert platform() == "cpu" and needs("cpu") is None
    assert needs("tpu") == "needs a TPU, this is cpu" and needs("tpu", interpret=True) is None
    with compiling_for("tpu"):
        assert platform() == "tpu" and needs("tpu") is None
        with pytest.raises(ValueError, match="needs a GPU, this is tpu"):
            select_topk(jnp.zeros((2, 3)), 1, implementation="gpu")
        operands = jnp.zeros((1, 8, 2, 32)), jnp.zeros((1, 2, 32)), jnp.zeros((1, 8, 2))
        program = str(jax.make_jaxpr(lambda *x: index_select(*x, 1, output="mask"))(*operands))
    assert "pallas_call" in program
    assert platform() == "cpu"

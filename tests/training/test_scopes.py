"""Every part of the model has its name in the compiled step, forward and backward."""

from __future__ import annotations

import re

import jax
import pytest

from tests.jax_model import QUICK_COMPILE
from tests.training import tiny
from v4jax.config import CSA
from v4jax.quantization import PAPER
from v4jax.training.trainer import Variant

# Two CSA layers that are traced once, which names them by their place in the unit; MTP is unrolled.
MODEL = tiny.model(layer_types=(CSA, CSA), mlp_layer_types=("moe", "moe"), scan_layers=True)
# Scopes, outermost first; other names may stand between. With a gradient: both directions.
WITH_GRADIENT = (
    "embedding",
    "unit_0/hyper_connection",
    "unit_0/attention/projections",
    "unit_0/attention/compressor",
    "unit_0/attention/indexer",
    "unit_0/attention/indexer/compressor",
    "unit_0/attention/index_loss",
    "unit_0/attention/attend/window",
    "unit_0/attention/attend/entries",
    "unit_0/attention/output",
    "unit_0/moe/router",
    "unit_0/moe/router/balance_loss",
    "unit_0/moe/experts",
    "unit_0/moe/shared_expert",
    "head",
    "mtp/hyper_connection",
    "mtp/attention/attend/window",
    "mtp/moe/experts",
    "mtp/head",
    "losses",
)
WITHOUT = (
    "context",
    "unit_0/attention/selection",
    "unit_0/attention/indexer/quantization",
    "quantization",
    "optimizer/clip",
    "optimizer/muon",
    "optimizer/adamw",
    "router_bias",
)


KNOWN = {part for scope in WITH_GRADIENT + WITHOUT for part in scope.split("/")}


def paths(lowered: jax.stages.Lowered) -> set[tuple[bool, tuple[str, ...]]]:
    """(backward, the known scopes around it) of the operations, as a profile names them."""
    text = lowered.compile(QUICK_COMPILE).as_text()
    found = set(re.findall(r'op_name="([^"]+)"', text))
    return {
        ("transpose(" in name, tuple(part for part in re.split(r"[/()]+", name) if part in KNOWN))
        for name in found
    }


def missing(found: set[tuple[bool, tuple[str, ...]]]) -> list[str]:
    """Of the scopes above, those that no operation is in; "backward " before those without one."""

    def present(scope: str, backward: bool) -> bool:
        for is_backward, path in found:
            parts = iter(path)
            if is_backward == backward and all(part in parts for part in scope.split("/")):
                return True
        return False

    lost = [scope for scope in WITH_GRADIENT + WITHOUT if not present(scope, False)]
    return lost + [f"backward {scope}" for scope in WITH_GRADIENT if not present(scope, True)]


@pytest.fixture
def no_cache():
    """JAX's cache of compiled programs ignores names, so it may answer with those of older code."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.mark.slow
def test_the_compiled_step_names_every_part(no_cache):
    trainer = tiny.trainer(model=MODEL)
    found = paths(trainer._lowered(Variant(PAPER, trainer.stages[-1].program)))
    assert missing(found) == []
    for scope in WITH_GRADIENT + WITHOUT:  # and a scope that is taken away is missed
        last = scope.rpartition("/")[2]
        without = {(back, tuple(part for part in path if part != last)) for back, path in found}
        assert any(scope in line for line in missing(without)), scope

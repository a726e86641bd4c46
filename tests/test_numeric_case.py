"""The model reproduces the seeded numeric case (tests/numeric_case.py) to the printed digits."""

from __future__ import annotations

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import numeric_case as case
from tests.jax_model import build, by_reference_name, quick_jit, split

# A printed digit is right to half a unit, float32 to about 6e-7 of the largest logit (transformers'
# own distance from the float64 values) and to 1e-8 of the gradient's global norm.
HALF = 0.5000001
VALUE_ROUNDING = 2e-6
GRADIENT_ROUNDING = 1e-8 * case.GLOBAL_GRADIENT_NORM


def assert_close(actual, printed, unit) -> None:
    """`printed` has a last digit of `unit`."""
    np.testing.assert_allclose(actual, printed, rtol=0, atol=HALF * unit + VALUE_ROUNDING)


def compute() -> SimpleNamespace:
    """The model's output, losses and gradients of the main loss on the case, in float32 numpy."""
    model = build(case.config(), case.seeded_parameters())
    graphdef, params, rest = split(model)
    ids = jnp.asarray(case.token_ids())

    def cross_entropy(logits, targets):
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1)
        return -jnp.mean(picked)

    def losses(params, rest):
        out = nnx.merge(graphdef, params, rest)(ids[None], collect=True)
        mtp_loss = cross_entropy(out.mtp_logits[0, :-1], ids[2:])
        return cross_entropy(out.logits[0, :-1], ids[1:]), (out, mtp_loss)

    run = quick_jit(jax.value_and_grad(losses, has_aux=True))
    (loss, (out, mtp_loss)), gradients = run(params, rest)
    streams = [np.stack(aux["streams"], axis=-2)[0] for aux in out.aux["layers"]]
    return SimpleNamespace(
        streams=streams,
        logits=np.asarray(out.logits[0]),
        mtp_logits=np.asarray(out.mtp_logits[0]),
        loss=float(loss),
        mtp_loss=float(mtp_loss),
        gradients=by_reference_name(model, gradients),
    )


def check_streams(run) -> None:
    assert len(run.streams) == len(case.STREAMS)
    for streams, (mean, start) in zip(run.streams, case.STREAMS, strict=True):
        assert_close(np.abs(streams).mean(), mean, 1e-6)
        assert_close(streams[39, 0, :3], start, 1e-5)


def check_logits(logits, rows) -> None:
    for t, (start, argmax, mean) in rows.items():
        assert_close(logits[t, :4], start, 1e-5)
        assert logits[t].argmax() == argmax
        assert_close(np.abs(logits[t]).mean(), mean, 1e-6)


def check_losses(run) -> None:
    assert_close(np.abs(run.logits).max(), case.MAX_ABS_LOGIT, 1e-6)
    assert_close([run.loss, run.mtp_loss], [case.LOSS, case.MTP_LOSS], 1e-6)


def check_gradients(run) -> None:
    norms = {name: np.linalg.norm(g.astype(np.float64)) for name, g in run.gradients.items()}
    norms["all"] = np.sqrt(sum(norm**2 for norm in norms.values()))
    for name, norm in (case.GRADIENT_NORMS | {"all": case.GLOBAL_GRADIENT_NORM}).items():
        unit = 10.0 ** (math.floor(math.log10(norm)) - 5)  # six digits are printed
        assert abs(norms[name] - norm) < HALF * unit + GRADIENT_ROUNDING, name
    scale = run.gradients["model.layers.1.attn_hc.scale"]
    atol = HALF * 1e-7 + GRADIENT_ROUNDING
    np.testing.assert_allclose(scale, case.SCALE_GRADIENT, rtol=0, atol=atol)
    indexer = [name for name in norms if ".indexer." in name]
    assert len(indexer) == 12 and all(norms[name] == 0.0 for name in indexer)


@pytest.mark.slow
def test_numeric_case(subtests):
    run = compute()
    for part, check in {
        "streams": lambda: check_streams(run),
        "logits": lambda: check_logits(run.logits, case.LOGITS),
        "mtp logits": lambda: check_logits(run.mtp_logits, case.MTP_LOGITS),
        "losses": lambda: check_losses(run),
        "gradients": lambda: check_gradients(run),
    }.items():
        with subtests.test(part):
            check()

"""Gradients at rounded weights and at masters, against numpy over a whole part's elements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.jax_model import quick_jit
from tests.training import tiny
from v4jax.model import Transformer
from v4jax.numerics import FORMATS, MXFP4, NVFP4
from v4jax.quantization import (
    NO_QUANTIZATION,
    PAPER,
    PARTS,
    Quantization,
    quantize_params,
    resolve,
)
from v4jax.training import remedies
from v4jax.training.gradient_health import compare, make_probe
from v4jax.training.remedies import RemedyConfig
from v4jax.training.step import Program, losses, split_model

UP, DOWN = "layers/0/mlp/experts/gate_up_proj", "layers/1/mlp/experts/down_proj"
MTP = "mtp/e_proj/weight"


def nested(flat):
    tree = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def test_what_is_compared_against_whole_parts():
    rng = np.random.default_rng(0)
    shapes = {UP: (2, 4, 64), DOWN: (3, 256, 96), MTP: (4, 32)}
    params = {p: rng.standard_normal(s).astype(np.float32) for p, s in shapes.items()}
    params[DOWN][1, 5, 32:64] *= 2.0**-17  # a block with a tiny scale
    params[DOWN][2, 7, :32] = 0  # one of zeros, which does not count
    at_rounded = {p: rng.standard_normal(s).astype(np.float32) for p, s in shapes.items()}
    at_rounded[UP][1] = 0
    at_master = {p: g + 0.4 * rng.standard_normal(g.shape) for p, g in at_rounded.items()}
    formats = {UP: MXFP4, DOWN: MXFP4, MTP: NVFP4}
    found = quick_jit(lambda *x: compare(*x, formats))(at_rounded, at_master, nested(params))
    for part, paths in (("routed_experts", (UP, DOWN)), ("MTP_projections", (MTP,))):
        a, b = (np.concatenate([g[p].ravel() for p in paths]).astype(np.float64)
                for g in (at_rounded, at_master))  # fmt: skip
        expected = {
            "ste_cosine": a @ b / np.sqrt((a @ a) * (b @ b)),
            "grad_norm": np.sqrt(a @ a),
            "over_noise": np.sqrt((a @ a) / (3 * np.sum((a - b) ** 2))),
            "zero_gradient": np.mean(a == 0),
        }
        for name, value in expected.items():
            assert float(found[f"fp4/{part}/{name}"]) == pytest.approx(value, rel=1e-4), name
    spreads = []
    for matrix in [*params[UP], *params[DOWN]]:  # tiles of 128 rows and of 4 blocks
        blocks = np.abs(matrix.reshape(len(matrix), -1, 32)).max(axis=2)
        scales = np.ceil(np.log2(np.where(blocks, blocks, np.nan) / 6))
        for row in range(0, len(matrix), 128):
            tile = scales[row : row + 128]
            spreads.append(np.nanmax(tile) - np.nanmin(tile))
    assert max(spreads) > 14
    assert float(found["fp4/routed_experts/scale_spread"]) == max(spreads)
    assert "fp4/MTP_projections/scale_spread" not in found


def test_the_probe_takes_both_gradients_of_one_loss():
    """Of sum(c w^3 / 3 + other w) the gradient is c w^2 + other: known at any point."""
    rng = np.random.default_rng(1)
    w, c = rng.standard_normal((2, 4, 32)).astype(np.float32)
    params = nested({DOWN: jnp.asarray(w), "norm": jnp.float32(0.3)})
    rules = Quantization(((".*/down_proj", "mxfp4"),))

    def loss(params, c):
        w = params["layers"]["1"]["mlp"]["experts"]["down_proj"]
        return jnp.sum(c * w**3 / 3 + params["norm"] * w)

    probe = make_probe(loss, rules, jit=quick_jit)
    found = probe(params, {}, jnp.int32(0), c)
    formats = {DOWN: MXFP4}
    rounded = quantize_params(params, formats)["layers"]["1"]["mlp"]["experts"]["down_proj"]
    a, b = c * np.asarray(rounded) ** 2 + 0.3, c * w**2 + 0.3
    expected = compare({DOWN: a}, {DOWN: b}, params, formats)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-5), name
    assert 0.5 < float(found["fp4/routed_experts/ste_cosine"]) < 0.9999
    assert make_probe(loss, NO_QUANTIZATION)(params, {}, jnp.int32(0), c) == {}


@pytest.mark.slow
def test_a_probe_of_the_tiny_model():
    """Through index formats and all: as two plain gradients of the same loss have it."""
    rules = Quantization((*PAPER.rules, PARTS["attention"]))

    def model():
        return Transformer(tiny.model(num_nextn_predict_layers=0), rngs=nnx.Rngs(0))

    program = Program.of(nnx.eval_shape(model))
    params, variables = quick_jit(lambda: split_model(model()))()
    config, resolved = RemedyConfig(ema_decay=0.9), resolve(rules, params)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 257, (2, 33)).astype(np.int32)
    segments = np.ones_like(tokens)

    def loss(params, variables, tokens, segment_ids):
        out = program.bind(params, variables, resolved.index)(tokens[:, :-1], segment_ids[:, :-1])
        return losses(out, tokens, segment_ids)["loss"]

    memory = remedies.start(config, params, resolved)
    memory["ema"] = jax.tree.map(lambda w: 0.8 * w, memory["ema"])
    probe = make_probe(loss, rules, config, jit=quick_jit)
    found = probe(params, memory, jnp.int32(7), variables, tokens, segments)
    values = quick_jit(lambda p, m: remedies.rounded(config, p, resolved, m, 7, 0))(params, memory)
    gradient = quick_jit(jax.grad(loss))
    masters = remedies.changed(values, remedies.fp4(params, resolved))
    at = [remedies.fp4(gradient(x, variables, tokens, segments), resolved)
          for x in (values, masters)]  # fmt: skip
    expected = quick_jit(lambda *x: compare(*x, resolved.weights))(*at, params)
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-3, abs=1e-5), name
    parts = ("routed_experts", "attention")
    assert all(0.2 < float(found[f"fp4/{part}/ste_cosine"]) < 1 for part in parts)


def test_a_part_without_a_gradient_has_no_cosine():
    zero = {MTP: np.zeros((4, 32), np.float32)}
    found = compare(zero, zero, nested({MTP: np.ones((4, 32), np.float32)}), {MTP: MXFP4})
    part = {name.removeprefix("fp4/MTP_projections/"): float(x) for name, x in found.items()}
    assert np.isnan(part["ste_cosine"]) and np.isnan(part["over_noise"])
    assert (part["grad_norm"], part["zero_gradient"], part["scale_spread"]) == (0, 1, 0)


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.bits == 4])
def test_every_fp4_format_can_be_compared(name):
    rng = np.random.default_rng(0)
    w, g, other = rng.standard_normal((3, 4, 32)).astype(np.float32)
    found = compare({MTP: g}, {MTP: other}, nested({MTP: w}), {MTP: FORMATS[name]})
    assert ("fp4/MTP_projections/scale_spread" in found) == (name != "nvfp4")
    assert all(np.isfinite(float(x)) for x in found.values())

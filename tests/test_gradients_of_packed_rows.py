"""Packed rows train as their samples would apart, padding between included; BF16 gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.jax_model import quick_jit
from v4jax import presets
from v4jax.config import CSA, HCA, SLIDING, CompressRates
from v4jax.model import Transformer

pytestmark = pytest.mark.slow

CONFIG = dataclasses.replace(
    presets.nano(64),
    hidden_size=32,
    layer_types=(SLIDING, CSA, HCA),
    mlp_layer_types=("hash_moe", "moe", "moe"),
    moe_intermediate_size=32,
    compress_rates=CompressRates(4, 6),
    sliding_window=5,
    index_topk=2,
)
LENGTH = 26


def loss_of(dtype=jnp.float32):
    """The summed losses within samples, as a function of (params, tokens, segment_ids); params."""
    model = Transformer(CONFIG, rngs=nnx.Rngs(0), dtype=dtype)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, tokens, segment_ids):
        out = nnx.merge(graphdef, params, rest)(tokens, segment_ids)
        same = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
        nll = optax.softmax_cross_entropy_with_integer_labels(out.logits[:, :-1], tokens[:, 1:])
        both = same[:, 1:] & same[:, :-1]
        mtp = optax.softmax_cross_entropy_with_integer_labels(out.mtp_logits[:, :-1], tokens[:, 2:])
        return jnp.sum(nll * same) + jnp.sum(mtp * both)

    return loss, params


@pytest.fixture(scope="module")
def gradient():
    loss, params = loss_of()
    compiled = quick_jit(jax.grad(loss))
    return lambda tokens, segment_ids: nnx.to_pure_dict(compiled(params, tokens, segment_ids))


@pytest.mark.parametrize(
    "lengths",  # of the samples, a negative one is padding
    [(26,), (9, 17), (9, -1, 1, -2, 13), (-3, 11, -5, 7), (7, 6, 1, 12), (-26,)],
)
def test_a_packed_row_has_the_gradient_of_its_samples_apart(gradient, lengths):
    rng = np.random.default_rng(len(lengths))
    tokens = rng.integers(0, 64, LENGTH).astype(np.int32)
    packed = np.zeros(LENGTH, np.int32)
    apart_tokens, apart_ids, start = [], [], 0
    for number, length in enumerate(lengths, 1):
        span = slice(start, start + abs(length))
        start += abs(length)
        if length > 0:
            packed[span] = number
            row, ids = np.zeros(LENGTH, np.int32), np.zeros(LENGTH, np.int32)
            row[:length], ids[:length] = tokens[span], 1
            apart_tokens.append(row)
            apart_ids.append(ids)
    assert start == LENGTH
    together = gradient(tokens[None], packed[None])
    if not apart_tokens:
        assert all(not np.any(g) for g in jax.tree.leaves(together))
        return
    each = [gradient(t[None], i[None]) for t, i in zip(apart_tokens, apart_ids, strict=True)]
    summed = jax.tree.map(lambda *g: sum(np.asarray(x, np.float64) for x in g), *each)
    largest = max(np.max(np.abs(g)) for g in jax.tree.leaves(summed))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=2e-5 * np.max(np.abs(b)) + 2e-7 * largest
        ),
        together,
        summed,
    )


def test_bfloat16_sums_the_gradient_of_a_frequent_token_in_float32():
    loss, params = loss_of(jnp.bfloat16)
    tokens = np.zeros((2, LENGTH), np.int32)
    program = str(jax.make_jaxpr(jax.grad(loss))(params, tokens, np.ones_like(tokens)))
    sums = [line for line in program.splitlines() if "= scatter-add" in line]
    assert any(":f32[64,32] = scatter-add" in line for line in sums)
    assert not any(":bf16" in line for line in sums)

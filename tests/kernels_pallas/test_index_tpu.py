"""The Mosaic TPU selector in Pallas' interpreter: the very sets of a stable sort.

Operands are small integers and weights powers of two, so that scores are exact in any order of
summation and many are equal.
"""

from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from kernels_pallas import index_tpu
from kernels_pallas.select_tpu import Order
from kernels_pallas.visibility import visible_range

BATCH, LENGTH, HEADS, WIDTH, ENTRIES = 2, 70, 8, 32, 300  # two blocks of 64 queries


def operands(seed=0, dtype="float32", spread=3):
    rng = np.random.default_rng(seed)
    integers = functools.partial(rng.integers, -spread, spread, endpoint=True)
    q = integers((BATCH, LENGTH, HEADS, WIDTH))
    k = integers((BATCH, ENTRIES, WIDTH))
    w = rng.choice([-1.0, -0.5, 0.5, 1.0], (BATCH, LENGTH, HEADS))
    return jnp.asarray(q, dtype), jnp.asarray(k, dtype), jnp.asarray(w, "float32")


def ranges(kind: str):
    """first, end int32 [BATCH, LENGTH]."""
    if kind == "all":
        return jnp.zeros((BATCH, LENGTH), jnp.int32), jnp.full((BATCH, LENGTH), ENTRIES, jnp.int32)
    if kind == "none":
        return (jnp.full((BATCH, LENGTH), 7, jnp.int32),) * 2
    if kind == "causal":  # as in a row that began long ago
        return visible_range(BATCH, LENGTH, ENTRIES, 4, offset=1100)
    rng = np.random.default_rng(5)
    first = rng.integers(0, ENTRIES, (BATCH, LENGTH))
    end = np.minimum(first + rng.integers(0, 200, (BATCH, LENGTH)), ENTRIES)
    return jnp.asarray(first, jnp.int32), jnp.asarray(end, jnp.int32)


def scores_of(q, k, w, first, end, score_dtype="float32"):
    q, k, w = (np.asarray(a, np.float64) for a in (q, k, w))
    scores = np.einsum("btis,bti->bts", np.maximum(np.einsum("btij,bsj->btis", q, k), 0), w)
    entry = np.arange(k.shape[1])
    seen = (np.asarray(first)[..., None] <= entry) & (entry < np.asarray(end)[..., None])
    scores = scores.astype(np.float32).astype(score_dtype).astype(np.float32)
    return np.where(seen, scores, -np.inf)


def mask_of(scores, top_k):
    """bool: the top_k largest of each row, lowest index first among equals, none that is -inf."""
    order = np.argsort(-(scores + 0.0), axis=-1, kind="stable")[..., :top_k]
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask & (scores > -np.inf)


def check(arguments, top_k, score_dtype="float32", scores=None, **scales):
    """Both outputs against a sort."""
    if scores is None:
        scores = scores_of(*arguments, score_dtype)
    expected = mask_of(scores, top_k)
    run = functools.partial(
        index_tpu.select, *arguments, top_k, score_dtype=score_dtype, interpret=True, **scales
    )
    mask = run(output="mask")
    assert mask.dtype == bool
    np.testing.assert_array_equal(np.asarray(mask), expected)
    value, last = run(output="threshold")
    assert (value.dtype, last.dtype) == (score_dtype, "int32")
    value, last = np.asarray(value, np.float32)[..., None], np.asarray(last)[..., None]
    entry = np.arange(scores.shape[-1])
    again = (scores > value) | ((scores == value) & (entry <= last))
    np.testing.assert_array_equal(again, expected)
    few = np.isfinite(scores).sum(-1, keepdims=True) <= top_k
    np.testing.assert_array_equal(value[few], -np.inf)
    np.testing.assert_array_equal(last[few], -1)
    return mask


@pytest.mark.parametrize("score_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["all", "causal", "samples", "none"])
def test_selection(kind, score_dtype):
    check((*operands(), *ranges(kind)), 40, score_dtype)


@pytest.mark.parametrize("top_k", [1, ENTRIES - 1, ENTRIES, ENTRIES + 5])
def test_top_k(top_k):
    check((*operands(), *ranges("causal")), top_k)


@pytest.mark.parametrize("spread", [0, 1])
@pytest.mark.parametrize("score_dtype", ["float32", "bfloat16"])
def test_ties(spread, score_dtype):
    """All scores equal, and few different ones."""
    check((*operands(spread=spread), *ranges("samples")), 20, score_dtype)


@pytest.mark.parametrize("dtype", index_tpu.OPERANDS)
def test_operands(dtype):
    check((*operands(dtype=dtype), *ranges("samples")), 40)


def test_row_scales():
    q, k, w = operands(dtype="float8_e4m3fn")
    rng = np.random.default_rng(1)
    of_q, of_k = (2.0 ** rng.integers(-3, 4, a.shape[:-1]) for a in (q, k))
    first, end = ranges("samples")
    whole = np.asarray(q, np.float64) * of_q[..., None], np.asarray(k, np.float64) * of_k[..., None]
    check(
        (q, k, w, first, end),
        40,
        scores=scores_of(*whole, w, first, end),
        row_scale_q=jnp.asarray(of_q, "float32"),
        row_scale_k=jnp.asarray(of_k, "float32"),
    )


def test_more_entries_than_a_block():
    rng = np.random.default_rng(2)
    q = jnp.asarray(rng.integers(-3, 4, (1, 40, 3, 16)), jnp.bfloat16)  # 3 heads: none together
    k = jnp.asarray(rng.integers(-3, 4, (1, 2100, 16)), jnp.bfloat16)
    w = jnp.ones((1, 40, 3))
    first = jnp.asarray(rng.integers(0, 1100, (1, 40)), jnp.int32).at[:, :35].add(990)
    end = jnp.minimum(first + 700, 2100)
    check((q, k, w, first, end), 64, "bfloat16")


@pytest.mark.slow
@hypothesis.settings(max_examples=15)
@hypothesis.given(st.integers(0, 2**16), st.integers(0, 4), st.integers(1, 64))
def test_any_ranges(seed, spread, width):
    rng = np.random.default_rng(seed)
    first = rng.integers(0, ENTRIES, (BATCH, LENGTH))
    end = np.minimum(first + rng.integers(0, width, (BATCH, LENGTH)), ENTRIES)
    check((*operands(seed, spread=spread), jnp.asarray(first), jnp.asarray(end)), 16)


@pytest.mark.parametrize("bits", [16, 32])
def test_order(bits):
    """Keys of special numbers: -0 as +0, NaN and -inf never selected, subnormals kept apart."""
    tiny = np.float32(1e-45)
    values = np.asarray(
        [-np.inf, -3e38, -1, -1e-38, -tiny, -0.0, 0.0, tiny, 1e-38, 1, 1 + 2**-8, 3e38, np.inf],
        np.float32,
    )
    order = Order(bits)
    keys = np.asarray(order.keys(jnp.asarray(values), jnp.ones(values.shape, bool)))
    assert keys[0] == order.lowest and keys[5] == keys[6] == 0
    if bits == 32:
        distinct = np.delete(keys, 5)
        assert (np.diff(distinct) > 0).all()
        back = np.asarray(order.scores(jnp.asarray(keys)))
        np.testing.assert_array_equal(back.view(np.int32), (values + 0.0).view(np.int32))
    else:
        rounded = values.astype(ml_dtypes.bfloat16).astype(np.float32)
        same = np.argsort(rounded, kind="stable")
        assert (np.diff(keys[same]) >= 0).all()
        np.testing.assert_array_equal(np.asarray(order.scores(jnp.asarray(keys))), rounded)
    for bits_of_nan in (0x7FFFFFFF, 0x7F800001, 0x7FC00000, 0xFFFFFFFF, 0xFFC00000):
        nan = jnp.asarray(np.asarray([bits_of_nan], np.uint32).view(np.float32))
        assert order.keys(nan, jnp.ones(1, bool))[0] == order.lowest


def test_rounds_to_even():
    """All bfloat16 neighbours' midpoints, against ml_dtypes."""
    upper = np.arange(0x10000, dtype=np.uint32)
    lower = np.asarray([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = ((upper[:, None] << 16) | lower).ravel().view(np.float32)
    values = values[~np.isnan(values)]
    order = Order(16)
    keys = order.keys(jnp.asarray(values), jnp.ones(values.shape, bool))
    with np.errstate(over="ignore"):
        rounded = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(order.scores(keys)), rounded)


def test_no_races(capfd):
    q, w, first, end = (a[:1, :32] for a in (*operands()[::2], *ranges("samples")))
    k = operands()[1][:1]
    run = functools.partial(index_tpu.select, q, k, w, first, end, 5)
    watched = run(interpret=pltpu.InterpretParams(detect_races=True))
    np.testing.assert_array_equal(np.asarray(watched), np.asarray(run(interpret=True)))
    assert "RACE" not in "".join(capfd.readouterr())  # jax 0.10.2 only prints, newer raise


def test_under_transformations():
    """jit of vmap, scan and remat over a leading axis."""
    arguments = [a[:, None] for a in (*operands(), *ranges("samples"))]

    def run(*arguments):
        return index_tpu.select(*arguments, 10, interpret=True)

    single = np.stack([run(*(a[i] for a in arguments)) for i in range(BATCH)])
    np.testing.assert_array_equal(np.asarray(jax.jit(jax.vmap(run))(*arguments)), single)
    scanned = jax.lax.scan(lambda _, a: (None, jax.checkpoint(run)(*a)), None, tuple(arguments))[1]
    np.testing.assert_array_equal(np.asarray(scanned), single)


def test_under_shard_map():
    arguments = (*operands(), *ranges("samples"))
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))

    def run(*arguments):
        return index_tpu.select(*arguments, 10, interpret=True)

    spec = P("data")
    sharded = jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=(spec,) * 5, out_specs=spec, check_vma=False)
    )
    np.testing.assert_array_equal(np.asarray(sharded(*arguments)), np.asarray(run(*arguments)))
    text = sharded.lower(*arguments).compile().as_text()
    assert "all-gather" not in text


def test_refusals_are_one_line():
    q, k, w = operands()
    first, end = ranges("all")
    for arguments, options, message in (
        ((q.astype("bfloat16"), k), {}, "q is bfloat16, k is float32, allowed: both the same of"),
        ((q.astype("float16"), k.astype("float16")), {}, "q is float16, k is float16, allowed"),
        ((q, k), {"output": "indices"}, "output='indices', allowed: mask, threshold"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            index_tpu.select(*arguments, w, first, end, 5, **options)
        assert "\n" not in str(error.value)
    many = jax.ShapeDtypeStruct((BATCH, 1 << 21, WIDTH), jnp.float32)
    with pytest.raises(ValueError, match="2097152 entries .* MiB of VMEM, allowed: 48"):
        jax.eval_shape(lambda k: index_tpu.select(q, k, w, first, end, 5), many)

"""The Mosaic TPU kernels of expert_matmul in Pallas' interpreter, against float64 loops."""

from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from kernels_pallas import expert_matmul_tpu
from kernels_pallas.planar import Planar
from tests.kernels_pallas import expert_backend
from v4jax.numerics import MXFP4

TOTAL, EXPERTS, N, K = 200, 4, 96, 160  # four tiles of 64 rows, the last ragged; K pads to 192


run = functools.partial(expert_backend.run, expert_matmul_tpu, interpret=True)


@functools.cache
def operands(dtype: str, packed: bool):
    return expert_backend.operands((TOTAL, EXPERTS, N, K), dtype, packed)


def check(sizes, dtype: str, packed: bool):
    x, dy, w, values = operands(dtype, packed)
    actual = run(x, dy, w, jnp.asarray(sizes, jnp.int32))
    expert_backend.check(actual, x, dy, values, sizes)


GROUPS = {
    "ragged": [10, 0, 131, 59],
    "one takes all": [0, 0, TOTAL, 0],
    "whole tiles": [64, 64, 0, 64],
    "tails": [63, 65, 1, 1],
    "fewer than rows": [5, 0, 64, 2],
    "none": [0, 0, 0, 0],
}


@pytest.mark.parametrize("packed", [False, True], ids=["float", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", GROUPS)
def test_values(name, dtype, packed):
    check(GROUPS[name], dtype, packed)


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.lists(st.integers(0, TOTAL), min_size=EXPERTS, max_size=EXPERTS))
def test_any_grouping(cuts):
    *cuts, total = sorted(cuts)
    check(np.diff([0, *cuts, total]).tolist(), "float32", True)


def test_packed_equals_float_bit_for_bit():
    x, dy, w, values = operands("bfloat16", True)
    sizes = jnp.asarray(GROUPS["ragged"], jnp.int32)
    for actual, other in zip(
        run(x, dy, w, sizes), run(x, dy, jnp.asarray(values, x.dtype), sizes), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(other))


def test_every_code_and_scale():
    """Both nibbles of each byte, under each scale whose numbers are normal floats; NaN is kept."""
    low, high = np.meshgrid(np.arange(16), np.arange(16), indexing="ij")
    codes = jnp.asarray((low | high << 4).reshape(1, 1, 256).repeat(32, 1), jnp.uint8)
    scales = [2, 64, 126, 127, 128, 200, 244, 255]
    scales = jnp.asarray(scales, jnp.uint8)[:, None, None, None].repeat(2, 2).repeat(256, 3)
    one_hot = jnp.eye(64)[jnp.asarray([0, 31, 32, 63])]  # rows of the low and of the high nibbles
    for scale in scales:
        w = Planar(codes, scale, 64, MXFP4)
        actual = expert_matmul_tpu.rows(one_hot, w, jnp.asarray([4]), interpret=True)
        magnitudes = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        byte = float(scale[0, 0, 0])
        power = np.nan if byte == 255 else 2.0 ** (byte - 127)
        values = np.concatenate([magnitudes, -magnitudes]) * power
        one = np.stack([values[low.ravel()], values[high.ravel()]])
        if byte == 255:  # of a block, and through the sum of all: 0 * NaN
            assert np.isnan(np.asarray(actual)).all()
        else:
            np.testing.assert_array_equal(np.asarray(actual), one[[0, 0, 1, 1]])


def test_nan_of_a_neighbour_stays_there():
    """Tiles hold rows of other experts, and of nobody, which must not reach an expert's dW."""
    x, dy, w, _ = operands("float32", False)
    sizes = jnp.asarray([70, 50, 0, 30], jnp.int32)
    of_second = (jnp.arange(TOTAL) >= 70) & (jnp.arange(TOTAL) < 120)
    other = of_second | (jnp.arange(TOTAL) >= 150)
    y, dx, dw = run(jnp.where(other[:, None], jnp.nan, x), dy, w, sizes)
    clean = run(x, dy, w, sizes)
    assert np.isnan(dw[1]).any() and not np.isnan(dw[jnp.asarray([0, 2, 3])]).any()
    np.testing.assert_array_equal(np.asarray(dw[0]), np.asarray(clean[2][0]))
    np.testing.assert_array_equal(np.isnan(y).any(1), np.asarray(of_second))
    assert not np.isnan(dx).any()


@pytest.mark.parametrize("packed", [False, True], ids=["float", "packed"])
def test_no_races(packed, capfd):
    x, dy, w, _ = operands("float32", packed)
    sizes = jnp.asarray([20, 0, 30, 6], jnp.int32)
    arguments = x[:64], dy[:64], w, sizes
    watched = run(*arguments, interpret=pltpu.InterpretParams(detect_races=True))
    for actual, other in zip(watched, run(*arguments), strict=True):
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(other))
    assert "RACE" not in "".join(capfd.readouterr())  # jax 0.10.2 only prints, newer raise


@pytest.mark.parametrize("packed", [False, True], ids=["float", "packed"])
def test_under_transformations(packed):
    """vmap (over tokens, and sizes too), scan and remat give what single calls give."""
    x, dy, w, _ = operands("float32", packed)
    sizes = jnp.asarray([[20, 0, 30, 6], [0, 64, 0, 0]], jnp.int32)
    xs = x[: 2 * 64].reshape(2, 64, K)

    def rows(x, sizes):
        return expert_matmul_tpu.rows(x, w, sizes, interpret=True)

    single = np.stack([rows(x, s) for x, s in zip(xs, sizes, strict=True)])
    np.testing.assert_array_equal(np.asarray(jax.vmap(rows)(xs, sizes)), single)
    np.testing.assert_array_equal(np.asarray(jax.vmap(rows, (0, None))(xs, sizes[0]))[0], single[0])
    scanned = jax.lax.scan(lambda _, a: (None, jax.checkpoint(rows)(*a)), None, (xs, sizes))[1]
    np.testing.assert_array_equal(np.asarray(scanned), single)


def test_under_shard_map():
    """Tokens over a data axis, weights everywhere; the compiled program gathers nothing.

    Pallas' interpreter does not take check_vma; compiled kernels do: aot/test_tpu.py.
    """
    x, dy, w, _ = operands("float32", True)
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))
    sizes = jnp.asarray([20, 0, 30, 6, 0, 64, 0, 0], jnp.int32)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("data"), P("data"), P(), P("data")),
        out_specs=(P("data"), P("data"), P("data")),
        check_vma=False,
    )
    def sharded(x, dy, w, sizes):
        return run(x, dy, w, sizes)

    arguments = x[:128], dy[:128], w, sizes
    for part, actual in enumerate(sharded(*arguments)):
        for half in range(2):
            rows, groups = slice(64 * half, 64 * half + 64), slice(4 * half, 4 * half + 4)
            single = run(x[rows], dy[rows], w, sizes[groups])[part]
            here = actual[rows] if part < 2 else actual[groups]
            np.testing.assert_array_equal(np.asarray(here), np.asarray(single))
    text = sharded.lower(*arguments).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text


def test_refusals_are_one_line():
    x, _, w, _ = operands("float32", False)
    sizes = jnp.zeros(EXPERTS, jnp.int32)
    with pytest.raises(ValueError, match="tpu: x is float16, allowed: bfloat16, float32") as error:
        expert_matmul_tpu.rows(x.astype(jnp.float16), w, sizes)
    assert "\n" not in str(error.value)
    wide = jax.ShapeDtypeStruct((256, 1 << 17), jnp.float32)
    wide_w = jax.ShapeDtypeStruct((2, 256, 1 << 17), jnp.float32)
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    with pytest.raises(ValueError, match="a panel of 131072 x 128 float32 needs .* allowed: 48"):
        jax.eval_shape(expert_matmul_tpu.rows, wide, wide_w, sizes)


@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (4, 3, 0, 7), (4, 0, 5, 7)])
def test_nothing(shape):
    total, experts, n, k = shape
    x, dy, w = jnp.ones((total, k)), jnp.ones((total, n)), jnp.ones((experts, n, k))
    y, dx, dw = run(x, dy, w, jnp.zeros(experts, jnp.int32))
    assert (y.shape, dx.shape, dw.shape) == ((total, n), (total, k), (experts, n, k))

"""quantize, dequantize and fake_quantize against search in float64, bit for bit."""

import functools

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.numerics import brute_force
from tests.numerics.bits import assert_same, bytes_of_values
from v4jax.numerics import (
    FORMATS,
    FP8_1X128,
    FP8_128X128,
    MXFP4,
    MXFP4_EVEN,
    MXFP4_FLOOR,
    NVFP4,
    Quantized,
    dequantize,
    fake_quantize,
    quantize,
)
from v4jax.numerics import scales as scale_rules

quantize_jit = jax.jit(quantize, static_argnums=1)
dequantize_jit = jax.jit(dequantize, static_argnums=1)
fake_quantize_jit = jax.jit(fake_quantize, static_argnums=1)
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
# One of each kind, for what takes long to compile: the others differ from these in numbers only.
each_kind = pytest.mark.parametrize("fmt", [MXFP4, NVFP4, FP8_128X128], ids=lambda f: f.name)
power_of_two_formats = pytest.mark.parametrize(
    "fmt", [FORMATS[name] for name in brute_force.POWER_OF_TWO], ids=brute_force.POWER_OF_TWO
)


def check(x: np.ndarray, fmt) -> brute_force.Result:
    """All three functions, under jit, equal brute force; returns what that found."""
    expected = brute_force.quantize(x, fmt.name)
    q = quantize_jit(x, fmt)
    assert (q.values.dtype, q.scales.dtype) == (fmt.element, fmt.scale)
    assert_same(bytes_of_values(q), expected.codes)
    assert_same(np.asarray(q.scales).view(np.uint8), expected.scales)
    if expected.tensor_scale is None:
        assert q.tensor_scale is None
    else:
        assert_same(q.tensor_scale, expected.tensor_scale)
    assert_same(dequantize_jit(q), expected.values)
    assert_same(fake_quantize_jit(x, fmt), expected.values)
    return expected


def hard_points(grid: np.ndarray) -> np.ndarray:
    """Every grid point and midpoint, float64, with its two float32 neighbours, of both signs."""
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2]).astype(np.float32)
    near = [np.nextafter(points, np.float32(to)) for to in (-np.inf, np.inf)]
    points = np.unique(np.abs(np.concatenate([points, *near])))
    points = points[points <= grid[-1]].astype(np.float64)
    return np.concatenate([points, -points])


def pinned(points: np.ndarray, exponent: int, top: float, columns: int) -> np.ndarray:
    """Blocks of the points times 2^exponent, each led by `top` * 2^exponent, which fixes its scale.

    Points beyond the leader, or that float32 cannot hold, are left out.
    """
    points = points[np.abs(points) <= top] * 2.0**exponent
    as_float32 = points.astype(np.float32)
    points = as_float32[as_float32 == points]
    rows = -(-len(points) // (columns - 1))
    body = np.resize(points, (rows, columns - 1))
    return np.concatenate([np.full((rows, 1), top * 2.0**exponent, np.float32), body], axis=1)


@pytest.mark.parametrize("fmt", [MXFP4, MXFP4_FLOOR, MXFP4_EVEN, FP8_1X128], ids=lambda f: f.name)
def test_every_code_midpoint_and_neighbour_at_every_scale(fmt):
    grid = brute_force.POWER_OF_TWO[fmt.name][0]
    largest = float(np.finfo(np.float32).max)
    low, high = (brute_force.power_of_two(amax, fmt.name) for amax in (0.0, largest))
    points, blocks = hard_points(grid), []
    for exponent in range(low, high + 1):
        top = min(grid[-1], largest / 2.0**exponent)
        blocks.append(pinned(points, exponent, top, fmt.block[1]))
    found = check(np.concatenate(blocks), fmt)
    assert set(found.scales.ravel()) == {127 + e for e in range(low, high + 1)}
    assert len(np.unique(found.codes)) == 2 * len(grid)


@pytest.mark.parametrize("fmt", [MXFP4, FP8_1X128], ids=lambda f: f.name)
def test_dequantize_every_element_at_every_scale_code(fmt):
    grid = brute_force.POWER_OF_TWO[fmt.name][0]
    signed = np.concatenate([grid, -grid])
    elements = np.resize(signed, -(-len(signed) // fmt.block[1]) * fmt.block[1])
    scales = np.arange(256, dtype=np.uint8)
    shape = (256, len(elements))
    q = Quantized(
        jnp.asarray(np.broadcast_to(elements, shape).astype(fmt.element)),
        jnp.asarray(np.repeat(scales[:, None], shape[1] // fmt.block[1], 1).view(fmt.scale)),
        None,
        fmt,
    )
    with np.errstate(over="ignore"):
        expected = (elements * 2.0 ** (scales[:, None].astype(np.float64) - 127)).astype(np.float32)
    expected[255] = np.nan
    assert_same(dequantize_jit(q), expected)
    assert_same(dequantize_jit(q, jnp.bfloat16), expected.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("fmt", [MXFP4, FP8_1X128], ids=lambda f: f.name)
def test_scale_is_the_released_arithmetic_at_every_mantissa(fmt):
    amax = np.arange(1 << 23, dtype=np.int32) + np.float32(1).view(np.int32)
    t = (amax.view(np.float32) * np.float32(1 / fmt.rule.limit)).view(np.int32)
    released = (t >> 23) + ((t & 0x7FFFFF) != 0)
    scale, whole = jax.jit(fmt.rule, static_argnums=1)(amax, fmt.scale)
    assert whole is None
    assert_same(scale, (released << 23).astype(np.int32).view(np.float32))


@power_of_two_formats
def test_scale_doubles_just_above_its_limit_in_every_binade(fmt):
    _, _, limit, _ = brute_force.POWER_OF_TWO[fmt.name]
    with np.errstate(over="ignore", under="ignore"):
        at = np.float32(limit) * np.exp2(np.arange(-126, 128).astype(np.float64))
        at = at.astype(np.float32)
    at = at[np.isfinite(at)]
    amax = np.concatenate(
        [at, np.nextafter(at, np.float32(0)), np.nextafter(at, np.float32(np.inf))]
    )
    scale, _ = jax.jit(fmt.rule, static_argnums=1)(amax.view(np.int32), fmt.scale)
    expected = [2.0 ** brute_force.power_of_two(float(a), fmt.name) for a in amax]
    assert_same(scale, np.array(expected, np.float32))


def test_elements_are_casts_of_ml_dtypes():
    x = np.random.default_rng(0).standard_t(2, (64, 128)).astype(np.float32)
    for fmt in (MXFP4, FP8_1X128):
        q = quantize_jit(x, fmt)
        scale = np.repeat(np.asarray(q.scales).astype(np.float64), fmt.block[1], axis=1)
        assert_same(bytes_of_values(q), (x / scale).astype(fmt.element).view(np.uint8))
        assert_same(
            np.asarray(dequantize_jit(q)),
            (np.asarray(q.values).astype(np.float64) * scale).astype("f4"),
        )


@every_format
@hypothesis.given(
    bits=hypothesis.extra.numpy.arrays(np.uint32, (2, 128), elements=st.integers(0, 2**32 - 1))
)
@hypothesis.settings(max_examples=60)
def test_any_bit_patterns(fmt, bits):
    check(bits.view(np.float32), fmt)


@every_format
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60)
def test_hard_points_of_mixed_magnitude(fmt, data):
    """Grid points, midpoints and neighbours, each times a power of two near its block's."""
    grid = brute_force.POWER_OF_TWO[fmt.name][0] if fmt != NVFP4 else brute_force.E2M1
    points = hard_points(grid)
    array = functools.partial(hypothesis.extra.numpy.arrays, np.int32)
    index = data.draw(array((2, 128), elements=st.integers(0, len(points) - 1)))
    near = data.draw(array((2, 128), elements=st.integers(-9, 3)))
    exponent = data.draw(array((2, 4), elements=st.integers(-140, 116)))
    with np.errstate(under="ignore"):
        x = points[index] * np.exp2((near + np.repeat(exponent, 32, axis=1)).astype(np.float64))
        check(x.astype(np.float32), fmt)


def _zeros(rng, shape):
    return np.copysign(np.zeros(shape), rng.choice([-1.0, 1.0], shape))


def _outliers(rng, shape):
    return np.where(rng.random(shape) < 0.05, 1e4, 1) * rng.standard_normal(shape)


def _subnormals(rng, shape):
    return rng.integers(-0x7FFFFF, 0x7FFFFF, shape) * 2.0**-149


def _around_the_smallest_normal(rng, shape):
    return rng.uniform(-1, 1, shape) * np.exp2(rng.uniform(-133, -121, (shape[0], 1)))


def _largest(rng, shape):
    return rng.choice([-1, 1, 0.75, 2.0**-30], shape) * np.finfo(np.float32).max


def _below_the_fp8_floor(rng, shape):
    return rng.uniform(-1, 1, shape) * np.geomspace(1e-7, 1e-3, shape[0])[:, None]


ARRAYS = (
    _zeros,
    _outliers,
    _subnormals,
    _around_the_smallest_normal,
    _largest,
    _below_the_fp8_floor,
)


@every_format
@pytest.mark.parametrize("make", ARRAYS, ids=lambda f: f.__name__.strip("_"))
def test_special_arrays(fmt, make):
    x = make(np.random.default_rng(1), (8, 128)).astype(np.float32)
    for rows in np.split(x, 4):
        check(rows, fmt)


def test_zero_block_has_code_one_and_keeps_signs():
    x = np.zeros(32, np.float32)
    x[1] = -0.0
    q = quantize(x, MXFP4)
    assert np.asarray(q.scales).view(np.uint8).tolist() == [1]
    assert bytes_of_values(q)[:3].tolist() == [0, 8, 0]
    assert np.signbit(fake_quantize(x)[:3]).tolist() == [False, True, False]


def test_a_subnormal_is_a_number_not_zero():
    x = np.zeros((1, 32), np.float32)
    x[0, :3] = np.array([0.6, -0.4, 0.2]) * 2.0**-126
    expected = np.array([0.5, -0.5, 0]) * 2.0**-126
    assert_same(fake_quantize_jit(x, MXFP4)[0, :3], expected.astype(np.float32))
    assert expected[0] != 0


def test_no_step_of_finite_input_makes_nan():
    """Else jax_debug_nans could not be used on a model that quantizes."""
    x = np.zeros((2, 128), np.float32)
    x[0, 0] = 2.0**100
    with jax.debug_nans(True):
        assert fake_quantize(x)[0, 0] == 2.0**100


def poisoned(shape):
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    matrix = x.reshape(-1, *shape[-2:])[0]
    matrix[0, 0], matrix[0, -1], matrix[-1, 70], matrix[1, 40] = np.nan, np.inf, -np.inf, -np.nan
    return x


@every_format
def test_nan_and_inf_poison_their_block_and_no_other(fmt):
    found = check(poisoned((2, 128)), fmt)
    assert np.isnan(found.values).any()


@each_kind
def test_poison_passes_more_than_4096_elements(fmt):
    x = poisoned((2, 256, 256))  # here XLA's maxima of floats drop NaN, eagerly and under jit
    found = check(x, fmt)
    assert np.isnan(found.values[0]).any() and np.isfinite(found.values[0]).any()
    assert np.isfinite(found.values[1]).all()
    assert_same(fake_quantize(x, fmt), found.values)


@pytest.mark.parametrize("shape", [(150, 384), (130, 5), (3, 129, 257)], ids=str)
def test_ragged_tiles(shape):
    x = np.random.default_rng(3).standard_normal(shape) * np.geomspace(1, 1e3, shape[-1])
    check(x.astype(np.float32), FP8_128X128)


@each_kind
def test_one_axis_two_and_many(fmt):
    x = np.random.default_rng(4).standard_normal((2, 3, 2, 128)).astype(np.float32)
    x *= np.geomspace(1, 1e3, 6).reshape(2, 3, 1, 1).astype(np.float32)
    check(x, fmt)
    check(x[0, 0], fmt)
    if fmt.block[0] == 1:
        check(x[0, 0, 0], fmt)


@each_kind
def test_jit_vmap_and_stacks_give_the_bits_of_eager(fmt):
    x = np.random.default_rng(5).standard_t(2, (3, 2, 128)).astype(np.float32)
    eager = quantize(x, fmt)
    one_by_one = [quantize_jit(matrix, fmt) for matrix in x]
    for other in (
        quantize_jit(x, fmt),
        jax.jit(jax.vmap(lambda m: quantize(m, fmt)))(x),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one),
    ):
        assert other.format == fmt
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(eager), strict=True):
            assert_same(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
    values = fake_quantize(x, fmt)
    assert_same(dequantize(eager), values)
    assert_same(fake_quantize_jit(x, fmt), values)
    assert_same(jax.jit(jax.vmap(lambda m: fake_quantize(m, fmt)))(x), values)
    assert_same(jax.jit(jax.vmap(dequantize))(eager), values)


@power_of_two_formats
def test_idempotent_in_values_but_not_in_bits(fmt):
    x = np.random.default_rng(6).standard_normal((128, 1024)).astype(np.float32)
    q = quantize_jit(x, fmt)
    again = quantize_jit(dequantize_jit(q), fmt)
    assert_same(dequantize_jit(again), dequantize_jit(q))
    if fmt == MXFP4:  # a maximum rounded down to 3 * scale: why exports start from the master
        changed = np.mean(np.asarray(again.scales != q.scales))
        assert 0.1 < changed < 0.5


@each_kind
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_input_is_computed_in_float32(fmt, dtype):
    x = jnp.asarray(np.random.default_rng(7).standard_normal((2, 128)), dtype)
    y = fake_quantize_jit(x, fmt)
    assert y.dtype == dtype
    assert_same(y, fake_quantize_jit(x.astype(jnp.float32), fmt).astype(dtype))
    assert_same(dequantize_jit(quantize_jit(x, fmt), dtype), y)


def test_the_rules_are_of_the_kinds_that_the_records_say():
    assert {type(fmt.rule) for fmt in FORMATS.values()} == {
        scale_rules.PowerOfTwo,
        scale_rules.TwoLevel,
    }


def test_integers_are_refused():
    with pytest.raises(ValueError, match="mxfp4: cannot quantize int32, only floating point"):
        quantize(jnp.zeros((2, 32), jnp.int32), MXFP4)

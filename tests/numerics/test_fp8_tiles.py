"""The report's claim: FP4 weights fit FP8 tiles without loss, while their scales span <= 2^14."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.numerics.bits import assert_same
from v4jax.numerics import (
    FP8_1X128,
    FP8_128X128,
    MXFP4,
    NVFP4,
    Quantized,
    dequantize,
    fake_quantize,
    fp8_tiles,
    quantize,
)

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])

tiles_of = jax.jit(fp8_tiles)
quantize_jit = jax.jit(quantize, static_argnums=1)
fake_quantize_jit = jax.jit(fake_quantize, static_argnums=1)


def weight(codes, shape, seed=0) -> Quantized:
    """Random elements, all sixteen in every block, with these scale codes [out, in / 32]."""
    rng = np.random.default_rng(seed)
    blocks = np.tile(np.concatenate([E2M1, -E2M1]), (*codes.shape, 2))
    values = rng.permuted(blocks, axis=-1).reshape(shape)
    scales = np.asarray(codes, np.uint8).view(MXFP4.scale)
    return Quantized(jnp.asarray(values.astype(MXFP4.element)), jnp.asarray(scales), None, MXFP4)


def spread_codes(shape, spread, seed=0):
    """Scale codes [out, in / 32] about 2^-7 whose span is exactly `spread`."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(120 - spread, 121, (shape[0], shape[1] // 32))
    codes[rng.integers(shape[0]), 0], codes[rng.integers(shape[0]), -1] = 120, 120 - spread
    return codes


@pytest.mark.parametrize("shape", [(128, 128), (100, 96)], ids=str)
@pytest.mark.parametrize("spread", [0, 1, 7, 11, 13, 14, 15, 16, 20])
def test_lossless_exactly_up_to_a_ratio_of_2_to_the_14(spread, shape):
    q = weight(spread_codes(shape, spread, seed=spread), shape, seed=spread)
    fp4 = jax.jit(dequantize)(q)
    fp8 = fake_quantize_jit(fp4, FP8_128X128)
    lossless = bool(jnp.all(fp4 == fp8))
    assert lossless == (spread <= 14)
    tiles = tiles_of(q)
    assert (float(tiles.share), int(tiles.max_spread)) == (float(lossless), spread)


def test_every_element_fits_at_every_offset_from_the_top_scale():
    top = np.float32(6)
    for offset in range(0, 18):
        x = np.zeros((1, 128), np.float32)
        x[0, 0], x[0, 32:40] = top, E2M1 * 2.0**-offset
        kept = np.asarray(fake_quantize_jit(x, FP8_1X128))[0, 32:40] == x[0, 32:40]
        assert kept.all() == (offset <= 14)
        if offset == 15:  # the report's bound is tight: 0.5 and 1.5 go first
            assert E2M1[~kept].tolist() == [0.5, 1.5]


def test_share_counts_tiles_and_ragged_edges():
    shape = (2, 200, 160)  # a stack of two matrices of 2 x 2 tiles, three of them short
    codes = np.full((2, 200, 5), 120)
    codes[0, 3, 1] = 120 - 15  # tile (0, 0)
    codes[1, 199, 4] = 120 + 14  # tile (1, 1) of the second, at the very corner
    tiles = tiles_of(weight(codes, shape))
    assert (float(tiles.share), int(tiles.max_spread)) == (7 / 8, 15)
    # Across a tile's border, scales do not meet.
    codes = np.full((2, 200, 5), 120)
    codes[:, 128:], codes[:, :, 4] = 100, 80
    tiles = tiles_of(weight(codes, shape))
    assert (float(tiles.share), int(tiles.max_spread)) == (1, 0)
    one = jax.jit(jax.vmap(fp8_tiles))(weight(codes, shape))
    assert one.share.shape == one.max_spread.shape == (2,)


def test_blocks_of_zeros_have_no_say_whatever_their_scale():
    x = np.random.default_rng(4).standard_normal((128, 128)).astype(np.float32)
    x[5, 32:64] = 0
    x[9] = -0.0
    q = quantize_jit(x, MXFP4)
    assert np.asarray(q.scales).view(np.uint8).min() == 1
    tiles = tiles_of(q)
    assert float(tiles.share) == 1 and 0 < int(tiles.max_spread) < 5
    # Not by their code: one tiny element with the scale of a zero block counts.
    x[5, 40] = 2.0**-126
    tiny = quantize_jit(x, MXFP4)
    assert_same(np.asarray(tiny.scales).view(np.uint8), np.asarray(q.scales).view(np.uint8))
    assert float(tiles_of(tiny).share) == 0 and int(tiles_of(tiny).max_spread) > 100
    # Nor by a high one, as other writers use.
    high = np.asarray(q.scales).view(np.uint8).copy()
    high[9] = 254
    scales = jnp.asarray(high.view(MXFP4.scale))
    assert_same(tiles_of(Quantized(q.values, scales, None, MXFP4)).max_spread, tiles.max_spread)
    nothing = tiles_of(quantize_jit(np.zeros((128, 128), np.float32), MXFP4))
    assert (float(nothing.share), int(nothing.max_spread)) == (1, 0)


def test_a_poisoned_tile_is_not_lossless():
    x = np.ones((128, 256), np.float32)
    x[7, 200] = np.nan
    tiles = tiles_of(quantize_jit(x, MXFP4))
    assert (float(tiles.share), int(tiles.max_spread)) == (0.5, 255)
    x[:, 128:] = np.inf
    assert float(tiles_of(quantize_jit(x, MXFP4)).share) == 0.5


@pytest.mark.parametrize("fmt", [NVFP4, FP8_128X128, FP8_1X128], ids=lambda f: f.name)
def test_other_formats_are_refused(fmt):
    with pytest.raises(ValueError, match=f"fp8_tiles: {fmt.name} is not E2M1 with E8M0 scales"):
        fp8_tiles(quantize_jit(jnp.ones((128, 128)), fmt))

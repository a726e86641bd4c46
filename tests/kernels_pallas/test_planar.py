"""The planar layout of MXFP4: where each code and scale lies, and bits that survive both ways."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.planar import BLOCK, PAIR, to_packed, to_planar
from tests.jax_model import quick_jit
from v4jax.numerics import MXFP4, MXFP4_EVEN, NVFP4, Packed, dequantize, pack, quantize


def any_bits(shape: tuple[int, ...], fmt=MXFP4) -> Packed:
    """Packed weights of `shape` with every code and scale byte likely, NaN too."""
    rng = np.random.default_rng(0)
    *lead, width = shape
    codes = rng.integers(0, 256, (*lead, width // 2), np.uint8)
    return Packed(
        jnp.asarray(codes),
        jnp.asarray(rng.integers(0, 256, (*lead, width // BLOCK), np.uint8)),
        None,
        fmt,
    )


@pytest.mark.parametrize("fmt", [MXFP4, MXFP4_EVEN])
@pytest.mark.parametrize("shape", [(5, 64), (3, 7, 32), (2, 3, 5, 160)])
def test_bits_survive_both_ways(shape, fmt):
    packed = any_bits(shape, fmt)
    planar = quick_jit(to_planar)(packed)
    planes = -(-shape[-1] // PAIR)
    assert planar.codes.shape == (*shape[:-2], planes * BLOCK, shape[-2])
    assert planar.scales.shape == (*shape[:-2], planes * 2, shape[-2])
    assert planar.codes.dtype == planar.scales.dtype == jnp.uint8 and planar.shape == shape
    back = quick_jit(to_packed)(planar)
    assert back.format == fmt and jax.tree.structure(back) == jax.tree.structure(packed)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(packed), strict=True):
        assert np.array_equal(a, b)


def test_where_each_element_lies():
    """By the definition: column k of the release is row k % 32 of plane k // 64, high in its second
    half; what pads is a block of zeros."""
    w = np.random.default_rng(1).standard_normal((2, 3, 96)).astype(np.float32)
    packed = pack(quantize(jnp.asarray(w)))
    values, planar = np.asarray(dequantize(packed)), to_planar(packed)
    codes, scales = np.asarray(planar.codes, int), np.asarray(planar.scales, int)
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for k in range(128):
        plane, high, row = k // PAIR, k // BLOCK % 2, k % BLOCK
        nibble = codes[:, plane * BLOCK + row] >> 4 * high & 15
        scale = scales[:, 2 * plane + high]
        decoded = (1 - 2.0 * (nibble >> 3)) * grid[nibble & 7] * 2.0 ** (scale - 127)
        if k < 96:
            assert np.array_equal(decoded, values[:, :, k])
        else:
            assert not nibble.any() and (scale == 1).all()


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match="planar: nvfp4 .* is no stack of MXFP4 matrices"):
        to_planar(pack(quantize(jnp.ones((4, 64)), NVFP4)))
    with pytest.raises(ValueError, match="no stack of MXFP4 matrices"):
        to_planar(pack(quantize(jnp.ones(64))))

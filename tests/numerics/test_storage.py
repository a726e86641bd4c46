"""pack and unpack against a loop over nibbles, and both containers as pytrees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.numerics.bits import assert_same, bytes_of_values
from v4jax.numerics import (
    FORMATS,
    FP8_128X128,
    MXFP4,
    NVFP4,
    Packed,
    Quantized,
    dequantize,
    pack,
    quantize,
    unpack,
)

every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def sample(fmt, shape=(3, 2, 128)) -> Quantized:
    x = np.random.default_rng(0).standard_t(2, shape).astype(np.float32)
    x[0, 0, :40] = 0
    x[1, 1, 5] = np.nan
    return jax.jit(quantize, static_argnums=1)(x, fmt)


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=lambda f: f.name)
def test_low_nibble_is_the_first_of_two(fmt):
    q = sample(fmt)
    codes = bytes_of_values(q)
    expected = np.zeros((3, 2, 64), np.uint8)
    for i, j, k in np.ndindex(expected.shape):
        expected[i, j, k] = codes[i, j, 2 * k] + 16 * codes[i, j, 2 * k + 1]
    assert len(np.unique(codes)) == 16
    assert_same(pack(q).codes, expected)
    assert_same(jax.jit(pack)(q).codes, expected)
    assert_same(jax.jit(jax.vmap(pack))(q).codes, expected)


def test_every_byte_holds_the_two_codes_of_its_nibbles():
    packed = Packed(
        codes=jnp.arange(256, dtype=jnp.uint8).reshape(16, 16),
        scales=jnp.full((16, 1), 127, jnp.uint8),
        tensor_scale=None,
        format=MXFP4,
    )
    values = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values += [-v for v in values]
    low, high = np.meshgrid(values, values)
    expected = np.stack([low, high], axis=-1).reshape(16, 32).astype(np.float32)
    assert_same(dequantize(packed), expected)
    assert_same(pack(unpack(packed)).codes, packed.codes)


@every_format
def test_unpack_has_the_bits_that_were_packed(fmt):
    q = sample(fmt)
    packed = jax.jit(pack)(q)
    assert packed.codes.dtype == packed.scales.dtype == jnp.uint8
    assert packed.codes.size * 8 == q.values.size * fmt.bits
    for back in (unpack(packed), jax.jit(jax.vmap(unpack))(packed)):
        assert back.format == fmt
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(q), strict=True):
            assert a.dtype == b.dtype
            assert_same(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
    assert_same(dequantize(packed), dequantize(q))
    assert np.isnan(dequantize(packed)[1, 1, 5])
    assert_same(dequantize(packed, jnp.bfloat16), dequantize(q, jnp.bfloat16))


def test_leaves():
    names = {
        fmt.name: [
            jax.tree_util.keystr(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(pack(sample(fmt)))
        ]
        for fmt in (MXFP4, NVFP4, FP8_128X128)
    }
    assert names == {
        "mxfp4": [".codes", ".scales"],
        "nvfp4": [".codes", ".scales", ".tensor_scale"],
        "fp8_128x128": [".codes", ".scales"],
    }


def test_containers_pass_through_scan_with_their_format():
    packed = pack(sample(MXFP4))
    _, values = jax.lax.scan(lambda carry, p: (carry, dequantize(p)), None, packed)
    assert_same(values, dequantize(packed))


def test_a_poisoned_block_is_code_255_and_zeros():
    q = sample(MXFP4)
    packed = pack(q)
    assert packed.scales[1, 1].tolist()[0] == 255
    assert not packed.codes[1, 1, :16].any()
    assert (packed.scales == 255).sum() == 1


def test_an_odd_axis_does_not_pair():
    odd = dataclasses.replace(MXFP4, name="odd", block=(1, 3))
    with pytest.raises(ValueError, match=r"odd: the last axis of \(1, 3\) is odd: no pairs"):
        pack(quantize(jnp.ones((1, 3)), odd))

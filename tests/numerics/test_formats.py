"""The records, and the shapes and sizes that follow from them."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.numerics import brute_force
from v4jax import numerics
from v4jax.numerics import FORMATS, FP8_128X128, MXFP4, NVFP4, bytes_of, pack, quantize


def test_records():
    table = {
        fmt.name: (fmt.element.name, fmt.bits, fmt.block, fmt.scale.name, fmt.ragged)
        for fmt in FORMATS.values()
    }
    assert table == {
        "mxfp4": ("float4_e2m1fn", 4, (1, 32), "float8_e8m0fnu", False),
        "mxfp4_floor": ("float4_e2m1fn", 4, (1, 32), "float8_e8m0fnu", False),
        "mxfp4_even": ("float4_e2m1fn", 4, (1, 32), "float8_e8m0fnu", False),
        "nvfp4": ("float4_e2m1fn", 4, (1, 16), "float8_e4m3fn", False),
        "fp8_128x128": ("float8_e4m3fn", 8, (128, 128), "float8_e8m0fnu", True),
        "fp8_1x128": ("float8_e4m3fn", 8, (1, 128), "float8_e8m0fnu", False),
    }
    assert list(table) == list(FORMATS)
    assert all(getattr(numerics, name.upper()) is fmt for name, fmt in FORMATS.items())
    # The brute force of the other tests covers every record, and its own blocks are these.
    assert brute_force.BLOCKS == {name: fmt.block for name, fmt in FORMATS.items()}
    assert [fmt.rule.limit for fmt in FORMATS.values()] == [
        6, np.nextafter(np.float32(8), 0), np.nextafter(np.float32(7), 0), 6, 448, 448,
    ]  # fmt: skip


def test_a_record_is_immutable_hashable_static_data():
    assert len(set(FORMATS.values())) == len(FORMATS)
    copy = pickle.loads(pickle.dumps(NVFP4))
    assert copy == NVFP4 and hash(copy) == hash(NVFP4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        MXFP4.name = "other"
    tree = jax.tree.structure(quantize(jnp.ones((1, 32)), MXFP4))
    assert tree.num_leaves == 2 and "mxfp4" in str(tree)


def test_a_variant_is_a_replaced_record():
    kv = dataclasses.replace(numerics.FP8_1X128, name="fp8_1x64", block=(1, 64))
    x = np.random.default_rng(0).standard_t(2, (3, 128)).astype(np.float32)
    q = jax.jit(quantize, static_argnums=1)(x, kv)
    amax = np.abs(x.reshape(3, 2, 64)).max(axis=-1)
    exponents = [brute_force.power_of_two(float(a), "fp8_1x128") for a in amax.ravel()]
    assert (np.asarray(q.scales).view(np.uint8).ravel() == np.add(exponents, 127)).all()


@pytest.mark.parametrize(
    ("shape", "fmt", "scales"),
    [
        ((64,), MXFP4, (2,)),
        ((3, 5, 64), MXFP4, (3, 5, 2)),
        ((3, 64), NVFP4, (3, 4)),
        ((2, 129, 5), FP8_128X128, (2, 2, 1)),
        ((256, 128), FP8_128X128, (2, 1)),
        ((0, 32), MXFP4, (0, 1)),
    ],
)
def test_scale_shape_and_bytes_are_those_of_the_packed_tensor(shape, fmt, scales):
    packed = jax.eval_shape(
        lambda x: pack(quantize(x, fmt)), jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    assert fmt.scale_shape(shape) == packed.scales.shape == scales
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(packed)]
    assert bytes_of(shape, fmt) == sum(sizes)


def test_bytes_of_plain_dtypes_and_ratios():
    shape = (4, 64, 128)
    assert bytes_of(shape, None) == bytes_of(shape, "float32") == 4 * 64 * 128 * 4
    assert bytes_of(shape, jnp.bfloat16) == 4 * 64 * 128 * 2
    assert bytes_of(shape, MXFP4) * 8 == 4 * 64 * 128 * 4.25
    assert bytes_of(shape, NVFP4) * 8 == 4 * 64 * 128 * 4.5 + 4 * 32
    assert bytes_of((32,), NVFP4) == 16 + 2 + 4


@pytest.mark.parametrize(
    ("shape", "fmt", "message"),
    [
        (
            (3, 40),
            MXFP4,
            "mxfp4: axis -1 of shape (3, 40) is not divisible by 32, of block (1, 32)",
        ),
        ((8,), NVFP4, "nvfp4: axis -1 of shape (8,) is not divisible by 16, of block (1, 16)"),
        ((5,), FP8_128X128, "fp8_128x128: shape (5,) has fewer axes than block (128, 128)"),
        ((), MXFP4, "mxfp4: shape () has fewer axes than block (1, 32)"),
    ],
)
@pytest.mark.parametrize("function", [numerics.quantize, numerics.fake_quantize])
def test_a_shape_that_does_not_fit_ends_in_one_line(function, shape, fmt, message):
    with pytest.raises(ValueError) as error:
        function(jnp.zeros(shape), fmt)
    assert str(error.value) == message
    with pytest.raises(ValueError) as error:
        bytes_of(shape, fmt)
    assert str(error.value) == message

"""MXFP4's bytes to floats, on every code with every scale, against float64 and ml_dtypes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from v4jax.numerics import MXFP4, Packed, dequantize

CODES = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
SCALES = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, axis=1)


def expected(codes, scales) -> np.ndarray:
    """float32 [..., 2 n]: element times 2^(scale - 127), NaN where the scale is 255."""
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    elements = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    power = np.ldexp(1.0, scales.astype(int) - 127)
    values = elements * np.repeat(np.where(scales == 255, np.nan, power), 32, axis=-1)
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


@pytest.mark.parametrize("scales", [slice(None), slice(2, 253)], ids=["all", "the usual"])
@pytest.mark.parametrize("how", ["jitted", "closed over", "eager"])
def test_every_code_with_every_scale(how, scales):
    codes, bytes_of_scales = CODES[scales], SCALES[scales]
    packed = Packed(jnp.asarray(codes), jnp.asarray(bytes_of_scales), None, MXFP4)
    found = {
        "jitted": lambda: jax.jit(dequantize)(packed),
        "closed over": jax.jit(lambda: dequantize(packed)),  # jax 0.10.2 errs on FP4 constants
        "eager": lambda: dequantize(packed),
    }[how]()
    found, wanted = np.asarray(found), expected(codes, bytes_of_scales)
    nan = np.isnan(wanted)
    assert np.array_equal(np.isnan(found), nan)
    assert np.array_equal(found.view(np.int32)[~nan], wanted.view(np.int32)[~nan])

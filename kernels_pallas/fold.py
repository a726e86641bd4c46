"""MXFP4 rows as FP8 rows with one scale each, exactly: operands for FP8 tensor cores.

    e2m1_j * 2^e_block(j)  =  e4m3_j * 2^base        e4m3_j = e2m1_j * 2^(e_block(j) - base)

An E2M1 value times 2^r is an E4M3 value for r from -8 to 6. With base = (the row's largest e) - 6
the exponents of a row's blocks go into its elements without loss if they span at most 14; blocks of
zeros do not count, and small blocks of large elements may lie further down. Blocks of Gaussian
values span 2 or so, of raw activations with outliers 6, after the Hadamard rotation 1 or 2.

Where a row spans more, elements below 2^-9 of its scale are rounded, to at most 2^-10 of it, and
`exact` says so. Who multiplies folded operands asks it, on the device, and has the values in BF16,
which holds them all, for the other case: see `index_scores`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from v4jax.numerics import Quantized, blocks, exact, is_mxfp4
from v4jax.numerics.formats import E4M3

_TOP = 6  # the exponent that the row's largest block gets: 6 * 2^6 = 384 is below E4M3's 448
_SMALLEST = -126  # of a scale: float32 flushes what is below


class Folded(NamedTuple):
    """values: float8_e4m3fn [..., n]. scale: float32 [...], a power of two, of the row.
    exact: bool [...], whether values * scale are the row's values."""

    values: Array
    scale: Array
    exact: Array


def fold(q: Quantized) -> Folded:
    """MXFP4 values [..., n] in E4M3. A row with a NaN block is not exact, and the block becomes 0.

    Raises ValueError, one line, for a format that has not MXFP4's elements, blocks and scales.
    """
    if not is_mxfp4(q.format):
        raise ValueError(f"fold: {q.format.name} is not made of E2M1 with E8M0 scales")
    tile = q.format.tile
    code = lax.bitcast_convert_type(q.scales, jnp.uint8).astype(jnp.int32)  # [..., blocks]
    values = blocks.split(q.values.astype(jnp.float32), tile)  # [..., blocks, 32]
    counts = jnp.any(values != 0, axis=-1) & (code != 255)
    largest = jnp.max(jnp.where(counts, code, 0), axis=-1)
    base = jnp.maximum(largest - 127 - _TOP, _SMALLEST)  # [...]
    shift = jnp.where(counts, code - 127 - base[..., None], 0)
    # Below -40 all is rounded to zero anyway, and the product stays a normal float32.
    power = exact.from_bits((jnp.maximum(shift, -40) + 127) << exact.MANTISSA)
    sign, magnitude = exact.sign_and_magnitude(values * power[..., None])
    rounded = exact.round_to(exact.from_bits(magnitude), E4M3)
    lossless = jnp.all((exact.to_bits(rounded) == magnitude), axis=(-1, -2))
    lossless &= jnp.all((code != 255) & (shift >= -40), axis=-1)
    folded = exact.from_bits(sign | exact.to_bits(rounded)).astype(E4M3)
    return Folded(
        values=blocks.merge(folded, q.values.shape, tile),
        scale=exact.from_bits((base + 127) << exact.MANTISSA),
        exact=lossless,
    )

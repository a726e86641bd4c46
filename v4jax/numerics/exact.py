"""Float32 arithmetic whose bits do not depend on the backend.

CPUs and TPUs read and write subnormals (below 2^-126) as zero, GPUs keep them. XLA divides by a
broadcast number by multiplying with its reciprocal, and GPUs divide to within two units in the last
place. So subnormals are kept here, by integer operations wherever one can occur, and nothing is
divided but by reciprocals, which for powers of two are built from bits. All functions take
magnitudes, with the sign bit 0; `sign_and_magnitude` splits off the sign.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array, lax

MANTISSA = 23  # bits of a float32 mantissa
SMALLEST_NORMAL = 1 << MANTISSA  # bits of 2^-126
ONE = 127 << MANTISSA  # bits of 1.0
INFINITY = 255 << MANTISSA  # bits of infinity; larger magnitudes are NaN


def to_bits(x: Array) -> Array:
    """int32 bit pattern of float32 `x`. Magnitudes keep their order."""
    return lax.bitcast_convert_type(x, jnp.int32)


def from_bits(bits: Array) -> Array:
    """float32 with the int32 bit pattern `bits`."""
    return lax.bitcast_convert_type(bits, jnp.float32)


def sign_and_magnitude(x: Array) -> tuple[Array, Array]:
    """(sign, magnitude) bits of float32 `x`, int32; their bitwise or is x again."""
    bits = to_bits(x)
    magnitude = bits & 0x7FFFFFFF
    return bits ^ magnitude, magnitude


def reciprocal(scale: Array) -> Array:
    """1 / scale, for `scale` in [2^-126, 2^127): exact for a power of two, on every backend."""
    power = to_bits(scale) & INFINITY
    fraction = from_bits(to_bits(scale) - power + ONE)  # scale / power, in [1, 2)
    return from_bits(2 * ONE - power) * (1 / fraction)


def divide(magnitude: Array, scale: Array) -> Array:
    """float32 product of the magnitude with these bits (int32) and reciprocal(scale).

    Rounded to nearest, and exact for a power of two; a subnormal result may become zero.
    """
    inverse = reciprocal(scale)
    subnormal = magnitude.astype(jnp.float32) * (2.0**-126 * inverse) * 2.0**-MANTISSA
    return jnp.where(magnitude < SMALLEST_NORMAL, subnormal, from_bits(magnitude) * inverse)


def multiply(x: Array, scale: Array) -> Array:
    """float32 product of an element `x`, zero or at least 2^-62, and any `scale`; NaN if either is.

    Rounded to nearest, but truncated if subnormal; exact for a power of two, since an element of a
    few bits loses none of them to either.
    """
    bits = to_bits(scale)
    tiny = bits < SMALLEST_NORMAL  # E8M0 code 0 is 2^-127: double the scale, halve x
    scale = jnp.where(tiny, from_bits(bits << 1), scale)
    x = jnp.where(tiny, 0.5 * x, x)
    # The product in units of 2^-126, as far as it can be subnormal, then of 2^-149: its bits.
    normals = x * (jnp.minimum(scale, 2.0**-64) * 2.0**126)
    subnormal = (normals * 2.0**MANTISSA).astype(jnp.int32)
    return from_bits(jnp.where(normals < 1, subnormal, to_bits(x * scale)))


def round_to(x: Array, element: np.dtype) -> Array:
    """`x` rounded to the grid of a float type of 8 bits or fewer: ties to even, saturating.

    x, result: float32, any shape; NaN stays NaN. The result casts to `element` exactly, so nothing
    depends on how a backend rounds in casts, or on XLA eliding a cast and its inverse.
    """
    step = _step(x, element)
    rounded = jnp.round(x * from_bits(2 * ONE - step)) * from_bits(step)
    return jnp.minimum(rounded, float(ml_dtypes.finfo(element).max))


def around(x: Array, element: np.dtype) -> tuple[Array, Array]:
    """The largest number of the type's grid that is at most `x`, and the smallest at least `x`.

    Both are `x` where it is on the grid, and the type's maximum beyond it. x as in `round_to`.
    """
    step = _step(x, element)
    low = jnp.floor(x * from_bits(2 * ONE - step)) * from_bits(step)
    high = jnp.where(low < x, low + from_bits(step), low)
    largest = float(ml_dtypes.finfo(element).max)
    return jnp.minimum(low, largest), jnp.minimum(high, largest)


def _step(x: Array, element: np.dtype) -> Array:
    """Bits of the grid's step at `x`, a power of two."""
    info = ml_dtypes.finfo(element)
    smallest = (127 + int(info.minexp)) << MANTISSA
    return jnp.maximum(to_bits(x) & INFINITY, smallest) - (int(info.nmant) << MANTISSA)

"""Scale rules: from the largest magnitude of each block to the block's scale.

A rule is called with `amax`, the int32 bits of the maxima [..., blocks], and the type of a scale.
It returns (scales [..., blocks], scale of the matrix or None), float32, the scales on the grid of
that type. A block that holds inf or NaN (amax >= INFINITY) gets the scale NaN, which makes all
of it NaN: anything finite would hide a divergence. Maxima are taken of integers because XLA, on a
CPU, drops NaN from float maxima over 4096 elements or more.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from v4jax.numerics.exact import INFINITY, MANTISSA, ONE, from_bits, reciprocal, round_to


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


@dataclass(frozen=True)
class PowerOfTwo:
    """The smallest power of two s with amax <= limit * s, exactly; amax is raised to `floor` first.

    With the element's maximum as the limit nothing saturates (the released rule). Beyond it the
    largest elements may: OCP's floor(log2(amax)) - 2 is the limit just below 8.
    """

    limit: float
    floor: float

    def __call__(self, amax: Array, scale: np.dtype) -> tuple[Array, None]:
        # Adding the largest mantissa to the difference of two bit patterns rounds its exponent up,
        # to ceil(log2(amax / limit)): it carries just if amax has more mantissa than the limit.
        steps = jnp.maximum(amax, _bits(self.floor)) - _bits(self.limit) + (1 << MANTISSA) - 1
        power = from_bits((steps & -(1 << MANTISSA)) + ONE)
        return jnp.where(amax < INFINITY, power, jnp.nan), None


@dataclass(frozen=True)
class TwoLevel:
    """amax / limit rounded to the scale type, relative to a float32 scale of the whole matrix.

    The matrix is the last two axes (leading axes are stacks: each expert has a scale of its own).
    Its scale [..., 1, 1] takes its largest finite magnitude, raised to `floor` first, to
    limit * (the largest scale). A block's scale is no less than the smallest positive one. Of
    activations with time among the last two axes, the matrix's scale sees the future.
    """

    limit: float
    floor: float

    def __call__(self, amax: Array, scale: np.dtype) -> tuple[Array, Array]:
        info = ml_dtypes.finfo(scale)
        finite = jnp.where(amax < INFINITY, amax, 0)
        matrix = tuple(range(-min(2, amax.ndim), 0))
        largest = jnp.maximum(jnp.max(finite, matrix, keepdims=True), _bits(self.floor))
        whole = from_bits(largest) * np.float32(1 / (self.limit * float(info.max)))
        ratio = from_bits(finite) * reciprocal(whole) * np.float32(1 / self.limit)
        block = round_to(jnp.maximum(ratio, float(info.smallest_subnormal)), scale)
        return jnp.where(amax < INFINITY, block, jnp.nan), whole

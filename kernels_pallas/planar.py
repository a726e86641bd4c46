"""The layout of MXFP4 weights that accelerators read: planes of 32 rows, the outputs in the lanes.

A released matrix [N, K] (out, in) has its blocks of 32 along K, and two neighbours along K in a
byte. A kernel that unpacks it would have to interleave lanes and to transpose. Here K comes first
and N last:

    codes   uint8 [K/2, N]: rows 32j to 32j+31 hold, in their low nibbles, the released columns 64j
            to 64j+31, and in their high nibbles 64j+32 to 64j+63. Each half is one MXFP4 block, and
            32 rows of bytes are one TPU tile.
    scales  uint8 [K/32, N]: E8M0, one for each block and output.

K is padded to a multiple of 64 with blocks of zeros: code 0, scale 2^-126 (byte 1). The conversions
move bits and never values: exact both ways.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array

from v4jax.numerics import Format, Packed, is_mxfp4

BLOCK = 32  # of MXFP4, along K
PAIR = 2 * BLOCK  # the low and the high nibbles of one plane
ZERO_SCALE = 1  # E8M0 of a block of zeros, as released


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Planar:
    """MXFP4 weights for accelerators; a pytree, with `width` and `format` as static data.

    codes: uint8 [..., ceil(K / 64) * 32, N].
    scales: uint8 [..., ceil(K / 64) * 2, N].
    width: K, without padding.
    """

    codes: Array
    scales: Array
    width: int = field(metadata={"static": True})
    format: Format = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights as released: (..., N, K)."""
        return (*self.codes.shape[:-2], self.codes.shape[-1], self.width)


def to_planar(p: Packed) -> Planar:
    """The planes of packed weights [..., N, K]. Raises ValueError for bits that are not MXFP4's."""
    if not is_mxfp4(p.format) or p.codes.ndim < 2:
        raise ValueError(f"planar: {p.format.name} {p.codes.shape} is no stack of MXFP4 matrices")
    width = 2 * p.codes.shape[-1]
    *lead, rows, _ = p.codes.shape
    nibbles = jnp.stack([p.codes & 15, p.codes >> 4], axis=-1).reshape(*lead, rows, width)
    nibbles = _pad(nibbles, PAIR, 0).reshape(*lead, rows, -1, 2, BLOCK)
    codes = (nibbles[..., 0, :] | nibbles[..., 1, :] << 4).reshape(*lead, rows, -1)
    scales = _pad(p.scales, 2, ZERO_SCALE)
    return Planar(jnp.swapaxes(codes, -1, -2), jnp.swapaxes(scales, -1, -2), width, p.format)


def to_packed(p: Planar) -> Packed:
    """The inverse of `to_planar`, bit for bit."""
    codes = jnp.swapaxes(p.codes, -1, -2)
    *lead, rows, _ = codes.shape
    planes = codes.reshape(*lead, rows, -1, BLOCK)
    nibbles = jnp.stack([planes & 15, planes >> 4], axis=-2).reshape(*lead, rows, -1)
    pairs = nibbles[..., : p.width].reshape(*lead, rows, -1, 2)
    scales = jnp.swapaxes(p.scales, -1, -2)[..., : p.width // BLOCK]
    return Packed(pairs[..., 0] | pairs[..., 1] << 4, scales, None, p.format)


def _pad(x: Array, multiple: int, value: int) -> Array:
    missing = -x.shape[-1] % multiple
    padding = [(0, 0)] * (x.ndim - 1) + [(0, missing)]
    return jnp.pad(x, padding, constant_values=value) if missing else x

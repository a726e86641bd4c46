"""Number formats as records: what an element is, what shares a scale, and how the scale is chosen.

A new format is a new record; no code asks for a format's name.
"""

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from v4jax.numerics import blocks
from v4jax.numerics.scales import PowerOfTwo, TwoLevel

E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)  # 0, 0.5, 1, 1.5, 2, 3, 4, 6; no inf, no NaN
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)  # up to 448, no inf
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)  # 2^(code - 127), code 255 NaN; no zero, no sign


@dataclass(frozen=True)
class Format:
    """Blocks of `element`s that share one `scale`: value = element * scale (* scale of the matrix).

    name: its key in FORMATS.
    element, scale: numpy dtypes, of ml_dtypes.
    block: (rows, columns) of the last two axes; with one row, blocks lie on the last axis alone.
    rule: block maxima -> scales.
    ragged: whether blocks at the edge may be short; otherwise a shape must divide.
    rotated: whether the indexer's activations are rotated by Hadamard before they are rounded
      (report 5.2.1); weights never are.
    """

    name: str
    element: np.dtype
    block: tuple[int, int]
    scale: np.dtype
    rule: PowerOfTwo | TwoLevel
    ragged: bool = False
    rotated: bool = True

    @property
    def tile(self) -> tuple[int, ...]:
        """The block as sizes of the trailing axes that it spans, one or two."""
        return self.block[1:] if self.block[0] == 1 else self.block

    @property
    def bits(self) -> int:
        """Width of an element."""
        return ml_dtypes.finfo(self.element).bits

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of an array of `shape`; ValueError if the format cannot hold it."""
        shape, tile = tuple(shape), self.tile
        if len(shape) < len(tile):
            raise ValueError(f"{self.name}: shape {shape} has fewer axes than block {self.block}")
        if not self.ragged:
            for axis in range(-len(tile), 0):
                if shape[axis] % tile[axis]:
                    raise ValueError(
                        f"{self.name}: axis {axis} of shape {shape} is not divisible by "
                        f"{tile[axis]}, of block {self.block}"
                    )
        return blocks.grid(shape, tile)


def _below(value: float) -> float:
    """The float32 before `value`: `amax <= _below(value) * s` says `amax < value * s`."""
    return float(np.nextafter(np.float32(value), np.float32(0)))


# An all-zero block gets scale 2^-126, E8M0 code 1, as released: 6 * 2^-126 <= limit * 2^-126.
_FP4_FLOOR = 6 * 2.0**-126
_FP8_FLOOR = 1e-4

# Released (reference kernel.py): ceil(log2(amax / 6)), so that nothing saturates.
MXFP4 = Format("mxfp4", E2M1, (1, 32), E8M0, PowerOfTwo(6, _FP4_FLOOR))
# OCP Microscaling 1.0, section 6.3: floor(log2(amax)) - 2, the scale doubles at 8 * 2^k.
MXFP4_FLOOR = Format("mxfp4_floor", E2M1, (1, 32), E8M0, PowerOfTwo(_below(8), _FP4_FLOOR))
# The maximum rounded to one mantissa bit, then as OCP: the scale doubles at 7 * 2^k.
MXFP4_EVEN = Format("mxfp4_even", E2M1, (1, 32), E8M0, PowerOfTwo(_below(7), _FP4_FLOOR))
# Below its floor of 2^-100 * 6 * 448 a matrix is scaled by 2^-100, and ends in zeros.
NVFP4 = Format("nvfp4", E2M1, (1, 16), E4M3, TwoLevel(6, 6 * 448 * 2.0**-100))
# Released weights ("scale_fmt": "ue8m0") and activations.
FP8_128X128 = Format(
    "fp8_128x128", E4M3, (128, 128), E8M0, PowerOfTwo(448, _FP8_FLOOR), ragged=True
)
FP8_1X128 = Format("fp8_1x128", E4M3, (1, 128), E8M0, PowerOfTwo(448, _FP8_FLOOR))

FORMATS = {fmt.name: fmt for fmt in (MXFP4, MXFP4_FLOOR, MXFP4_EVEN, NVFP4, FP8_128X128, FP8_1X128)}


def format_named(name: str) -> Format:
    """The format of a name: a key of FORMATS, then maybe -16 for blocks of 16 along the last axis,
    -plain for activations that are not rotated: mxfp4, mxfp4-64, mxfp4-plain.

    Raises ValueError, one line.
    """
    base, *options = name.split("-")
    if base not in FORMATS:
        raise ValueError(f"unknown format {name!r}, known: {', '.join(FORMATS)}")
    fmt = FORMATS[base]
    for option in options:
        if option == "plain":
            fmt = replace(fmt, name=name, rotated=False)
        elif option.isdecimal() and int(option) > 0:
            fmt = replace(fmt, name=name, block=(1, int(option)))
        else:
            raise ValueError(f"format {name!r}: {option!r}: allowed: a length of blocks, or plain")
    return fmt


def is_mxfp4(fmt: Format) -> bool:
    """Whether a format has MXFP4's bits, however it chooses its scales."""
    return (fmt.element, fmt.block, fmt.scale) == (MXFP4.element, MXFP4.block, MXFP4.scale)

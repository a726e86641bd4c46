"""Quantization by search, in numpy: what v4jax.numerics must equal bit for bit.

One block at a time. The scale is found by trying powers of two upwards, an element by its distance
to every point of the grid, all in float64, where both are exact. Shares nothing with v4jax: grids
are decoded from their bit fields here, rules are stated by format name.
"""

import operator
from typing import NamedTuple

import numpy as np


def decode(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """The value of a small float's code, from its fields."""
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa * 2.0**-mantissa_bits) * 2.0 ** (exponent - bias)


# Magnitudes by code. 0x7f of E4M3 is NaN.
E2M1 = np.array([decode(code, 2, 1, 1) for code in range(8)])
E4M3 = np.array([decode(code, 4, 3, 7) for code in range(127)])

# Format -> (grid, scale doubles while `amax OP limit * scale`, amax's floor), then block sizes.
POWER_OF_TWO = {
    "mxfp4": (E2M1, operator.gt, 6, 6 * 2.0**-126),
    "mxfp4_floor": (E2M1, operator.ge, 8, 6 * 2.0**-126),
    "mxfp4_even": (E2M1, operator.ge, 7, 6 * 2.0**-126),
    "fp8_128x128": (E4M3, operator.gt, 448, 1e-4),
    "fp8_1x128": (E4M3, operator.gt, 448, 1e-4),
}
BLOCKS = {
    "mxfp4": (1, 32),
    "mxfp4_floor": (1, 32),
    "mxfp4_even": (1, 32),
    "nvfp4": (1, 16),
    "fp8_128x128": (128, 128),
    "fp8_1x128": (1, 128),
}


class Result(NamedTuple):
    codes: np.ndarray  # uint8, in x's shape, the sign bit above the magnitude's bits
    scales: np.ndarray  # uint8
    tensor_scale: np.ndarray | None  # float32 [..., 1, 1]
    values: np.ndarray  # float32, in x's shape


def nearest(y: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Index of the grid point closest to each y >= 0; of two, the even one."""
    distance = np.abs(y[..., None] - grid)
    closest = distance == distance.min(axis=-1, keepdims=True)
    first = closest.argmax(axis=-1)
    return first + ((closest.sum(axis=-1) == 2) & (first % 2 == 1))


def power_of_two(amax: float, name: str) -> int:
    """Exponent of the block's scale."""
    _, doubles, limit, floor = POWER_OF_TWO[name]
    exponent = -126
    while doubles(max(amax, floor), limit * 2.0**exponent):
        exponent += 1
    return exponent


def quantize(x: np.ndarray, name: str) -> Result:
    """`x` float32 [..., n] in the format of that name."""
    matrices = x.reshape(-1, *x.shape[-2:]) if x.ndim > 1 else x[None, None]
    results = [_matrix(matrix, name) for matrix in matrices]
    codes, scales, whole, values = (np.stack(part) for part in zip(*results, strict=True))
    lead = x.shape[:-2]
    scales = scales.reshape(*lead, *scales.shape[1:]) if x.ndim > 1 else scales[0, 0]
    whole = whole.reshape(*lead, *(1, 1)[: x.ndim]) if name == "nvfp4" else None
    return Result(codes.reshape(x.shape), scales, whole, values.reshape(x.shape))


def _matrix(x: np.ndarray, name: str):
    rows, columns = BLOCKS[name]
    counts = (-(-x.shape[0] // rows), -(-x.shape[1] // columns))
    codes, values = np.zeros(x.shape, np.uint8), np.zeros(x.shape, np.float32)
    scales = np.zeros(counts, np.uint8)
    whole = _whole(x, columns) if name == "nvfp4" else np.float32(1)
    for i, j in np.ndindex(counts):
        at = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        block = x[at]
        if not np.isfinite(block).all():
            scales[i, j] = 0x7F if name == "nvfp4" else 0xFF
            values[at] = np.nan
        elif name == "nvfp4":
            codes[at], scales[i, j], values[at] = _nvfp4(block, whole)
        else:
            codes[at], scales[i, j], values[at] = _block(block, name)
    return codes, scales, whole, values


def _block(x: np.ndarray, name: str):
    exponent = power_of_two(float(np.abs(x).max()), name)
    codes, elements = _elements(x.astype(np.float64) / 2.0**exponent, POWER_OF_TWO[name][0])
    with np.errstate(over="ignore"):
        values = (elements * 2.0**exponent).astype(np.float32)
    return codes, exponent + 127, values


def _elements(y: np.ndarray, grid: np.ndarray):
    """(codes with sign, signed grid values) of y."""
    index = nearest(np.abs(y), grid)
    negative = np.signbit(y)
    return index + negative * (len(grid) + len(grid) % 2), np.copysign(grid[index], y)


# NVFP4's scales are not powers of two, so its float32 operations round, and are taken one by one.


def _whole(x: np.ndarray, columns: int) -> np.float32:
    """Scale of a matrix: its largest magnitude over 6 * 448, blocks with inf or NaN left out."""
    blocks = np.abs(x.reshape(-1, columns))
    finite = blocks[np.isfinite(blocks).all(axis=1)]
    largest = max(finite.max(initial=0), np.float32(6 * 448 * 2.0**-100))
    return np.float32(largest) * np.float32(1 / (6 * 448))


def _nvfp4(x: np.ndarray, whole: np.float32):
    ratio = np.abs(x).max() * (np.float32(1) / whole) * np.float32(1 / 6)
    code = nearest(np.maximum(np.float64(ratio), 2.0**-9), E4M3)
    scale = np.float32(E4M3[code]) * whole
    codes, elements = _elements((x * (np.float32(1) / scale)).astype(np.float64), E2M1)
    with np.errstate(over="ignore"):
        return codes, code, elements.astype(np.float32) * scale

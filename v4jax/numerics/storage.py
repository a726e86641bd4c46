"""How quantized tensors are held: in the types of their format, or as bytes."""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from v4jax.numerics.formats import Format
from v4jax.numerics.scales import TwoLevel


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A tensor in the types of its format; a pytree, with the format as static data.

    values: the format's element type, [..., n].
    scales: its scale type, [..., n / columns], or [..., ceil(m / rows), ceil(n / columns)].
    tensor_scale: float32 [..., 1, 1], for two-level formats; otherwise None, which is no leaf.
    A block that held inf or NaN has the scale NaN and the values 0.
    """

    values: Array
    scales: Array
    tensor_scale: Array | None
    format: Format = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """The same bits as bytes, as checkpoints hold them; a pytree, with the format as static data.

    codes: uint8 [..., n / 2] for elements of 4 bits, the first of two in the low nibble; otherwise
        [..., n].
    scales: uint8, the bits of the scales, in their shape.
    tensor_scale: as in Quantized.
    """

    codes: Array
    scales: Array
    tensor_scale: Array | None
    format: Format = field(metadata={"static": True})


def pack(q: Quantized) -> Packed:
    """Bytes of `q`. Raises ValueError where 4-bit elements do not pair up."""
    values = q.values
    if q.format.bits == 4:
        if values.shape[-1] % 2:
            raise ValueError(f"{q.format.name}: the last axis of {values.shape} is odd: no pairs")
        values = values.reshape(*values.shape[:-1], values.shape[-1] // 2, 2)
    codes = lax.bitcast_convert_type(values, jnp.uint8)
    scales = lax.bitcast_convert_type(q.scales, jnp.uint8)
    return Packed(codes, scales, q.tensor_scale, q.format)


def unpack(p: Packed) -> Quantized:
    """The tensor that was packed, bit for bit."""
    values = lax.bitcast_convert_type(p.codes, p.format.element)
    if p.format.bits == 4:
        values = values.reshape(*p.codes.shape[:-1], 2 * p.codes.shape[-1])
    scales = lax.bitcast_convert_type(p.scales, p.format.scale)
    return Quantized(values, scales, p.tensor_scale, p.format)


def bytes_of(shape: tuple[int, ...], fmt: Format | DTypeLike | None) -> int:
    """Bytes that a tensor of `shape` takes packed in a format, or in a dtype; None is float32."""
    size = math.prod(shape)
    if not isinstance(fmt, Format):
        return size * jnp.dtype(np.float32 if fmt is None else fmt).itemsize
    scales = math.prod(fmt.scale_shape(shape)) * fmt.scale.itemsize
    matrices = math.prod(shape[:-2]) if isinstance(fmt.rule, TwoLevel) else 0
    return size * fmt.bits // 8 + scales + 4 * matrices

"""Quantization to block formats, back, and both at once for training.

    amax = max |x| over a block    scale = rule(amax)    values = round(x / scale) in the element
    x'   = values * scale

All arithmetic is float32. Ties go to even, the sign of zero stays, subnormals count as they are. A
block that holds inf or NaN becomes NaN as a whole, and no other block does. Of finite input, only
what rounds up to 2^128 dequantizes to inf (in MXFP4, |x| >= 1.75 * 2^127).
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from v4jax.numerics import blocks, exact
from v4jax.numerics.decode import decode
from v4jax.numerics.formats import MXFP4, Format, is_mxfp4
from v4jax.numerics.storage import Packed, Quantized, unpack


def quantize(x: Array, fmt: Format = MXFP4) -> Quantized:
    """`x` [..., n], any float dtype, in `fmt`. Leading axes are stacks.

    With a power-of-two rule, requantizing dequantized values keeps the values, but not the bits: a
    block whose maximum was rounded down may halve its scale and double its elements. Raises
    ValueError, one line, for a shape that the format cannot hold.
    """
    sign, magnitude, scales, tensor_scale = _encode(x, fmt)
    poisoned = jnp.isnan(_broadcast(scales, None, fmt.tile))
    values = jnp.where(poisoned, 0, _join(sign, magnitude)).astype(fmt.element)
    values = blocks.merge(values, x.shape, fmt.tile)
    return Quantized(values, scales.astype(fmt.scale), tensor_scale, fmt)


def dequantize(q: Quantized | Packed, dtype: DTypeLike = jnp.float32) -> Array:
    """The values of `q` [..., n], computed in float32 and cast to `dtype`."""
    if isinstance(q, Packed):
        if is_mxfp4(q.format):
            return decode(q).astype(dtype)
        q = unpack(q)
    tile = q.format.tile
    values = blocks.split(q.values.astype(jnp.float32), tile)
    sign, magnitude = exact.sign_and_magnitude(values)
    scale = _broadcast(q.scales.astype(jnp.float32), q.tensor_scale, tile)
    product = _join(sign, exact.multiply(exact.from_bits(magnitude), scale))
    return blocks.merge(product, q.values.shape, tile).astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def fake_quantize(x: Array, fmt: Format = MXFP4) -> Array:
    """dequantize(quantize(x, fmt), x.dtype), bit for bit and without storing codes.

    Straight-through (report 5.2.1): the derivative is the identity, so a gradient is exactly the
    incoming cotangent, at saturated and poisoned elements too.
    """
    sign, magnitude, scales, tensor_scale = _encode(x, fmt)
    return _product(sign, magnitude, _broadcast(scales, tensor_scale, fmt.tile), x, fmt)


@fake_quantize.defjvp
def _straight_through(fmt, primals, tangents):
    return fake_quantize(*primals, fmt), *tangents


def take_apart(x: Array, fmt: Format) -> tuple[Array, Array, Array]:
    """(element, scale of its block, their product), float32 [..., n] each, as `quantize` and
    `dequantize` have them but without storing codes. Not to be differentiated."""
    sign, magnitude, scales, tensor_scale = _encode(x, fmt)
    scale = jnp.broadcast_to(_broadcast(scales, tensor_scale, fmt.tile), sign.shape)
    product = _join(sign, exact.multiply(magnitude, scale))
    element, scale, product = (
        blocks.merge(part, x.shape, fmt.tile) for part in (_join(sign, magnitude), scale, product)
    )
    return element, scale, product


def quantize_toward(x: Array, target: Array, fmt: Format) -> Array:
    """Each x rounded to that of its two neighbours which is the nearer one to `target`.

    x, target: float [..., n]. Scales and neighbours are those of x; a target beyond both takes the
    nearer one. With target = x it is `fake_quantize`, bit for bit. Not to be differentiated.
    """
    sign, ratio, scales, tensor_scale = _scaled(x, fmt)
    scale = _broadcast(scales, tensor_scale, fmt.tile)
    other_sign, magnitude = exact.sign_and_magnitude(
        blocks.split(target.astype(jnp.float32), fmt.tile)
    )
    wanted = exact.divide(magnitude, scale)
    wanted = jnp.where(other_sign == sign, wanted, -wanted)
    chosen = exact.round_to(jnp.clip(wanted, *exact.around(ratio, fmt.element)), fmt.element)
    return _product(sign, chosen, scale, x, fmt)


def quantize_stochastically(x: Array, uniform: Array, fmt: Format) -> Array:
    """Each x rounded to one of its two neighbours, to the upper one with the probability that makes
    the mean x. What saturates does so always.

    x: float [..., n]. uniform: float32 [..., n], independent and uniform in [0, 1). Scales are
    those of x. Not to be differentiated.
    """
    sign, ratio, scales, tensor_scale = _scaled(x, fmt)
    low, high = exact.around(ratio, fmt.element)
    up = blocks.split(uniform, fmt.tile) * (high - low) < ratio - low
    scale = _broadcast(scales, tensor_scale, fmt.tile)
    return _product(sign, jnp.where(up, high, low), scale, x, fmt)


def _encode(x: Array, fmt: Format) -> tuple[Array, Array, Array, Array | None]:
    """(sign bits, |x| / scale rounded), in the view of `blocks.split`, and the rule's scales."""
    sign, ratio, scales, tensor_scale = _scaled(x, fmt)
    return sign, exact.round_to(ratio, fmt.element), scales, tensor_scale


def _scaled(x: Array, fmt: Format) -> tuple[Array, Array, Array, Array | None]:
    """(sign bits, |x| / scale), in the view of `blocks.split`, and the rule's scales."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{fmt.name}: cannot quantize {x.dtype}, only floating point")
    fmt.scale_shape(x.shape)
    sign, magnitude = exact.sign_and_magnitude(blocks.split(x.astype(jnp.float32), fmt.tile))
    amax = jnp.max(magnitude, axis=blocks.inner_axes(fmt.tile))
    scales, tensor_scale = fmt.rule(amax, fmt.scale)
    return (
        sign,
        exact.divide(magnitude, _broadcast(scales, tensor_scale, fmt.tile)),
        scales,
        tensor_scale,
    )


def _product(sign: Array, element: Array, scale: Array, x: Array, fmt: Format) -> Array:
    """The elements [blocks] times their scales, in the shape and type of x."""
    product = _join(sign, exact.multiply(element, scale))
    return blocks.merge(product, x.shape, fmt.tile).astype(x.dtype)


def _broadcast(scales: Array, tensor_scale: Array | None, tile: tuple[int, ...]) -> Array:
    """What the elements of each block are multiplied by, against the view of `blocks.split`."""
    scale = scales if tensor_scale is None else scales * tensor_scale
    return jnp.expand_dims(scale, blocks.inner_axes(tile))


def _join(sign: Array, magnitude: Array) -> Array:
    return exact.from_bits(sign | exact.to_bits(magnitude))

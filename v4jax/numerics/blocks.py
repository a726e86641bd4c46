"""The view of an array as blocks of its trailing axes."""

import math

import jax.numpy as jnp
from jax import Array


def grid(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """How many blocks each axis holds, a short one at the edge counted: [..., ceil(n / b)]."""
    lead = len(shape) - len(block)
    return shape[:lead] + tuple(math.ceil(n / b) for n, b in zip(shape[lead:], block, strict=True))


def inner_axes(block: tuple[int, ...]) -> tuple[int, ...]:
    """The axes inside a block, in the view that `split` returns."""
    return tuple(range(1 - 2 * len(block), 0, 2))


def split(x: Array, block: tuple[int, ...]) -> Array:
    """[..., n, m] -> [..., n/b, b, m/c, c] for block (b, c); short edge blocks end in zeros."""
    lead = x.ndim - len(block)
    counts = grid(x.shape, block)
    padding = [(0, g * b - n) for g, b, n in zip(counts[lead:], block, x.shape[lead:], strict=True)]
    if any(after for _, after in padding):
        x = jnp.pad(x, [(0, 0)] * lead + padding)
    axes = [size for pair in zip(counts[lead:], block, strict=True) for size in pair]
    return x.reshape(*x.shape[:lead], *axes)


def merge(x: Array, shape: tuple[int, ...], block: tuple[int, ...]) -> Array:
    """The inverse of `split`: the array of `shape`, its padding cut off."""
    lead = len(shape) - len(block)
    padded = [g * b for g, b in zip(grid(shape, block)[lead:], block, strict=True)]
    x = x.reshape(*shape[:lead], *padded)
    return x[(..., *(slice(n) for n in shape[lead:]))] if x.shape != shape else x

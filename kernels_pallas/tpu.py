"""What the Mosaic TPU kernels share: a budget and products on the matrix unit."""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

VMEM = 48 << 20  # bytes that blocks and scratch may take: a v7x core has 64 MiB, others 128
_COMPILER = 12 << 20  # what the compiler may add to them

Interpret = bool | pltpu.InterpretParams


def params(axes: int) -> pltpu.CompilerParams:
    """Compiler parameters for a grid of which only the last axis goes in order."""
    kinds = pltpu.GridDimensionSemantics
    return pltpu.CompilerParams(
        dimension_semantics=[kinds.PARALLEL] * (axes - 1) + [kinds.ARBITRARY],
        vmem_limit_bytes=VMEM + _COMPILER,
    )


def dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """The product of matrices that contracts these axes, with float32 sums.

    int8 operands give int32. Products of float32 are exact to float32 (six passes in bfloat16).
    """
    exact = a.dtype == jnp.float32
    return lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.int32 if a.dtype == jnp.int8 else jnp.float32,
    )

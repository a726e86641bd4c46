"""What the Mosaic TPU kernels share: a budget and products on the matrix unit."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
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


def looped(call: Callable[..., Array]) -> Callable[..., Array]:
    """`call`, of arrays, whose vmap is a loop of calls, and whose result is fused with nothing.

    Pallas' own vmap of a kernel with prefetched scalars is such a loop too. But libtpu (0.0.52)
    writes a kernel's result in place into what a loop stacks, and aborts where the two differ in
    tiling, as for bfloat16 on v7x.
    """
    run = custom_vmap(lambda *arrays: lax.optimization_barrier(call(*arrays)))

    @run.def_vmap
    def _(size, is_batched, *arrays):
        def one(some):
            some = iter(some)
            return run(*(next(some) if b else a for a, b in zip(arrays, is_batched, strict=True)))

        return lax.map(one, [a for a, b in zip(arrays, is_batched, strict=True) if b]), True

    return run


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

"""What differs between jax 0.10.2 and the newest, or is not in their public API, in one place.

Types under shard_map: with check_vma (the default) a kernel's result must say over which mesh axes
it varies, and a loop's carry must vary as what it becomes.

Triton: the newest jax calls Pallas' Triton back end deprecated, in a warning at each lowering, and
offers no other for these kernels that Python code without a GPU can test. `triton_dot_fp8` and
`triton_fma` are what its public operations lack; they are JAX primitives, so Pallas' interpreter
runs them too. Their lowering rules are the only use of private modules.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.typing import DTypeLike

# ---- types under shard_map ----


def vma_of(*arrays: Array) -> frozenset[str]:
    """The mesh axes of an enclosing shard_map over which any of these varies."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def varying_like(x: Array, *arrays: Array) -> Array:
    """`x`, varying over the axes of `arrays` too; `x` itself outside shard_map."""
    missing = tuple(sorted(vma_of(*arrays) - vma_of(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def summed_like(x: Array, primal: Array) -> Array:
    """A cotangent `x` of `primal`, summed over the axes over which primal does not vary: what a
    custom VJP owes an operand that all devices share."""
    extra = tuple(sorted(vma_of(x) - vma_of(primal)))
    return lax.psum(x, extra) if extra else x


def result(shape: tuple[int, ...], dtype: DTypeLike, *operands: Array) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result, which varies over the axes that any operand varies over."""
    kind = jax.typeof(operands[0]).manual_axis_type.update(varying=vma_of(*operands))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


# ---- Triton ----


def triton_dot_fp8(a: Array, b: Array) -> Array:
    """float8 a [M, K], b [N, K] -> float32 a b^T [M, N], on the FP8 units of the tensor cores.

    A plain product of float8 operands in a Triton kernel compiles to one of float16 on Hopper, at
    half the rate: Triton takes the FP8 units only where told that their sums, of 14 bits or so in
    the hardware, will do. Sums of products of FP4 values of like scale need no more.
    """
    return _primitives()[0].bind(a, b)


def triton_dot(a: Array, b: Array, axis_a: int, axis_b: int, interpret: bool) -> Array:
    """The product of BF16 or float32 matrices that contracts these axes; float32.

    Float32 operands: three products of TF32, as exact as float32 to a few units in the last place.
    """
    precision = None
    if a.dtype == jnp.float32:
        triple = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = lax.Precision.HIGHEST if interpret else triple
    return lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def triton_fma(a: Array, b: Array, c: Array) -> Array:
    """float32 a * b + c, rounded once in the kernel: Triton contracts nothing by itself here."""
    return _primitives()[1].bind(a, b, c)


@functools.cache
def _primitives() -> tuple[Primitive, Primitive]:
    """The FP8 product and FMA as primitives; made on first use, for the modules they need."""
    from jax._src.lib.mlir.dialects import math
    from jax._src.lib.triton import dialect
    from jax._src.pallas.triton import lowering

    def dot(a, b):
        dimensions = (((1,), (1,)), ((), ()))
        return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)

    def triton_dot(context, a, b):
        [out] = context.avals_out
        zeros = lowering._zeros(mlir.aval_to_ir_type(context.context.mlir_ctx, out))
        return dialect.dot(a, dialect.trans(b, (1, 0)), zeros, max_num_imprecise_acc=1 << 30)

    def primitive(name, function, shape, rule):
        made = Primitive(name)
        made.def_impl(function)
        made.def_abstract_eval(lambda *args: jax.core.ShapedArray(shape(*args), jnp.float32))
        mlir.register_lowering(made, mlir.lower_fun(function, multiple_results=False))
        lowering.register_lowering(made)(rule)
        return made

    return (
        primitive("fp8_dot", dot, lambda a, b: (a.shape[0], b.shape[0]), triton_dot),
        primitive(
            "fma",
            lambda a, b, c: a * b + c,
            lambda a, *_: a.shape,
            lambda context, *args: math.fma(*args),
        ),
    )

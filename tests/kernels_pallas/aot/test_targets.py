"""compile_for compiles, for every target, and refuses what the device's own compiler refuses.

The planted faults all pass tracing and lowering: a check that stopped there would miss them.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton

from tests.kernels_pallas.aot.targets import (
    GPUS,
    TARGETS,
    TPUS,
    compile_for,
    devices,
    vmem_bytes,
)

TRITON = pltriton.CompilerParams(num_warps=4, num_stages=2)


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def call(kernel, shape, dtype, target, scratch=()):
    params = pltpu.CompilerParams() if target in TPUS else TRITON
    out = jax.ShapeDtypeStruct(shape, dtype)
    return pl.pallas_call(kernel, out_shape=out, scratch_shapes=scratch, compiler_params=params)


def matmul(target, out_dtype, x, y):
    def kernel(x, y, out):
        product = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)
        out[...] = product.astype(out_dtype)

    return call(kernel, (x.shape[0], y.shape[1]), out_dtype, target)(x, y)


@pytest.mark.parametrize("target", TARGETS)
def test_a_kernel_compiles(target):
    f = functools.partial(matmul, target, jnp.float32)
    compiled = compile_for(target, f, struct(128, 128), struct(128, 128))
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == 2 * 128 * 128 * 2
    assert memory.output_size_in_bytes == 128 * 128 * 4


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_around_a_kernel_compiles_too(target):
    f = jax.jit(lambda tree: jax.lax.top_k(tree["x"] @ tree["x"].T, 4))
    values, indices = compile_for(target, f, {"x": struct(256, 128)}).out_info
    assert (values.shape, indices.dtype) == ((256, 4), jnp.int32)


@pytest.mark.parametrize("target", TARGETS)
def test_arguments_may_bring_a_sharding(target):
    mesh = jax.sharding.Mesh(devices(target), ("data",))
    rows = jax.sharding.PartitionSpec("data")
    f = jax.shard_map(
        functools.partial(matmul, target, jnp.float32),
        mesh=mesh, in_specs=(rows, jax.sharding.PartitionSpec()), out_specs=rows, check_vma=False,
    )  # fmt: skip
    x = jax.ShapeDtypeStruct(
        (128 * mesh.size, 128), jnp.bfloat16, sharding=jax.sharding.NamedSharding(mesh, rows)
    )
    y = jax.ShapeDtypeStruct(
        (128, 128), jnp.bfloat16,
        sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
    )  # fmt: skip
    memory = compile_for(target, f, x, y).memory_analysis()
    assert memory.output_size_in_bytes == 128 * 128 * 4  # of one device


@pytest.mark.parametrize("target", TPUS)
def test_vmem_is_counted(target):
    """One MiB of scratch, read in a loop so that it is not optimized away."""

    def kernel(x, out, copy):
        copy[...] = x[...] * 2
        start = jnp.zeros((8, 128), jnp.float32)
        out[...] = jax.lax.fori_loop(0, 256, lambda i, sum: sum + copy[pl.ds(8 * i, 8)], start)

    scratch = [pltpu.VMEM((2048, 128), jnp.float32)]
    f = call(kernel, (8, 128), jnp.float32, target, scratch)
    compiled = compile_for(target, f, struct(2048, 128, dtype=jnp.float32))
    assert 2**20 <= vmem_bytes(compiled) < 2**22


@pytest.mark.parametrize("target", TPUS)
def test_planted_too_much_vmem(target):
    """Two copies of 40 MiB on v7x's 64 MiB, of 80 on the 128 of the others."""
    rows = (40 if target == "v7x" else 80) * 2**20 // 512

    def kernel(x, out, copy):
        copy[...] = x[...]
        out[...] = jnp.sum(copy[...], axis=0, keepdims=True)

    scratch = [pltpu.VMEM((rows, 128), jnp.float32)]
    f = call(kernel, (1, 128), jnp.float32, target, scratch)
    with pytest.raises(jax.errors.JaxRuntimeError, match="(?i)vmem"):
        compile_for(target, f, struct(rows, 128, dtype=jnp.float32))


@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_planted_float4_in_a_kernel_of_a_tpu_without_it(target):
    def kernel(x, out):
        out[...] = x[...].astype(jnp.bfloat16)

    f = call(kernel, (64, 128), jnp.bfloat16, target)
    with pytest.raises(Exception, match="Unsupported type"):  # older jax: pallas' MosaicError
        compile_for(target, f, struct(64, 128, dtype=jnp.float4_e2m1fn))


@pytest.mark.parametrize("target", GPUS)
def test_planted_float4_that_triton_cannot_parse(target):
    def kernel(x, out):
        out[...] = x[...].astype(jnp.bfloat16)

    f = call(kernel, (64, 128), jnp.bfloat16, target)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Failed to parse Triton module"):
        compile_for(target, f, struct(64, 128, dtype=jnp.float4_e2m1fn))


@pytest.mark.parametrize("target", GPUS)
def test_planted_wgmma_that_ptxas_refuses(target):
    """INT8 operands with a float32 sum instead of an int32 one."""
    f = functools.partial(matmul, target, jnp.float32)
    x = struct(128, 128, dtype=jnp.int8)
    with pytest.raises(jax.errors.JaxRuntimeError, match="ptxas"):
        compile_for(target, f, x, x)


@pytest.mark.parametrize("target", GPUS)
def test_planted_too_much_shared_memory(target):
    """Tiles of 512 x 256 and 256 x 256 in float32 are 768 KiB; a block has 227."""
    f = functools.partial(matmul, target, jnp.float32)
    x, y = struct(512, 256, dtype=jnp.float32), struct(256, 256, dtype=jnp.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="(?i)shared memory"):
        compile_for(target, f, x, y)


@pytest.mark.parametrize("target", GPUS)
def test_planted_register_spills(target):
    """A 256 x 256 float32 sum is 512 registers for each of 128 threads, which have 255."""
    f = functools.partial(matmul, target, jnp.float32)
    x, y = struct(256, 128), struct(128, 256)
    compile_for(target, f, x, y)
    with pytest.raises(jax.errors.JaxRuntimeError, match="register spilling"):
        compile_for(target, f, x, y, spills=False)


def test_an_unknown_target_is_named():
    with pytest.raises(ValueError, match="'v4', not one of v5e"):
        compile_for("v4", lambda x: x, struct(8, 128))

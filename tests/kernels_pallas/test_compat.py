"""Types under shard_map, and the Triton operations that Pallas' public API lacks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas import compat

INTERPRET = jax.default_backend() != "gpu"


def test_outside_shard_map_nothing_varies():
    x = jnp.ones(3)
    assert compat.vma_of(x, x) == frozenset()
    assert compat.varying_like(x, x) is x
    out = compat.result((2,), jnp.int32, x)
    assert (out.shape, out.dtype) == ((2,), jnp.int32)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
def test_a_kernels_result_varies_as_its_operands_do():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def add(x_ref, y_ref, out_ref):
        out_ref[...] = x_ref[...] + y_ref[...]

    def f(x, y):
        assert compat.vma_of(x, y) == {"data"} and compat.vma_of(y) == frozenset()
        y = compat.varying_like(y, x)
        assert compat.vma_of(y) == {"data"}
        return pl.pallas_call(add, out_shape=compat.result(x.shape, x.dtype, x, y))(x, y)

    specs = {"in_specs": (P("data"), P()), "out_specs": P("data")}
    # Pallas' interpreter does not take check_vma, so this is traced only; aot/test_gpu.py compiles.
    out = jax.eval_shape(jax.shard_map(f, mesh=mesh, **specs), jnp.arange(4.0), jnp.ones(2))
    assert out.shape == (4,)


def kernel_of(f, shape, *operands, **options):
    def kernel(*refs):
        *ins, out = refs
        out[...] = f(*(ref[...] for ref in ins))

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        **options,
    )(*operands)


def test_fp8_product():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.integers(-4, 5, (64, 32)), jnp.float8_e4m3fn) for _ in range(2))
    out = kernel_of(compat.triton_dot_fp8, (64, 64), a, b, interpret=INTERPRET)
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
    np.testing.assert_array_equal(np.asarray(out, np.float64), exact)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("axis_a", "axis_b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_product(axis_a, axis_b, dtype):
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal((32, 32)), dtype) for _ in range(2))
    out = kernel_of(
        lambda a, b: compat.triton_dot(a, b, axis_a, axis_b, INTERPRET),
        (32, 32),
        a,
        b,
        interpret=INTERPRET,
    )
    exact = np.tensordot(np.asarray(a, np.float64), np.asarray(b, np.float64), (axis_a, axis_b))
    np.testing.assert_allclose(np.asarray(out), exact, atol=2e-5)


def test_fma():
    a, b, c = (jnp.asarray([x] * 4, jnp.float32) for x in (3.0, -2.0, 0.5))
    out = kernel_of(compat.triton_fma, (4,), a, b, c, interpret=INTERPRET)
    np.testing.assert_array_equal(out, [-5.5] * 4)


def test_lowered_to_what_they_are_for(capfd):
    """FP8 units only where Triton may use their short sums; one FMA, not a product and a sum."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    a = jax.ShapeDtypeStruct((64, 32), jnp.float8_e4m3fn)

    def f(a, b, c):
        products = kernel_of(compat.triton_dot_fp8, (64, 64), a, b, debug=True)
        return products, kernel_of(compat.triton_fma, (64, 32), c, c, c, debug=True)

    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(f).trace(a, a, jax.ShapeDtypeStruct((64, 32), jnp.float32))
        traced.lower(lowering_platforms=("cuda",))
    module = capfd.readouterr().out
    [dot] = [line for line in module.splitlines() if "tt.dot" in line]
    assert "maxNumImpreciseAcc = 1073741824" in dot and "f8E4M3FN" in dot, dot
    assert "math.fma" in module and "arith.mulf" not in module

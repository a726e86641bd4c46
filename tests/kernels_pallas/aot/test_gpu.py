"""The Triton kernels, compiled down to SASS for an H100 that is not here.

Shapes of DeepSeek-V4-Flash (d 4096, 256 experts of width 2048; 64 indexer heads of 128) and of
nano. That it compiles says that Triton took the kernel, that its blocks fit into shared memory, and
that ptxas took the code; `make test-aot` prints the memory outside the kernels.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import expert_matmul_gpu, index_gpu, select_topk_gpu
from kernels_pallas.planar import Planar
from tests.kernels_pallas.aot.targets import compile_for, devices
from v4jax.numerics import MXFP4

FLASH = (256, 4096, 4096)  # experts, gate and up, d
NANO = (8, 96, 192)
FEW, MANY = 16, 1024  # tokens an expert


def compiled(f, *arguments):
    """The program, which holds `f`'s Triton kernels, and what it calls."""
    out = compile_for("h100", f, *arguments)
    return out.as_text().count('custom_call_target="__gpu$xla.gpu.triton"'), out


def struct(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def weights_of(shape, kind: str):
    experts, n, k = shape
    if kind != "packed":
        return struct(shape, kind)
    blocks = -(-k // 64)
    codes, scales = ((experts, blocks * rows, n) for rows in (32, 2))
    return Planar(struct(codes, jnp.uint8), struct(scales, jnp.uint8), k, MXFP4)


@pytest.mark.parametrize("transpose", [False, True], ids=["forward", "dx"])
@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize(
    ("shape", "kind"), [(FLASH, "packed"), (FLASH, "bfloat16"), (NANO, "packed")]
)
def test_expert_rows(shape, kind, tokens, transpose):
    experts, n, k = shape
    x = struct((experts * tokens, n if transpose else k), jnp.bfloat16)
    f = functools.partial(expert_matmul_gpu.rows, transpose=transpose)
    calls, _ = compiled(f, x, weights_of(shape, kind), struct((experts,), jnp.int32))
    assert calls == 1


@pytest.mark.parametrize("transpose", [False, True], ids=["forward", "dx"])
@pytest.mark.parametrize("kind", ["packed", "float32"])
def test_expert_rows_in_float32(kind, transpose):
    experts, n, k = NANO
    x = struct((experts * MANY, n if transpose else k), jnp.float32)
    f = functools.partial(expert_matmul_gpu.rows, transpose=transpose)
    assert compiled(f, x, weights_of(NANO, kind), struct((experts,), jnp.int32))[0] == 1


@pytest.mark.parametrize(
    ("shape", "dtype"), [(FLASH, "bfloat16"), (NANO, "bfloat16"), (NANO, "float32")]
)
def test_expert_weights(shape, dtype):
    experts, n, k = shape
    dy, x = (struct((experts * MANY, width), dtype) for width in (n, k))
    sizes = struct((experts,), jnp.int32)
    assert compiled(expert_matmul_gpu.weights, dy, x, sizes)[0] == 1


def indexer(length, heads, depth, entries, dtype):
    return (
        struct((1, length, heads, depth), dtype),
        struct((1, entries, depth), dtype),
        struct((1, length, heads), jnp.float32),
        struct((1, length), jnp.int32),
        struct((1, length), jnp.int32),
    )


@pytest.mark.parametrize(
    ("dtype", "score_dtype"),
    [("float8_e4m3fn", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")],
)
@pytest.mark.parametrize("shape", [(2048, 64, 128, 8192), (1, 64, 128, 65536), (256, 4, 32, 64)])
def test_scores(shape, dtype, score_dtype):
    f = functools.partial(index_gpu.scores, score_dtype=score_dtype)
    scales = struct((1, *shape[:2]), jnp.float32), struct((1, shape[3]), jnp.float32)
    if dtype == "float8_e4m3fn":
        calls, _ = compiled(
            lambda *args: f(*args[:-2], row_scale_q=args[-2], row_scale_k=args[-1]),
            *indexer(*shape, dtype),
            *scales,
        )
    else:
        calls, _ = compiled(f, *indexer(*shape, dtype))
    assert calls == 1


@pytest.mark.parametrize("output", ["indices", "threshold"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("entries", "top_k", "rounds"), [(8192, 512, 1), (8192, 1024, 1), (65536, 1024, 2), (64, 16, 1)]
)
def test_selection(entries, top_k, rounds, dtype, output):
    f = functools.partial(select_topk_gpu.select, top_k=top_k, output=output)
    assert compiled(f, struct((2048, entries), dtype))[0] == rounds


@pytest.mark.parametrize("entries", [8192, 65536])
def test_selector_keeps_no_tensor_of_scores(entries):
    """Blocks of queries whose scores fit into the L2 cache, not [2048, entries] of them."""
    f = functools.partial(index_gpu.index_select, score_dtype="bfloat16", output="indices")
    operands = indexer(2048, 64, 128, entries, jnp.float8_e4m3fn)
    _, out = compiled(lambda *args: f(*args, 512), *operands)
    assert out.memory_analysis().temp_size_in_bytes < 2 * index_gpu.L2 + (64 << 20)


def test_under_shard_map():
    """With check_vma, which Pallas' interpreter does not take."""
    mesh = jax.sharding.Mesh(devices("h100"), ("data",))

    def f(x, w, sizes, scores):
        out = expert_matmul_gpu.rows(x, w, sizes)
        dw = jax.lax.psum(expert_matmul_gpu.weights(out, x, sizes), "data")
        return out, dw, select_topk_gpu.select(scores, 16, output="ascending")

    sharded = jax.shard_map(
        f,
        mesh=mesh,
        in_specs=(P("data"), P(), P("data"), P("data")),
        out_specs=(P("data"), P(), P("data")),
    )
    experts, _, k = NANO

    def place(s, *spec):
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, P(*spec)))

    calls, _ = compiled(
        sharded,
        place(struct((512, k), jnp.bfloat16), "data"),
        jax.tree.map(place, weights_of(NANO, "packed")),
        place(struct((experts,), jnp.int32), "data"),
        place(struct((64, 128), jnp.float32), "data"),
    )
    assert calls == 3

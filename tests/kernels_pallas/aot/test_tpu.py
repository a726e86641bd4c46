"""The Mosaic kernels, compiled for TPUs that are not here: layouts, types, VMEM, memory in HBM."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from kernels_pallas import expert_matmul_tpu, index_tpu
from kernels_pallas.planar import Planar
from tests.kernels_pallas.aot.targets import TPUS, compile_for, devices
from v4jax.numerics import MXFP4

S = jax.ShapeDtypeStruct
MiB = 2**20


def compiled(target, f, *arguments):
    """The memory figures of a program that has a Mosaic kernel."""
    result = compile_for(target, f, *arguments)
    assert 'custom_call_target="tpu_custom_call"' in result.as_text()
    return result.memory_analysis()


# ---- expert_matmul ----


@dataclasses.dataclass(frozen=True)
class Experts:
    """Tokens of all experts, experts, outputs, inputs."""

    total: int
    experts: int
    n: int
    k: int

    def operands(self, dtype):
        """x, dy, w, the same weights packed, group sizes."""
        planes = -(-self.k // 64)
        codes = S((self.experts, 32 * planes, self.n), jnp.uint8)
        scales = S((self.experts, 2 * planes, self.n), jnp.uint8)
        return (
            S((self.total, self.k), dtype),
            S((self.total, self.n), dtype),
            S((self.experts, self.n, self.k), dtype),
            Planar(codes, scales, self.k, MXFP4),
            S((self.experts,), jnp.int32),
        )


OPERATIONS = {
    "forward": lambda x, dy, w, packed, sizes: expert_matmul_tpu.rows(x, w, sizes),
    "dx": lambda x, dy, w, packed, sizes: expert_matmul_tpu.rows(dy, w, sizes, transpose=True),
    "dw": lambda x, dy, w, packed, sizes: expert_matmul_tpu.weights(dy, x, sizes),
    "forward, packed": lambda x, dy, w, packed, sizes: expert_matmul_tpu.rows(x, packed, sizes),
    "dx, packed": lambda x, dy, w, packed, sizes: expert_matmul_tpu.rows(
        dy, packed, sizes, transpose=True
    ),
}
FLASH = {
    "gate and up": Experts(8192, 16, 4096, 4096),
    "down": Experts(8192, 16, 4096, 2048),
    "up, 3 tokens each": Experts(48, 16, 4096, 4096),
}


@pytest.mark.parametrize("target", TPUS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", FLASH)
def test_flash_experts(shape, operation, target):
    """Nothing is copied or padded: all there is in HBM besides is the list of visits."""
    memory = compiled(target, OPERATIONS[operation], *FLASH[shape].operands(jnp.bfloat16))
    assert memory.temp_size_in_bytes < 1 * MiB


@pytest.mark.parametrize("target", TPUS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (Experts(2048, 8, 128, 128), "bfloat16"),  # nano: gate and up, down
        (Experts(2048, 8, 128, 64), "bfloat16"),
        (Experts(2048, 8, 128, 64), "float32"),
        (Experts(8192, 32, 1024, 384), "bfloat16"),  # small: down
        (Experts(1024, 4, 6144, 7168), "bfloat16"),  # pro: gate and up
        (Experts(1024, 4, 4096, 2048), "float32"),
        (Experts(200, 3, 200, 96), "bfloat16"),  # edges on every axis, K padded
        (Experts(1000, 3, 1100, 1504), "bfloat16"),  # the same, more than a panel
        (Experts(7, 300, 96, 32), "float32"),  # more experts than tokens
    ],
    ids=str,
)
def test_experts(shape, dtype, target):
    def run(*operands):
        return [f(*operands) for f in OPERATIONS.values()]

    compiled(target, run, *shape.operands(dtype))


# ---- index_select ----


@dataclasses.dataclass(frozen=True)
class Index:
    batch: int
    length: int
    heads: int
    width: int
    entries: int
    top_k: int

    def operands(self, dtype) -> dict:
        by_query = (self.batch, self.length)
        operands = {
            "q": S((*by_query, self.heads, self.width), dtype),
            "k": S((self.batch, self.entries, self.width), dtype),
            "head_weights": S((*by_query, self.heads), jnp.float32),
            "first": S(by_query, jnp.int32),
            "end": S(by_query, jnp.int32),
        }
        if jnp.dtype(dtype).itemsize == 1:
            operands["row_scale_q"] = S((*by_query, self.heads), jnp.float32)
            operands["row_scale_k"] = S((self.batch, self.entries), jnp.float32)
        return operands


FLASH_INDEX = Index(1, 2048, 64, 128, 8192, 512)
SELECTORS = {
    "nano": Index(4, 1024, 8, 32, 256, 16),
    "small": Index(2, 4096, 16, 128, 1024, 128),
    "flash 2k": dataclasses.replace(FLASH_INDEX, entries=2048),
    "flash 64k": dataclasses.replace(FLASH_INDEX, entries=65536),
    "pro, one query": Index(8, 1, 64, 128, 8192, 1024),
    "edges": Index(2, 77, 3, 40, 1100, 5),
}


def check_selector(index: Index, dtype, score_dtype, output, target):
    operands = index.operands(dtype)

    def run(operands):
        return index_tpu.select(
            **operands, top_k=index.top_k, score_dtype=score_dtype, output=output
        )

    memory = compiled(target, run, operands)
    # No scores in HBM: what is temporary are operands in another order, their rows padded to whole
    # lanes, and a byte for each entry.
    rows = sum(a.size // a.shape[-1] for a in operands.values())
    size = sum(a.size * a.dtype.itemsize for a in operands.values()) + rows * 128 * 4
    entries = index.batch * index.length * index.entries
    assert memory.temp_size_in_bytes < 2 * size + entries + 2 * MiB
    if index.length * index.entries >= FLASH_INDEX.length * FLASH_INDEX.entries:
        assert memory.temp_size_in_bytes < 2 * entries + 2 * size


@pytest.mark.parametrize("target", TPUS)
@pytest.mark.parametrize(
    ("score_dtype", "output"), [("float32", "threshold"), ("bfloat16", "mask")]
)
@pytest.mark.parametrize("dtype", index_tpu.OPERANDS)
def test_flash_selector(dtype, score_dtype, output, target):
    check_selector(FLASH_INDEX, dtype, score_dtype, output, target)


@pytest.mark.parametrize("target", TPUS)
@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
def test_selector(dtype, name, target):
    check_selector(SELECTORS[name], dtype, "bfloat16", "mask", target)


# ---- both ----


def operands_of_all(*lead: int):
    """Of the three kernels, each with leading axes. What a loop stacks of them fits into VMEM."""
    shapes = Experts(4096, 8, 512, 512).operands(jnp.bfloat16)
    operands = *shapes, Index(1, 1024, 8, 64, 1024, 64).operands(jnp.bfloat16)
    return jax.tree.map(lambda a: S((*lead, *a.shape), a.dtype), operands)


def all_kernels(x, dy, w, packed, sizes, index):
    y = expert_matmul_tpu.rows(x, packed, sizes)
    return y, expert_matmul_tpu.weights(dy, x, sizes), index_tpu.select(**index, top_k=16)


@pytest.mark.parametrize("target", TPUS)
def test_under_vmap_scan_and_remat(target):
    compiled(target, jax.vmap(all_kernels), *operands_of_all(2))

    def scan(*operands):
        f = jax.checkpoint(lambda a: all_kernels(*a))
        return jax.lax.scan(lambda _, a: (None, f(a)), None, operands)

    compiled(target, scan, *operands_of_all(2))


@pytest.mark.parametrize("target", TPUS)
def test_under_shard_map(target):
    """With check_vma, which the interpreter does not take. Nothing is gathered."""
    mesh = jax.sharding.Mesh(devices(target)[:4], ("data",))

    def run(*operands):
        return all_kernels(*jax.tree.map(lambda a: a[0], operands))

    f = jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    sharding = jax.sharding.NamedSharding(mesh, P("data"))
    operands = jax.tree.map(
        lambda a: S(a.shape, a.dtype, sharding=sharding), operands_of_all(mesh.size)
    )
    text = compile_for(target, f, *operands).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert "all-gather" not in text and "all-to-all" not in text

"""The Triton kernels of expert_matmul against float64 loops.

In Pallas' interpreter; on a GPU as they are, at sizes of real models too.
"""

from __future__ import annotations

import functools
import itertools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas import expert_matmul_gpu
from kernels_pallas.planar import Planar
from tests.kernels_pallas import expert_backend
from tests.kernels_pallas.expert_backend import expected
from v4jax.numerics import MXFP4

INTERPRET = jax.default_backend() != "gpu"
# Tokens, experts, N, K: one tile of tokens an expert or more, few (16, 32 and 64 columns) and many,
# sides that fill their tiles and sides that do not, K that needs padding to 64.
SHAPES = {"few": (40, 4, 24, 96), "more": (90, 4, 64, 128), "many": (300, 4, 48, 160)}
REAL = {"decode": (1024, 32, 2048, 4096), "training": (8192, 8, 2048, 4096)}
if not INTERPRET:
    SHAPES |= REAL


@functools.cache
def operands(shape: str, dtype: str, packed: bool):
    return expert_backend.operands(SHAPES[shape], dtype, packed)


def check(sizes, shape: str, dtype: str, packed: bool):
    x, dy, w, values = operands(shape, dtype, packed)
    group_sizes = jnp.asarray(sizes, jnp.int32)
    actual = expert_backend.run(expert_matmul_gpu, x, dy, w, group_sizes, INTERPRET)
    expert_backend.check(actual, x, dy, values, sizes)


def groups(total: int) -> dict[str, list[int]]:
    rest = total - 16 - total // 2
    return {
        "ragged": [3, 0, total // 2, total - 3 - total // 2],
        "one takes all": [0, 0, total, 0],
        "tails": [15, 17, 1, total - 33],
        "fewer than rows": [16, total // 2, 0, rest - 3],
        "none": [0, 0, 0, 0],
    }


CASES = [
    ("few", "bfloat16", True),
    ("few", "float32", False),
    ("more", "float32", True),
    ("many", "bfloat16", True),
    ("many", "bfloat16", False),
    ("many", "float32", False),
]


@pytest.mark.parametrize("name", groups(0))
@pytest.mark.parametrize(("shape", "dtype", "packed"), CASES)
def test_values(shape, dtype, packed, name):
    check(groups(SHAPES[shape][0])[name], shape, dtype, packed)


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    st.lists(st.integers(0, 22), min_size=4, max_size=4).filter(lambda s: sum(s) < 41)
)
def test_any_grouping(sizes):
    check(sizes, "few", "bfloat16", True)


@pytest.mark.skipif(INTERPRET, reason="sizes of real models need a GPU")
@pytest.mark.parametrize("packed", [False, True], ids=["float", "packed"])
@pytest.mark.parametrize("shape", REAL)
def test_real_sizes(shape, packed):
    total, experts = SHAPES[shape][:2]
    sizes = np.random.default_rng(1).multinomial(total - 7, np.ones(experts) / experts)
    check(sizes.tolist(), shape, "bfloat16", packed)


@functools.partial(jax.jit, static_argnums=(1, 2))
def visits_of(sizes, total, tokens):
    return expert_matmul_gpu._visits(sizes, total, tokens)


@hypothesis.given(
    st.lists(st.integers(0, 50), min_size=6, max_size=6), st.sampled_from([16, 64, 128])
)
def test_every_row_is_visited_once(sizes, tokens):
    total = 300
    visits = visits_of(jnp.asarray(sizes, jnp.int32), total, tokens)
    seen = np.full(total, -1)
    for expert, row, count in np.stack(visits, axis=1):
        assert 0 <= count <= tokens and (seen[row : row + count] == -1).all()
        seen[row : row + count] = expert
    np.testing.assert_array_equal(seen, np.repeat(np.arange(7), [*sizes, total - sum(sizes)]))


def test_columns_past_the_end_are_not_read():
    """Where K is 32 more than a multiple of 64, the high plane of the last block is outside x."""
    x = jnp.arange(1.0, 1 + 2 * 96).reshape(2, 96)

    def kernel(x_ref, out_ref):
        mine, row, column = jnp.ones(2, bool), jnp.arange(2), 96 + jnp.arange(32)
        out_ref[...] = expert_matmul_gpu._load(x_ref, (), row, column, mine, every=64)

    out = jax.ShapeDtypeStruct((2, 32), x.dtype)
    if not INTERPRET:
        pytest.skip("what lies past the end of memory on a GPU is not known")
    np.testing.assert_array_equal(pl.pallas_call(kernel, out, interpret=True)(x), 0.0)


def halves():
    """An expert_matmul on each half of x, and the exact values of both."""
    x, _, w, values = operands("few", "float32", True)
    sizes = [[3, 0, 10, 5], [20, 0, 0, 0]]
    no_dy = np.zeros((x.shape[0] // 2, values.shape[1]))
    parts = np.split(np.asarray(x, np.float64), 2)
    exact = [expected(part, values, s, no_dy)[0] for part, s in zip(parts, sizes, strict=True)]

    def rows(x, w, sizes):
        return expert_matmul_gpu.rows(x, w, sizes[0], interpret=INTERPRET)

    return rows, x, w, jnp.asarray(sizes, jnp.int32), np.concatenate(exact)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_under_shard_map():
    rows, x, w, sizes, exact = halves()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P("data"), P(), P("data")), "out_specs": P("data"), "check_vma": False}
    out = jax.jit(jax.shard_map(rows, mesh=mesh, **specs))(x, w, sizes)
    np.testing.assert_allclose(out, exact, atol=1e-4)


def test_under_vmap():
    rows, x, w, sizes, exact = halves()
    out = jax.vmap(rows, in_axes=(0, None, 0))(x.reshape(2, -1, x.shape[1]), w, sizes[:, None])
    np.testing.assert_allclose(out.reshape(exact.shape), exact, atol=1e-4)


# ---- the decoder's instructions, which no interpreter runs ----


def execute(code: str, registers: dict[str, int]) -> None:
    """The few PTX instructions that the decoder has, on 32-bit registers."""

    def value(operand):
        return registers[operand] if operand in registers else int(operand, 0)

    def halves(word):
        return np.array([word & 0xFFFF, word >> 16], np.uint16).view(ml_dtypes.bfloat16)

    for line in code.strip().splitlines():
        name, out, *ins = re.split(r"[ ,]+", line.strip().rstrip(";"))
        a, b, *rest = map(value, ins)
        if name == "prmt.b32":
            data = a | b << 32
            word = sum((data >> 8 * (rest[0] >> 4 * i & 7) & 255) << 8 * i for i in range(4))
        elif name == "shl.b32":
            word = a << b
        elif name == "and.b32":
            word = a & b
        elif name == "lop3.b32":
            assert rest[1] == 0xEA  # (a & b) | c
            word = a & b | rest[0]
        elif name == "mul.rn.bf16x2":  # numpy keeps subnormals, as Hopper does
            with np.errstate(invalid="ignore"):
                wide = halves(a).astype(np.float64) * halves(b).astype(np.float64)
            low, high = wide.astype(ml_dtypes.bfloat16).view(np.uint16).tolist()
            word = low | high << 16
        else:
            raise AssertionError(line)
        registers[out] = word & 0xFFFFFFFF


@pytest.mark.parametrize("scale", [1, 2, 60, 127, 128, 200, 251])
def test_the_decoders_instructions(scale):
    """Every byte at every place of a register."""
    nibbles = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    scales = [scale, scale + 1, max(1, scale - 1), scale]
    power = [s << 7 for s in scales]  # BF16, as the kernel makes them
    for byte, place in itertools.product(range(256), range(4)):
        four = [(byte + 37 * (i - place)) % 256 for i in range(4)]
        assert four[place] == byte
        for code, shift in ((expert_matmul_gpu._LOW, 0), (expert_matmul_gpu._HIGH, 4)):
            registers = {
                "power": 0x7E807E80,
                "$2": sum(b << 8 * i for i, b in enumerate(four)),
                "$3": power[0] | power[1] << 16,
                "$4": power[2] | power[3] << 16,
            }
            execute(code, registers)
            out = [registers[f"${i // 2}"] >> 16 * (i % 2) & 0xFFFF for i in range(4)]
            actual = np.array(out, np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)
            exact = [
                nibbles[b >> shift & 15] * 2.0 ** (s - 127)
                for b, s in zip(four, scales, strict=True)
            ]
            np.testing.assert_array_equal(actual, exact)
            np.testing.assert_array_equal(np.signbit(actual), np.signbit(exact))


def test_a_nan_block_stays_nan():
    registers = {
        "power": 0x7E807E80,
        "$2": 0,
        "$3": 0x7F807F80,
        "$4": 0x7F807F80,
    }  # scale 255, codes 0
    execute(expert_matmul_gpu._HIGH, registers)
    word = np.array([registers["$0"] & 0xFFFF], np.uint16).view(ml_dtypes.bfloat16)
    assert np.isnan(word.astype(np.float32)).all()


@pytest.mark.parametrize(
    ("x", "w", "message"),
    [
        (
            jnp.zeros((4, 8), jnp.float16),
            jnp.zeros((2, 3, 8)),
            "x is float16, allowed: bfloat16, f",
        ),
        (
            jax.ShapeDtypeStruct((4, 8192), jnp.bfloat16),
            Planar(
                jax.ShapeDtypeStruct((160, 4096, 4096), jnp.uint8),
                jax.ShapeDtypeStruct((160, 256, 4096), jnp.uint8),
                8192,
                MXFP4,
            ),
            "packed weights of 2684354560 bytes, allowed: up to 2",
        ),
    ],
)
def test_refusals(x, w, message):
    assert message in expert_matmul_gpu.refusal(x, w, None)
    with pytest.raises(ValueError, match=r"expert_matmul: gpu: .* \(or implementation='ragged'\)"):
        expert_matmul_gpu.rows(x, w, None)

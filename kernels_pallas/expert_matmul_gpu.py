"""Triton kernels of `expert_matmul`, for Hopper: rows (forward and dx) and weights (dW).

A program reads its tile of tokens at the row where its expert's begin or go on, under a mask of
rows, so tokens are neither padded nor moved, and no tile holds tokens of two experts. Which tile
is whose is computed by XLA from the group sizes: there are at most T / tile + E of them.

    rows      for each tile of tokens and of outputs, along the contraction: out += x w^T
    weights   for each expert and tile [N, K] of dW, along the expert's tokens: dW += dy^T x

FP4 weights (`planar`) are decoded in registers, exactly, and multiplied in BF16. Where experts have
few tokens reading the weights is all the time there is: there the weights are the rows of the
product, so that 16 tokens fill a tensor core's instruction. With many tokens FP4 saves memory and
no time: the product is bound by the tensor cores, in BF16 either way.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas import compat
from kernels_pallas.planar import BLOCK, PAIR, Planar


@dataclasses.dataclass(frozen=True)
class Tiles:
    """tokens x outputs of a program, its step along the contraction, warps, stages of the loop.

    few: the weights are the rows of the product, the tokens its columns.
    """

    tokens: int
    outputs: int
    depth: int
    warps: int
    stages: int
    few: bool = False


def tiles(total: int, experts: int, dtype) -> Tiles:
    """By the mean number of tokens an expert. Start values: nobody has timed others."""
    mean = max(1, total // max(1, experts))
    wide = dtype == jnp.float32
    if mean <= 64:  # room for half as many again, since routing is uneven
        tokens = min(64, max(16, pl.next_power_of_2(mean + mean // 2)))
        return Tiles(tokens, 64, 64 if wide else 128, warps=4, stages=3, few=True)
    if wide:
        return Tiles(64, 64, 64, warps=4, stages=2)
    return Tiles(128, 128, 64, warps=8, stages=3)


def refusal(x, w, group_sizes) -> str | None:
    """Why these cannot run, or None. Reads shapes and dtypes only."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}, allowed: bfloat16, float32"
    if isinstance(w, Planar) and 1 << 31 < w.codes.size <= 1 << 32:
        # Pallas' Triton counts in signed 32 bits up to 2^32 bytes, in 64 bits beyond.
        return f"packed weights of {w.codes.size} bytes, allowed: up to 2^31, and more than 2^32"
    return None


def rows(
    x: Array,
    w: Array | Planar,
    group_sizes: Array,
    *,
    transpose: bool = False,
    interpret: bool = False,
) -> Array:
    """x [T, K], w [E, N, K] -> [T, N] in x's dtype; transpose: x [T, N] -> [T, K].

    Rows past sum(group_sizes) are 0. Raises ValueError where `refusal` has a reason.
    """
    _check(x, w, group_sizes)
    experts, outputs, width = w.shape
    columns = width if transpose else outputs
    if 0 in (*x.shape, columns, experts):
        return jnp.zeros((x.shape[0], columns), x.dtype)
    tile = tiles(x.shape[0], experts, x.dtype)
    visits = _visits(group_sizes, x.shape[0], tile.tokens)
    if isinstance(w, Planar):
        operands, kernel = (x, w.codes, w.scales), _packed_kernel
        tile, across = _packed_tiles(tile, w, transpose)
    else:
        operands, kernel = (x, w.astype(x.dtype)), _float_kernel
        tile = dataclasses.replace(
            tile, outputs=_cut(tile.outputs, columns), depth=_cut(tile.depth, x.shape[1])
        )
        across = pl.cdiv(columns, tile.outputs)
    return pl.pallas_call(
        functools.partial(kernel, tile=tile, transpose=transpose, interpret=interpret),
        grid=(across, visits[0].shape[0]),
        out_shape=compat.result((x.shape[0], columns), x.dtype, *operands, group_sizes),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="expert_matmul_rows",
    )(*visits, *operands)


def weights(dy: Array, x: Array, group_sizes: Array, *, interpret: bool = False) -> Array:
    """dW float32 [E, N, K] of dy [T, N] and x [T, K]; zeros for an expert without tokens."""
    _check(x, None, group_sizes)
    experts, (total, outputs), width = group_sizes.shape[0], dy.shape, x.shape[1]
    if 0 in (experts, total, outputs, width):
        return jnp.zeros((experts, outputs, width), jnp.float32)
    most, step, warps = (64, 32, 4) if x.dtype == jnp.float32 else (128, 64, 8)
    n, k = _cut(most, outputs), _cut(most, width)
    ends = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), total)
    starts = jnp.pad(ends[:-1], (1, 0))
    return pl.pallas_call(
        functools.partial(_weights_kernel, n=n, k=k, step=step, interpret=interpret),
        grid=(pl.cdiv(width, k), pl.cdiv(outputs, n), experts),
        out_shape=compat.result((experts, outputs, width), jnp.float32, dy, x, group_sizes),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=3),
        interpret=interpret,
        name="expert_matmul_weights",
    )(starts, ends, dy.astype(x.dtype), x)


def _check(x, w, group_sizes):
    reason = refusal(x, w, group_sizes)
    if reason is not None:
        raise ValueError(f"expert_matmul: gpu: {reason} (or implementation='ragged')")


def _cut(most: int, size: int) -> int:
    """A tile's side: a power of two, as Triton has them, at least the 16 of a tensor core."""
    return max(16, min(most, pl.next_power_of_2(size)))


def _visits(group_sizes, total: int, tokens: int) -> tuple[Array, Array, Array]:
    """(expert, first row, rows) of each tile of tokens, int32; expert E for rows of no expert.

    The last ones may have no rows.
    """
    ends = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), total)
    ends = jnp.append(ends, total)
    starts = jnp.pad(ends[:-1], (1, 0))
    count = (ends - starts + tokens - 1) // tokens
    stop = jnp.cumsum(count)
    most = min(total, total // tokens + ends.shape[0])
    visit = jnp.arange(most, dtype=jnp.int32)
    group = jnp.sum(stop[None, :] <= visit[:, None], axis=1, dtype=jnp.int32)
    at = jnp.minimum(group, ends.shape[0] - 1)
    row = starts[at] + (visit - (stop - count)[at]) * tokens
    return at, row, jnp.clip(ends[at] - row, 0, tokens)


# ---- rows ----


class _Visit(NamedTuple):
    """A program's tokens. token, mine: [tokens], rows of x and whether they are this expert's."""

    expert: Array
    token: Array
    mine: Array


def _visit(expert_ref, row_ref, count_ref, tile):
    at = pl.program_id(1)
    place = jnp.arange(tile.tokens)
    return _Visit(expert_ref[at], row_ref[at] + place, place < count_ref[at])


def _float_kernel(
    expert_ref, row_ref, count_ref, x_ref, w_ref, out_ref, *, tile, transpose, interpret
):
    visit = _visit(expert_ref, row_ref, count_ref, tile)
    column = pl.program_id(0) * tile.outputs + jnp.arange(tile.outputs)

    def advance(i, total):
        along = i * tile.depth + jnp.arange(tile.depth)
        x = _load(x_ref, (), visit.token, along, visit.mine)
        if transpose:
            w = _load(w_ref, (visit.expert,), along, column)
        else:
            w = _load(w_ref, (visit.expert,), column, along)
        return total + _product(x, w, 0 if transpose else 1, tile, interpret)

    steps = _steps(visit, w_ref, x_ref.shape[1], tile.depth)
    total = lax.fori_loop(0, steps, advance, _zeros(tile.outputs, tile))
    _store(out_ref, visit, column, total, tile)


def _packed_tiles(tile: Tiles, w: Planar, transpose: bool) -> tuple[Tiles, int]:
    """The tiles for packed weights, whose K goes in blocks of 64, and how many there are across."""
    blocks = w.codes.shape[1] // BLOCK
    if transpose:
        side = min(2, blocks) * PAIR  # two blocks: then a plane has the 64 rows of a tensor core
        tile = dataclasses.replace(tile, outputs=side, depth=_cut(64, w.shape[1]))
        return tile, pl.cdiv(blocks * PAIR, side)
    if tile.few:  # fewest instructions a weight of what was compiled
        tile = dataclasses.replace(tile, outputs=128, warps=8)
    tile = dataclasses.replace(tile, outputs=_cut(tile.outputs, w.shape[1]), depth=PAIR)
    return tile, pl.cdiv(w.shape[1], tile.outputs)


def _packed_kernel(
    expert_ref, row_ref, count_ref, x_ref, codes_ref, scales_ref, out_ref,
    *, tile, transpose, interpret,
):  # fmt: skip
    """Low and high nibbles are two matrices, of the 32 rows 64j and of the 32 from 64j + 32 on."""
    visit = _visit(expert_ref, row_ref, count_ref, tile)
    side = (tile.outputs if transpose else tile.depth) // PAIR
    at = pl.program_id(0)
    column = at * tile.outputs + jnp.arange(tile.outputs)

    def planes(first, outputs):
        """The two matrices of blocks first, first + 1, ...: [side * 32, outputs]."""
        return _decode(
            codes_ref, scales_ref, visit.expert, first, side, outputs, x_ref.dtype, interpret
        )

    def low_columns(first):
        """Where the rows of a low plane lie in K; those of the high one, 32 further."""
        row = jnp.arange(side * BLOCK)
        return first * PAIR + row + (row & -BLOCK)

    def forward(i, totals):
        low = low_columns(i * side)
        (total,) = totals
        for plane, k in zip(planes(i * side, column), (low, low + BLOCK), strict=True):
            x = _load(x_ref, (), visit.token, k, visit.mine, every=PAIR)
            total += _product(x, plane, 0, tile, interpret)
        return (total,)

    def backward(i, totals):
        along = i * tile.depth + jnp.arange(tile.depth)
        dy = _load(x_ref, (), visit.token, along, visit.mine)
        both = planes(at * side, along)
        return tuple(
            total + _product(dy, plane, 1, tile, interpret)
            for total, plane in zip(totals, both, strict=True)
        )

    if transpose:
        steps = _steps(visit, codes_ref, x_ref.shape[1], tile.depth)
        zeros = (_zeros(side * BLOCK, tile),) * 2
        low = low_columns(at * side)
        for total, k in zip(
            lax.fori_loop(0, steps, backward, zeros), (low, low + BLOCK), strict=True
        ):
            _store(out_ref, visit, k, total, tile)
    else:
        steps = _steps(visit, codes_ref, 2 * codes_ref.shape[1], tile.depth)
        (total,) = lax.fori_loop(0, steps, forward, (_zeros(tile.outputs, tile),))
        _store(out_ref, visit, column, total, tile)


def _load(ref, lead, row, column, mine=None, every=None):
    """ref[*lead, row, column] as a matrix; zeros outside the array and where not `mine`.

    Rows and columns begin at multiples of their number, or the columns within each `every` of them.
    """
    mask = None if mine is None else mine[:, None]
    edges = [(column[None, :], ref.shape[-1], every or column.size)]
    if mine is None:
        edges.append((row[:, None], ref.shape[-2], row.size))
    for index, size, step in edges:
        if size % step:
            mask = index < size if mask is None else mask & (index < size)
    other = None if mask is None else 0
    return plgpu.load(ref.at[(*lead, row[:, None], column[None, :])], mask=mask, other=other)


def _product(x, w, axis, tile, interpret):
    """x w, contracting w's `axis`: [tokens, outputs], or, with few tokens, [outputs, tokens]."""
    if tile.few:
        return compat.triton_dot(w, x, axis, 1, interpret)
    return compat.triton_dot(x, w, 1, axis, interpret)


def _zeros(outputs, tile):
    shape = (outputs, tile.tokens) if tile.few else (tile.tokens, outputs)
    return jnp.zeros(shape, jnp.float32)


def _steps(visit, w_ref, size, depth):
    """Steps along the contraction; none for rows of no expert."""
    return jnp.minimum(w_ref.shape[0] - visit.expert, 1) * pl.cdiv(size, depth)


def _store(out_ref, visit, column, total, tile):
    inside = column < out_ref.shape[1]
    if tile.few:
        target = out_ref.at[visit.token[None, :], column[:, None]]
        mask = visit.mine[None, :] & inside[:, None]
    else:
        target = out_ref.at[visit.token[:, None], column[None, :]]
        mask = visit.mine[:, None] & inside[None, :]
    plgpu.store(target, total.astype(out_ref.dtype), mask=mask)


# ---- FP4 ----


def _decode(codes_ref, scales_ref, expert, first, side, column, dtype, interpret):
    """(low, high) planes of `side` of K's blocks of 64, at `column`: [side * 32, columns].

    One block is a matrix, which Triton loads 16 bytes a thread; several are a stack of them.
    """
    count, outputs = codes_ref.shape[1] // BLOCK, codes_ref.shape[2]
    if side == 1:
        block, within, column = first, jnp.arange(BLOCK)[:, None], column[None, :]
    else:
        block, within = (first + jnp.arange(side))[:, None, None], jnp.arange(BLOCK)[None, :, None]
        column = column[None, None, :]
    mask = column < outputs if outputs % column.size else None
    if count % side:
        mask = block < count if mask is None else mask & (block < count)

    def load(ref, row):
        other = None if mask is None else 0
        return plgpu.load(ref.at[expert, row, column], mask=mask, other=other)

    codes = load(codes_ref, block * BLOCK + within)
    scales = [load(scales_ref, 2 * block + plane) for plane in range(2)]
    if dtype == jnp.bfloat16 and not interpret:
        planes = [_decode_four(codes, s, c) for s, c in zip(scales, (_LOW, _HIGH), strict=True)]
    else:
        nibbles = (codes & 15, codes >> 4)
        planes = [_value(n, s).astype(dtype) for n, s in zip(nibbles, scales, strict=True)]
    return [plane.reshape(-1, codes.shape[-1]) for plane in planes]


def _value(nibble, scale):
    """E2M1 * 2^(scale - 127), float32: 0, 1, 2, 3, 4, 6, 8, 12 halves."""
    nibble = nibble.astype(jnp.int32)
    m = nibble & 7
    halves = jnp.where(m < 4, m, jnp.where(m < 6, 2 * m - 4, 4 * m - 16))
    halves = jnp.where(nibble < 8, halves, -halves).astype(jnp.float32)
    power = lax.bitcast_convert_type(scale.astype(jnp.int32) << 23, jnp.float32)
    return 0.5 * halves * power


# Of four bytes $2, the high nibbles as BF16, two a register, in $0 and $1, times the scales $3 and
# $4. With each byte twice in half a register, a nibble's sign is at bit 15 and its other bits move
# to 8 to 6: the low end of a BF16's exponent and the top of its mantissa. Read so they are the
# value times 2^-126, in 0.5's case a subnormal, which Hopper's products of BF16 take as it is.
_HIGH = "".join(
    f"""prmt.b32 two, $2, 0, {spread};
and.b32 sign, two, 0x80008000;
shl.b32 rest, two, 2;
lop3.b32 rest, rest, 0x01C001C0, sign, 0xEA;
mul.rn.bf16x2 rest, rest, power;
mul.rn.bf16x2 ${pair}, rest, ${3 + pair};
"""
    for pair, spread in enumerate(("0x1100", "0x3322"))
)
# The low nibbles: all is four bits further down.
_LOW = _HIGH.replace("rest, two, 2", "rest, two, 6").replace(
    "and.b32 sign, two,", "shl.b32 sign, two, 4;\nand.b32 sign, sign,"
)


def _decode_four(codes, scale, code):
    """A plane of the bytes in BF16, exactly, by about three instructions a value."""
    power = lax.bitcast_convert_type(scale.astype(jnp.int16) << 7, jnp.bfloat16)  # 2^(scale - 127)
    [plane] = plgpu.elementwise_inline_asm(
        "{\n.reg .b32 two, sign, rest, power;\nmov.b32 power, 0x7E807E80;\n" + code + "}",
        args=[codes, jnp.broadcast_to(power, codes.shape)],
        constraints="=r,=r,r,r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.bfloat16)],
    )
    return plane


# ---- weights ----


def _weights_kernel(start_ref, end_ref, dy_ref, x_ref, out_ref, *, n, k, step, interpret):
    expert = pl.program_id(2)
    start, end = start_ref[expert], end_ref[expert]
    output = pl.program_id(1) * n + jnp.arange(n)
    width = pl.program_id(0) * k + jnp.arange(k)

    def advance(i, total):
        token = start + i * step + jnp.arange(step)
        dy = _load(dy_ref, (), token, output, token < end)
        x = _load(x_ref, (), token, width, token < end)
        return total + compat.triton_dot(dy, x, 0, 0, interpret)

    steps = (end - start + step - 1) // step
    total = lax.fori_loop(0, steps, advance, jnp.zeros((n, k), jnp.float32))
    inside = (output < out_ref.shape[1])[:, None] & (width < out_ref.shape[2])[None, :]
    plgpu.store(out_ref.at[expert, output[:, None], width[None, :]], total, mask=inside)

"""Mosaic TPU kernels of `expert_matmul`: rows (forward and dx) and weights (dW).

The grid goes over visits of tiles of rows by experts (`expert_visits`), which the kernels get as
prefetched scalars: the weights of the next visit arrive while this one computes. All that a tile of
outputs contracts, a panel, lies in VMEM:

    rows      for each panel of outputs, for each visit: out rows = x rows . panel of the expert
    weights   for each tile [N, K] of dW, for each visit: dW[expert] += dy rows^T . x rows

FP4 weights arrive as bytes and are decoded into a panel in VMEM, once for each expert and panel,
however many tiles of tokens follow. Products are in bfloat16 or, where x is float32, in float32
(Precision.HIGHEST); sums are in float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import compat, tpu
from kernels_pallas.expert_visits import mask, rows_of_tile, visits
from kernels_pallas.planar import BLOCK, Planar

COLUMNS = (1024, 512, 256, 128)  # outputs a panel, the first that fits
LANES = 128
CHUNK = 1024  # of the contraction, a step of the loop in the kernel: bounds the size of its code


def rows(
    x: Array,
    w: Array | Planar,
    group_sizes: Array,
    *,
    transpose: bool = False,
    interpret: tpu.Interpret = False,
) -> Array:
    """x [T, K], w [E, N, K] -> [T, N] in x's dtype; transpose: x [T, N] -> [T, K].

    Rows past sum(group_sizes) are 0. Raises ValueError for dtypes other than bfloat16 and float32,
    and where no panel fits into VMEM.
    """
    _check_dtype(x)
    if isinstance(w, Planar):
        operands, outputs, width = (w.codes, w.scales), w.shape[1], 2 * w.codes.shape[-2]
        if not transpose:  # K as it is in the planes, padded
            x = jnp.pad(x, ((0, 0), (0, width - x.shape[1])))
    else:
        operands, (_, outputs, width) = (w.astype(x.dtype),), w.shape
    columns = width if transpose else outputs
    if 0 in (*x.shape, columns, w.shape[0]):
        return jnp.zeros((x.shape[0], w.shape[2] if transpose else columns), x.dtype)
    out = _rows(x, operands, group_sizes, columns, transpose, interpret)
    return out[:, : w.shape[2]] if transpose else out


def weights(dy: Array, x: Array, group_sizes: Array, *, interpret: tpu.Interpret = False) -> Array:
    """dW float32 [E, N, K] of dy [T, N] and x [T, K]; zeros for an expert without tokens.

    Such an expert gets one visit, which writes zeros and reads no tokens. Raises as `rows` does.
    """
    _check_dtype(x)
    shape = (group_sizes.shape[0], dy.shape[1], x.shape[1])
    if 0 in (*shape, x.shape[0]):
        return jnp.zeros(shape, jnp.float32)
    return _weights(dy.astype(x.dtype), x, group_sizes, interpret)


def refusal(x, w, group_sizes) -> str | None:
    """Why these cannot run, or None. Reads shapes and dtypes only."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}, allowed: bfloat16, float32"
    packed = isinstance(w, Planar)
    experts, outputs, width = w.shape
    width = 2 * w.codes.shape[-2] if packed else width
    try:
        for depth, columns, choices in (
            (width, outputs, COLUMNS),
            (outputs, width, COLUMNS[:1] if packed else COLUMNS),
        ):
            tile = rows_of_tile(x.shape[0], experts)
            _fit(tile, depth, columns, x.dtype, packed, choices)
    except ValueError as error:
        return str(error).removeprefix("expert_matmul: tpu: ")
    return None


def _check_dtype(x):
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"expert_matmul: tpu: x is {x.dtype}, allowed: bfloat16, float32 "
            "(or implementation='ragged')"
        )


# ---- rows ----


def _rows(x, weights, group_sizes, columns, transpose, interpret):
    """The pallas_call of `rows`. weights: (w [E, N, K],) or (codes, scales)."""
    (total, depth), experts, packed = x.shape, weights[0].shape[0], len(weights) == 2
    # 32 rows of scales are a tile of uint8: less of them, if not all, does not compile everywhere.
    choices = COLUMNS[:1] if packed and transpose else COLUMNS
    tile, width = _fit(rows_of_tile(total, experts), depth, columns, x.dtype, packed, choices)
    steps = visits(group_sizes, total, tile, every=False)
    # Decoded weights are [K, N], floats [N, K]: which axis of a panel the outputs are.
    outputs_first = transpose == packed

    def panel(divide):  # block of an operand with `divide` rows of the panel in one of its own
        size = (width // divide, depth) if outputs_first else (depth // divide, width)
        if outputs_first:
            return pl.BlockSpec((1, *size), lambda n, v, s: (s.expert[v], n, 0))
        return pl.BlockSpec((1, *size), lambda n, v, s: (s.expert[v], 0, n))

    def source(n, v, s):
        return s.tile[jnp.maximum(jnp.minimum(v, s.live[0] - 1), 0)], 0

    scratch = []
    if packed:
        shape = (width, depth) if outputs_first else (depth, width)
        scratch = [
            pltpu.VMEM(shape, x.dtype),
            pltpu.VMEM((shape[0] // BLOCK, shape[1]), jnp.float32),
        ]
    return _call(
        functools.partial(_rows_kernel, axis=int(outputs_first), packed=packed),
        "expert_rows",
        steps,
        (x, *weights),
        grid=(pl.cdiv(columns, width), steps.tile.shape[0]),
        in_specs=[
            pl.BlockSpec((tile, depth), source),
            *([panel(2), panel(BLOCK)] if packed else [panel(1)]),
        ],
        out_specs=pl.BlockSpec((tile, width), lambda n, v, s: (s.tile[v], n)),
        out=((total, columns), x.dtype),
        scratch=scratch,
        flops=2 * total * depth * columns,
        interpret=interpret,
    )


def _rows_kernel(steps, x, *refs, axis: int, packed: bool):
    """One visit of one panel. axis: the panel's axis that is contracted."""
    if packed:
        codes, scales, out, panel, powers = refs
    else:
        panel, out = refs[0].at[0], refs[1]
    visit = pl.program_id(1)
    mine = mask(steps, visit, out.shape[0])
    depth = x.shape[1]
    chunk = _chunk(depth, x.dtype)

    def multiply(decode: bool):
        def step(i, sum_):
            start = i * chunk
            if decode:
                _decode(codes.at[0], powers, panel, axis, start, chunk)
            part = pl.ds(pl.multiple_of(start, LANES), chunk)
            matrix = panel[part, :] if axis == 0 else panel[:, part]
            return sum_ + tpu.dot(x[:, part], matrix, 1, axis)

        zero = jnp.zeros(out.shape, jnp.float32)
        y = step(0, zero) if chunk == depth else lax.fori_loop(0, depth // chunk, step, zero)
        write(y)

    def write(y):
        out[...] = jnp.where(mine, y, out[...].astype(jnp.float32)).astype(out.dtype)

    is_live = visit < steps.live[0]
    if packed:
        before = steps.expert[jnp.maximum(visit - 1, 0)]
        fresh = (visit == 0) | (steps.expert[visit] != before)

        @pl.when(is_live & fresh)
        def _():
            powers[...] = _power(scales[0])
            multiply(decode=True)

        @pl.when(is_live & jnp.logical_not(fresh))
        def _():
            multiply(decode=False)
    else:
        pl.when(is_live)(lambda: multiply(decode=False))

    @pl.when(jnp.logical_not(is_live) & (steps.first[visit] < steps.end[visit]))
    def _():
        write(jnp.zeros(out.shape, jnp.float32))


def _chunk(depth: int, dtype) -> int:
    """The largest divisor of `depth` up to CHUNK at which lanes and scales can be cut; or all.

    A quarter of that for float32, whose products are six, and so is their code.
    """
    most = CHUNK // 4 if dtype == jnp.float32 else CHUNK
    cuts = [c for c in range(256, most + 1, 256) if depth % c == 0]
    return depth if depth <= most or not cuts else cuts[-1]


# ---- FP4 ----


def _decode(codes, powers, panel, axis: int, start, size: int):
    """Decodes rows (axis 0) or lanes (axis 1) [start, start + size) of a panel [K, N] into it.

    codes uint8 [K/2, N], powers float32 [K/32, N]: the scales.
    """

    def part(ref, divide):
        along = pl.ds(
            pl.multiple_of(start // divide, BLOCK if divide < BLOCK else 8), size // divide
        )
        return (
            ref.at[along, :] if axis == 0 else ref.at[:, pl.ds(pl.multiple_of(start, LANES), size)]
        )

    codes, scales, panel = part(codes, 2), part(powers, BLOCK)[...], part(panel, 1)
    for row in range(0, panel.shape[0], BLOCK):
        plane, high = divmod(row // BLOCK, 2)
        if not high:
            halves = _values(codes[plane * BLOCK : (plane + 1) * BLOCK, :])
        scale = scales[row // BLOCK : row // BLOCK + 1]
        panel[row : row + BLOCK, :] = (halves[high] * scale).astype(panel.dtype)


def _values(codes: Array) -> tuple[Array, Array]:
    """Bytes [32, N] -> the FP4 numbers of their low and of their high nibbles, times 2^-10.

    A TPU unpacks float8_e5m2 in one instruction, so numbers are put into that format, four to a
    32-bit word. Of a code's magnitude eem, E5M2 wants the exponent field ee + 4 with the mantissa
    m0: the bits 1eem0, which is a shift and one more bit. Exceptions are 0, all zeros, and 0.5
    (001): 10000. No number is subnormal: whether hardware keeps those, only hardware can tell.
    """
    word = pltpu.bitcast(codes, jnp.int32)
    magnitude = word & 0x77777777
    nonzero = (magnitude + 0x77777777) & ~0x77777777
    above_half = lax.shift_right_logical(magnitude + 0x66666666, 3) & 0x11111111
    nibbles = nonzero | (magnitude & (above_half | 0x66666666))
    sign = -0x7F7F7F80  # 0x80808080
    low = ((nibbles << 1) & 0x1E1E1E1E) | ((word << 4) & sign)
    high = (lax.shift_right_logical(nibbles, 3) & 0x1E1E1E1E) | (word & sign)
    low, high = (pltpu.bitcast(half, jnp.float8_e5m2) for half in (low, high))
    return low.astype(jnp.float32), high.astype(jnp.float32)


def _power(scales: Array) -> Array:
    """E8M0 bytes -> 2^10 times the scales, float32, exact; NaN for 255, and from 2^118 on.

    No conversion to float and no exp2, which is not exact everywhere: the bits of the exponent.
    """
    scales = scales.astype(jnp.int32)
    power = lax.bitcast_convert_type((scales + 10) << 23, jnp.float32)
    return jnp.where(scales > 244, jnp.nan, power)


# ---- weights ----


def _weights(dy, x, group_sizes, interpret):
    """The pallas_call of `weights`."""
    (total, n), k, experts = dy.shape, x.shape[1], group_sizes.shape[0]
    tile = rows_of_tile(total, experts)
    steps = visits(group_sizes, total, tile, every=True)
    high, wide = min(n, COLUMNS[0]), min(k, COLUMNS[0])
    return _call(
        _weights_kernel,
        "expert_weights",
        steps,
        (dy, x),
        grid=(pl.cdiv(n, high), pl.cdiv(k, wide), steps.tile.shape[0]),
        in_specs=[
            pl.BlockSpec((tile, high), lambda n, k, v, s: (s.tile[v], n)),
            pl.BlockSpec((tile, wide), lambda n, k, v, s: (s.tile[v], k)),
        ],
        out_specs=pl.BlockSpec((1, high, wide), lambda n, k, v, s: (s.expert[v], n, k)),
        out=((experts, n, k), jnp.float32),
        scratch=[],
        flops=2 * total * n * k,
        interpret=interpret,
    )


def _weights_kernel(steps, dy, x, out):
    visit = pl.program_id(2)
    mine = mask(steps, visit, x.shape[0])

    @pl.when((visit == 0) | (steps.expert[visit] != steps.expert[jnp.maximum(visit - 1, 0)]))
    def _():
        out[...] = jnp.zeros(out.shape, out.dtype)

    @pl.when(steps.first[visit] < steps.end[visit])
    def _():
        # Both: what lies past the last row may be NaN, and so may another expert's tokens.
        a, b = (jnp.where(mine, a[...].astype(jnp.float32), 0).astype(a.dtype) for a in (dy, x))
        out[0] += tpu.dot(a, b, 0, 0)


# ---- both ----


def _call(
    kernel, name, steps, operands, *, grid, in_specs, out_specs, out, scratch, flops, interpret
):
    """pl.pallas_call with prefetched visits: the kernel and the index maps get a `Visits`."""
    scalars = jax.tree.leaves(steps)
    count, structure = len(scalars), jax.tree.structure(steps)

    def with_steps(f, before):
        def g(*arguments):
            s = jax.tree.unflatten(structure, arguments[before : before + count])
            rest = arguments[before + count :]
            return f(*arguments[:before], s, *rest)

        return g

    def of(spec):
        return pl.BlockSpec(spec.block_shape, with_steps(spec.index_map, len(grid)))

    call = pl.pallas_call(
        with_steps(kernel, 0),
        out_shape=compat.result(*out, *operands, *scalars),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=count,
            grid=grid,
            in_specs=[of(spec) for spec in in_specs],
            out_specs=of(out_specs),
            scratch_shapes=scratch,
        ),
        compiler_params=tpu.params(len(grid)),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=0,
            bytes_accessed=sum(a.nbytes for a in operands),
        ),
        name=name,
        interpret=interpret,
    )
    return tpu.looped(call)(*scalars, *operands)


def _fit(rows: int, depth: int, columns: int, dtype, packed: bool, choices) -> tuple[int, int]:
    """Rows a tile and outputs a panel: the first whose blocks, twice each, fit into VMEM."""
    item = jnp.dtype(dtype).itemsize
    for tile in (rows, min(rows, 64)):
        for choice in choices:
            width = min(columns, choice)
            panel = depth * width
            weights = panel * 17 // 16 + panel * item + panel // 8 if packed else 2 * panel * item
            need = 2 * tile * depth * item + weights + tile * width * (2 * item + 8)
            if need <= tpu.VMEM:
                return tile, width
    raise ValueError(
        f"expert_matmul: tpu: a panel of {depth} x {width} {jnp.dtype(dtype)} needs {need >> 20} "
        f"MiB of VMEM, allowed: {tpu.VMEM >> 20} (bfloat16, or implementation='ragged')"
    )

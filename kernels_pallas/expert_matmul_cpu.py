"""expert_matmul without Pallas, for CPUs: a loop over experts and, inside, over tiles of rows.

`lax.ragged_dot` costs a CPU as much as all experts on all rows. Here an expert's rows go in tiles
of TILE, what is left of them in small ones. A small tile may reach past its group, or be moved back
to end with x: it writes its group's rows alone. Trip counts depend on the data, so reverse mode
needs the custom VJP of `expert_matmul`. All arithmetic is float32.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.compat import varying_like
from kernels_pallas.planar import BLOCK, Planar, to_packed
from v4jax.numerics import Packed

TILE, SMALL = 128, 32  # rows a step
EXPONENT = 23  # its place in a float32
HALF = 1 << 22  # the mantissa of 1.5


def rows(x, w, group_sizes, *, transpose=False, interpret=False):
    """Each row times its expert's matrix: x [T, K] -> [T, N]; transposed [T, N] -> [T, K].

    w: [E, N, K], float or packed; packed experts are decoded one at a time, and those without rows
    not at all. Rows past sum(group_sizes) are 0. Result in x's dtype.
    """
    if isinstance(w, Planar):
        w = to_packed(w)
    if isinstance(w, Packed):
        experts, n, k = *w.codes.shape[:-1], 2 * w.codes.shape[-1]
        w = (_words(w), w.scales)  # sliced as words: XLA does not vectorize a slice of bytes
    else:
        experts, n, k = w.shape
    contract, width = (0, k) if transpose else (1, n)
    tile, small = _tiles(x.shape[0], experts)
    ends = jnp.cumsum(group_sizes)

    def matrix_of(e):
        one = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, e, keepdims=False), w)
        return _decode(*one) if isinstance(one, tuple) else one.astype(jnp.float32)

    def expert(e, out):
        matrix = matrix_of(e)
        begin = ends[e] - group_sizes[e]
        whole = group_sizes[e] // tile

        def product(row, size):
            y = _dot(_rows(x, row, size), matrix, 1, contract)
            return y.astype(x.dtype)

        def step(i, out):
            row = begin + i * tile
            return lax.dynamic_update_slice(out, product(row, tile), (row, 0))

        def small_step(i, out):
            row, mine = _small_tile(begin + whole * tile + i * small, ends[e], small, x.shape[0])
            y = jnp.where(mine, product(row, small), _rows(out, row, small))
            return lax.dynamic_update_slice(out, y, (row, 0))

        out = lax.fori_loop(0, whole, step, out)
        return lax.fori_loop(0, _ceil(group_sizes[e] - whole * tile, small), small_step, out)

    out = jnp.zeros((x.shape[0], width), x.dtype)
    return _for_each(group_sizes, expert, varying_like(out, x, *jax.tree.leaves(w), group_sizes))


def weights(dy, x, group_sizes, *, interpret=False):
    """dw[e] = dy_e^T x_e: dy [T, N], x [T, K] -> float32 [E, N, K]; 0 for one without rows."""
    experts, shape = group_sizes.shape[0], (dy.shape[1], x.shape[1])
    tile, small = _tiles(x.shape[0], experts)
    ends = jnp.cumsum(group_sizes)
    like = (dy, x, group_sizes)

    def expert(e, out):
        begin = ends[e] - group_sizes[e]
        whole = group_sizes[e] // tile

        def step(i, total):
            row = begin + i * tile
            return total + _dot(_rows(dy, row, tile), _rows(x, row, tile), 0, 0)

        def small_step(i, total):
            row, mine = _small_tile(begin + whole * tile + i * small, ends[e], small, x.shape[0])
            dy_rows = jnp.where(mine, _rows(dy, row, small), 0)
            return total + _dot(dy_rows, _rows(x, row, small), 0, 0)

        total = varying_like(jnp.zeros(shape, jnp.float32), *like)
        total = lax.fori_loop(0, whole, step, total)
        left = _ceil(group_sizes[e] - whole * tile, small)
        total = lax.fori_loop(0, left, small_step, total)
        return lax.dynamic_update_index_in_dim(out, total, e, 0)

    out = varying_like(jnp.zeros((experts, *shape), jnp.float32), *like)
    return _for_each(group_sizes, expert, out)


def _for_each(group_sizes, expert, out):
    """expert(e, out) of every expert that has rows, in ascending order: the others' weights are
    neither copied nor decoded."""
    busy = jnp.argsort(group_sizes == 0, stable=True)
    count = jnp.sum(group_sizes > 0)
    return lax.fori_loop(0, count, lambda i, out: expert(busy[i], out), out)


def _tiles(total: int, experts: int) -> tuple[int, int]:
    """Rows of a tile and of a small one: no more than x has; small ones about a mean group's."""
    mean = 1 << (total // experts).bit_length()
    small = min(SMALL, max(8, mean), total)
    return (TILE if total >= TILE else small), small


def _ceil(a, b: int):
    return (a + b - 1) // b


def _rows(x, row, size: int):
    return lax.dynamic_slice(x, (row, 0), (size, x.shape[1]))


def _small_tile(first, end, size: int, total: int) -> tuple[Array, Array]:
    """(row, mine): where a tile for rows from `first` on begins, moved back to end within x, and
    which of its rows [size, 1] are those from `first` to `end`."""
    row = jnp.minimum(first, total - size)
    index = row + jnp.arange(size, dtype=jnp.int32)[:, None]
    return row, (index >= first) & (index < end)


def _dot(a, b, axis_a: int, axis_b: int):
    return lax.dot_general(
        a.astype(jnp.float32), b.astype(jnp.float32), (((axis_a,), (axis_b,)), ((), ()))
    )


def decode(p: Packed) -> Array:
    """dequantize(p) of MXFP4 [..., K], bit for bit, at an eighth of its time on a CPU."""
    return _decode(_words(p), p.scales)


def _words(p: Packed) -> Array:
    """The codes as uint32 [..., K/32, 4], eight elements each; no copy."""
    return lax.bitcast_convert_type(p.codes.reshape(*p.scales.shape, 4, 4), jnp.uint32)


def _decode(words: Array, scales: Array) -> Array:
    """float32 [..., K], its bits put together by integers, one word of eight elements at a time.

    With scale byte s, of 2^(s-127), and m an element's three bits below its sign:

        m = 0, 1        0, 2^(s-128)                        elements 0 and 0.5
        m = 2, ..., 7   exponent s, and (m - 2) / 2 on it   1, 1.5, 2, 3, 4, 6: two an octave

    Other scales than 2 to 252 also meet subnormals, infinity and NaN. Those cost a third more, so
    only where there are such.
    """
    usual = jnp.all((scales > 1) & (scales < 253))
    return lax.cond(usual, _decode_usual, _decode_any, words, scales)


def _decode_usual(words, scales):
    one = scales.astype(jnp.uint32)[..., None, None] << EXPONENT
    sign, m = _elements(words)
    low = jnp.where(m == 0, 0, one - (1 << EXPONENT))
    return _floats(sign | jnp.where(m < 2 * HALF, low, one + (m - 2 * HALF)))


def _decode_any(words, scales):
    s = scales.astype(jnp.uint32)[..., None, None]
    sign, m = _elements(words)
    unit = jnp.where(s > 1, (s - 1) << EXPONENT, jnp.uint32(1) << (21 + s))
    # Below 2 elements are even, and times 2^-127, of scale byte 0, so are floats below 4.
    even = m < jnp.where(s == 0, 4 * HALF, 2 * HALF)
    magnitude = jnp.where(even, (m >> 22) * unit, (s << EXPONENT) + (m - 2 * HALF))
    magnitude = jnp.minimum(magnitude, 0x7F800000) | jnp.where(s == 255, 0x7FC00000, 0)
    return _floats(sign | magnitude)


def _elements(words) -> tuple[Array, Array]:
    """(sign at bit 31, m * HALF) of the eight elements of each word: uint32 [..., 8]."""
    top = words[..., None] << (28 - 4 * jnp.arange(8, dtype=jnp.uint32))
    return top & jnp.uint32(1 << 31), (top & jnp.uint32(7 << 28)) >> 6


def _floats(bits) -> Array:
    *lead, blocks, _, _ = bits.shape
    return lax.bitcast_convert_type(bits, jnp.float32).reshape(*lead, blocks * BLOCK)

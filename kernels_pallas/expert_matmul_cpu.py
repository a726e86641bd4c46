"""expert_matmul without Pallas, for CPUs: a loop over experts and, inside, over tiles of rows.

`lax.ragged_dot` costs a CPU as much as all experts on all rows. Here an expert's rows go in tiles
of TILE, what is left of them in small ones. A small tile may reach past its group, or be moved back
to end with x: it writes its group's rows alone. Trip counts depend on the data, so reverse mode
needs the custom VJP of `expert_matmul`. All arithmetic is float32. Both functions are jitted here,
so that a model of many layers traces them once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.compat import varying_like
from kernels_pallas.planar import Planar, to_packed
from v4jax.numerics import Packed
from v4jax.numerics.decode import decode_words, words

TILE, SMALL = 128, 32  # rows a step


@functools.partial(jax.jit, static_argnames=("transpose", "interpret"))
def rows(x, w, group_sizes, *, transpose=False, interpret=False):
    """Each row times its expert's matrix: x [T, K] -> [T, N]; transposed [T, N] -> [T, K].

    w: [E, N, K], float or packed; packed experts are decoded one at a time, and those without rows
    not at all. Rows past sum(group_sizes) are 0. Result in x's dtype.
    """
    if isinstance(w, Planar):
        w = to_packed(w)
    if isinstance(w, Packed):
        experts, n, k = *w.codes.shape[:-1], 2 * w.codes.shape[-1]
        w = (words(w), w.scales)  # sliced as words: XLA does not vectorize a slice of bytes
    else:
        experts, n, k = w.shape
    contract, width = (0, k) if transpose else (1, n)
    tile, small = _tiles(x.shape[0], experts)
    ends = jnp.cumsum(group_sizes)

    def matrix_of(e):
        one = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, e, keepdims=False), w)
        return decode_words(*one) if isinstance(one, tuple) else one.astype(jnp.float32)

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


@functools.partial(jax.jit, static_argnames="interpret")
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
            dy_rows, x_rows = (jnp.where(mine, _rows(z, row, small), 0) for z in (dy, x))
            return total + _dot(dy_rows, x_rows, 0, 0)

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
        a.astype(jnp.float32),
        b.astype(jnp.float32),
        (((axis_a,), (axis_b,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    )

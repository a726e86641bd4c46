"""Loops over blocks of the length axis, the whole batch inside.

Not over rows of batch and length together: a loop over an axis that is sharded gathers it.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.compat import varying_like


def over_blocks(function, operands, rows: int):
    """function(*blocks [B, rows, ...]) over blocks of operands [B, T, ...], results joined to T.

    The last block begins earlier where T is no multiple of `rows`: each row must stand for itself.
    """

    def stateless(_, fresh, *blocks):
        return (), function(*blocks)

    return scan_blocks(stateless, (), operands, rows)[1]


def scan_blocks(function, carry, operands, rows: int):
    """(carry, results [B, T, ...]) of function(carry, fresh, *blocks) -> (carry, results).

    fresh: bool [rows], false for what the block before has had already; see `over_blocks`.
    A result of 16-bit floats would be slow: XLA's CPU back end converts the whole of it, each time.
    """
    length = operands[0].shape[1]
    if length <= rows:
        return function(carry, jnp.ones(length, bool), *operands)

    def step(i, state):
        carry, results = state
        start = jnp.minimum(i * rows, length - rows)
        fresh = start + jnp.arange(rows, dtype=jnp.int32) >= i * rows
        blocks = (jax.lax.dynamic_slice_in_dim(x, start, rows, axis=1) for x in operands)
        carry, found = function(carry, fresh, *blocks)

        def write(whole: Array, part: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=1)

        return carry, jax.tree.map(write, results, found)

    blocks = (jax.ShapeDtypeStruct((x.shape[0], rows, *x.shape[2:]), x.dtype) for x in operands)
    fresh = jax.ShapeDtypeStruct((rows,), jnp.bool)
    results = jax.tree.map(
        lambda x: varying_like(jnp.zeros((x.shape[0], length, *x.shape[2:]), x.dtype), *operands),
        jax.eval_shape(function, carry, fresh, *blocks)[1],
    )
    return jax.lax.fori_loop(0, -(-length // rows), step, (carry, results))

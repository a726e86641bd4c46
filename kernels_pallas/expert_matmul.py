"""y_e = x_e w_e^T for tokens sorted by expert.

Implementations:
    loop       a loop over experts and, inside, over tiles of their tokens. The fastest on CPU:
               `lax.ragged_dot` is lowered there to a dense product over all experts.
    ragged     `lax.ragged_dot`.
    reference  each expert's product over all tokens, masked: reads like the equation.
"""

import jax
import jax.numpy as jnp

TILE = 64  # rows a step of the loop
IMPLEMENTATIONS = ("loop", "ragged", "reference")


def expert_matmul(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """Grouped matmul: x [T, K] sorted by expert, w [E, N, K], group_sizes int32 [E] -> [T, N].

    Expert e's rows are the group_sizes[e] after those of the experts before it; rows past
    sum(group_sizes) are 0. Result in x's dtype, accumulated in float32. Differentiable in x and w.
    implementation: one of IMPLEMENTATIONS; None takes the best for the platform. Raises ValueError
    on shapes that do not fit or an unknown name.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[2] or group_sizes.shape != w.shape[:1]:
        raise ValueError(
            f"expert_matmul: x [T, K], w [E, N, K], group_sizes [E] do not fit: "
            f"{x.shape}, {w.shape}, {group_sizes.shape}"
        )
    if implementation is None:
        implementation = "loop" if jax.default_backend() == "cpu" else "ragged"
    if implementation == "loop":
        return _loop(x, w, group_sizes)
    if implementation == "ragged":
        y = jax.lax.ragged_dot(x, jnp.swapaxes(w, 1, 2), group_sizes)
        return jnp.where(jnp.arange(x.shape[0])[:, None] < jnp.sum(group_sizes), y, 0)
    if implementation == "reference":
        expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(x.shape[0]), side="right")
        of = jax.nn.one_hot(expert, w.shape[0], dtype=jnp.float32)
        y = jnp.einsum("TK,ENK,TE->TN", x.astype(jnp.float32), w.astype(jnp.float32), of)
        return y.astype(x.dtype)
    raise ValueError(
        f"expert_matmul: implementation={implementation!r}, allowed: None, "
        + ", ".join(IMPLEMENTATIONS)
    )


@jax.custom_vjp
def _loop(x, w, group_sizes):
    return _rows(x, w, group_sizes, contract=1)


def _forward(x, w, group_sizes):
    return _loop(x, w, group_sizes), (x, w, group_sizes)


def _backward(residuals, g):
    x, w, group_sizes = residuals
    return _rows(g, w, group_sizes, contract=0), _weights(g, x, w.dtype, group_sizes), None


_loop.defvjp(_forward, _backward)


def _tiles(size):
    return (size + TILE - 1) // TILE


def _rows(x, w, group_sizes, contract: int):
    """Each row times its expert's matrix, contracting w[e]'s axis `contract`: [T, ...] -> [T, ...].

    Experts go in ascending order, so rows that a tile writes past its group's end are overwritten
    by the next expert; only rows past the last group must be cleared.
    """
    total = x.shape[0]
    padded = jnp.pad(x, ((0, TILE), (0, 0)))
    starts = jnp.cumsum(group_sizes) - group_sizes

    def expert(e, out):
        matrix = jax.lax.dynamic_index_in_dim(w, e, keepdims=False)

        def tile(i, out):
            row = starts[e] + i * TILE
            rows = jax.lax.dynamic_slice(padded, (row, 0), (TILE, x.shape[1]))
            y = jax.lax.dot_general(
                rows, matrix, (((1,), (contract,)), ((), ())), preferred_element_type=jnp.float32
            )
            return jax.lax.dynamic_update_slice(out, y.astype(x.dtype), (row, 0))

        return jax.lax.fori_loop(0, _tiles(group_sizes[e]), tile, out)

    out = jnp.zeros((total + TILE, w.shape[2 - contract]), x.dtype)
    out = jax.lax.fori_loop(0, w.shape[0], expert, out)[:total]
    return jnp.where(jnp.arange(total)[:, None] < jnp.sum(group_sizes), out, 0)


def _weights(g, x, dtype, group_sizes):
    """dw[e] = g_e^T x_e, accumulated in float32: [E, N, K]."""
    g_padded = jnp.pad(g, ((0, TILE), (0, 0)))
    x_padded = jnp.pad(x, ((0, TILE), (0, 0)))
    starts = jnp.cumsum(group_sizes) - group_sizes

    def expert(e, out):
        def tile(i, total):
            row = starts[e] + i * TILE
            mine = jnp.arange(TILE)[:, None] + i * TILE < group_sizes[e]
            g_rows = jax.lax.dynamic_slice(g_padded, (row, 0), (TILE, g.shape[1]))
            x_rows = jax.lax.dynamic_slice(x_padded, (row, 0), (TILE, x.shape[1]))
            return total + jax.lax.dot_general(
                jnp.where(mine, g_rows, 0),
                x_rows,
                (((0,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )

        total = jnp.zeros((g.shape[1], x.shape[1]), jnp.float32)
        total = jax.lax.fori_loop(0, _tiles(group_sizes[e]), tile, total)
        return jax.lax.dynamic_update_index_in_dim(out, total.astype(dtype), e, 0)

    out = jnp.zeros((group_sizes.shape[0], g.shape[1], x.shape[1]), dtype)
    return jax.lax.fori_loop(0, group_sizes.shape[0], expert, out)

"""Scores of the lightning indexer (report 2.3.1, eq. 15), with their gradient.

    score[t, s] = sum_i w[t, i] relu(q[t, i] . k[s])      -inf where query t does not see entry s

The operands may be rounded to a block format, the scores to BF16 (report 5.2.1), straight-through.
The head weights carry the scale, as the caller likes it; a rotation of q and k is the caller's too.

Implementations:
    xla        blocks of queries, a loop over heads inside: no [T, I, S] array of more than 2^20.
    gpu        Triton forward, the gradient as in xla.
    reference  the equation; differentiable any number of times, forward mode too.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from kernels_pallas import dispatch
from kernels_pallas.blocks import over_blocks, scan_blocks
from kernels_pallas.compat import varying_like
from kernels_pallas.fold import fold
from kernels_pallas.visibility import is_visible, joint_range, visible_range
from v4jax.numerics import FORMATS, Format, PowerOfTwo, fake_quantize, is_mxfp4, quantize

HIGHEST = jax.lax.Precision.HIGHEST
TILE = 1 << 16  # products of one head that stay in cache
COLUMNS = 256  # entries of a tile
DIRECT = 1 << 20  # products of all heads; up to so many, the equation: as fast, and less to compile


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is static. rounding: of q and k, a block format, "bf16", or None: none.
    operand: the dtype that holds them then without loss. score_dtype: of the result.
    """

    rounding: Format | str | None
    operand: jnp.dtype
    score_dtype: jnp.dtype
    implementation: str = "xla"
    interpret: bool = False


def index_scores(
    q: Array,
    k: Array,
    head_weights: Array,
    ratio: int = 4,
    segment_ids: Array | None = None,
    qk_format: Format | str | None = None,
    score_dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
    *,
    offset: Array | int = 0,
    interpret: bool = False,
) -> Array:
    """q [B, T, I, J], k [B, S, J], head_weights [B, T, I] -> scores [B, T, S] of score_dtype.

    An entry stands for `ratio` tokens of a sample; query t sees entry s from the token that closes
    it: (s + 1) * ratio <= offset + t + 1, with query 0 at token `offset` (an integer or [B]) of its
    sample. segment_ids: int [B, T], samples packed into rows, each a run of equal ids; entries are
    counted through the row, as `visibility.visible_range` says.
    qk_format: what q and k are rounded to: a Format, its name in `v4jax.numerics.FORMATS`, "bf16",
    or None. score_dtype: float32 or bfloat16. Products and sums are float32 in either case.
    Gradients pass roundings unchanged; where a product is not above 0, or an entry is not visible,
    they are 0. implementation: a name of the module's list, None for the best.
    Raises ValueError, one line, for what does not fit.
    """
    first, end = check_operands("index_scores", q, k, head_weights, ratio, segment_ids, offset)
    spec = specify("index_scores", q, k, qk_format, score_dtype)
    name = dispatch.choose(
        "index_scores",
        implementation,
        {
            "gpu": dispatch.needs("gpu", interpret),
            "xla": None,
            "reference": None,
        },
        f"{q.shape[2]} heads x {q.shape[3]}, {spec.score_dtype}",
    )
    spec = dataclasses.replace(spec, implementation=name, interpret=interpret)
    return scores_of(q, k, head_weights, first, end, spec)


def check_operands(operation: str, q, k, head_weights, ratio, segment_ids, offset):
    """The visible range; ValueError, one line, for operands that do not fit."""
    shapes = f"{q.shape}, {k.shape}, {head_weights.shape}"
    if (
        q.ndim != 4
        or k.ndim != 3
        or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[2])
        or head_weights.shape != q.shape[:3]
    ):
        raise ValueError(
            f"{operation}: q [B, T, I, J], k [B, S, J], head_weights [B, T, I] do not fit: {shapes}"
        )
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (q, k, head_weights)):
        raise ValueError(
            f"{operation}: q {q.dtype}, k {k.dtype}, head_weights {head_weights.dtype}, allowed: "
            "floating point"
        )
    if not isinstance(ratio, int) or ratio < 1:
        raise ValueError(f"{operation}: ratio={ratio!r}, allowed: 1 or more")
    if segment_ids is not None and segment_ids.shape != q.shape[:2]:
        raise ValueError(
            f"{operation}: segment_ids {segment_ids.shape}, allowed: [B, T] = {q.shape[:2]}"
        )
    if segment_ids is not None and not (isinstance(offset, int) and offset == 0):
        raise ValueError(f"{operation}: offset and segment_ids do not go together")
    return visible_range(q.shape[0], q.shape[1], k.shape[1], ratio, segment_ids, offset)


def specify(operation: str, q, k, qk_format, score_dtype) -> Spec:
    """The static options; ValueError, one line, for unknown ones."""
    if isinstance(qk_format, str) and qk_format != "bf16":
        if qk_format not in FORMATS:
            raise ValueError(
                f"{operation}: qk_format={qk_format!r}, allowed: None, bf16, " + ", ".join(FORMATS)
            )
        qk_format = FORMATS[qk_format]
    score_dtype = jnp.dtype(score_dtype)
    if score_dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"{operation}: score_dtype={score_dtype}, allowed: float32, bfloat16")
    if isinstance(qk_format, Format):
        try:
            qk_format.scale_shape(q.shape)
        except ValueError as error:
            raise ValueError(f"{operation}: q {q.shape}: {error}") from None
        narrow = isinstance(qk_format.rule, PowerOfTwo)  # few bits times a power of two
    else:
        narrow = qk_format == "bf16" or q.dtype == k.dtype == jnp.bfloat16
    narrow = narrow and (dispatch.platform() != "cpu" or dispatch.cpu_multiplies_bfloat16())
    return Spec(qk_format, jnp.dtype(jnp.bfloat16 if narrow else jnp.float32), score_dtype)


def scores_of(q, k, head_weights, first, end, spec: Spec) -> Array:
    """`index_scores` of checked operands, by spec.implementation."""
    if 0 in (*first.shape, k.shape[1]):
        return jnp.zeros((*first.shape, k.shape[1]), spec.score_dtype)
    q, k, head_weights = (x.astype(jnp.float32) for x in (q, k, head_weights))
    if spec.implementation == "reference" or (spec.implementation == "xla" and is_small(q, k)):
        return _reference(q, k, head_weights, first, end, spec)
    return _scores(q, k, head_weights, first, end, spec)


def is_small(q, k) -> bool:
    """Whether all products may exist at once."""
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1] <= DIRECT


def round_operand(x: Array, spec: Spec) -> Array:
    """float32 q or k as it is multiplied, of spec.operand."""
    if spec.rounding == "bf16":
        x = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    elif spec.rounding is not None:
        x = fake_quantize(x, spec.rounding)
    return x.astype(spec.operand)


def _reference(q, k, w, first, end, spec: Spec):
    q, k = (_straight_through(lambda x: round_operand(x, spec).astype(x.dtype), x) for x in (q, k))
    products = jnp.einsum("BTIJ,BSJ->BTIS", q, k, precision=HIGHEST)
    scores = jnp.einsum("BTIS,BTI->BTS", jax.nn.relu(products), w, precision=HIGHEST)
    scores = jnp.where(is_visible(first, end, k.shape[1]), scores, -jnp.inf)
    return scores.astype(spec.score_dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _straight_through(rounding, x):
    return rounding(x)


@_straight_through.defjvp
def _identity(rounding, primals, tangents):
    return rounding(*primals), *tangents


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _scores(q, k, w, first, end, spec):
    return _forward(q, k, w, first, end, spec)[0]


def _forward(q, k, w, first, end, spec):
    q, k = round_operand(q, spec), round_operand(k, spec)
    operands = q, k, w, first, end
    if spec.implementation == "gpu":
        return _on_gpu(operands, spec), operands

    def block(q, w, first, end, low, high):
        scores = block_scores(q, k, w, first, end, low, high, spec)
        return jax.lax.bitcast_convert_type(scores, f"uint{8 * scores.dtype.itemsize}")

    blocks = (q, w, first, end, *joint_range(first, end))
    bits = over_blocks(block, blocks, block_rows(q, k))
    return jax.lax.bitcast_convert_type(bits, spec.score_dtype), operands


def _backward(spec, residuals, g):
    q, k, w, first, end = residuals
    dq, dk, dw = _gradients(q, k, w, first, end, g.astype(jnp.float32))
    return dq, dk, dw, None, None


_scores.defvjp(_forward, _backward)


def _on_gpu(operands, spec: Spec):
    from kernels_pallas import index_gpu

    q, k, *rest = operands
    call = functools.partial(
        index_gpu.scores, score_dtype=spec.score_dtype, interpret=spec.interpret
    )
    return folded(lambda q, k, **scales: call(q, k, *rest, **scales), q, k, spec)


def folded(kernel, q, k, spec: Spec):
    """kernel(q, k, row_scale_q=, row_scale_k=) of rounded operands: in FP8 where that holds them.

    Which is seen on the device: an MXFP4 row's blocks may differ by 2^14, see `fold`.
    """
    if not isinstance(spec.rounding, Format) or not is_mxfp4(spec.rounding):
        return kernel(q, k)
    eight = fold(quantize(q, spec.rounding)), fold(quantize(k, spec.rounding))
    return jax.lax.cond(
        jnp.all(eight[0].exact) & jnp.all(eight[1].exact),
        lambda q, k: kernel(q.values, k.values, row_scale_q=q.scale, row_scale_k=k.scale),
        lambda *_: kernel(q, k),
        *eight,
    )


def block_rows(q, k) -> int:
    """Queries of a block, for which a tile of products stays in cache."""
    return max(1, TILE // (q.shape[0] * min(COLUMNS, k.shape[1])))


def block_scores(q, k, w, first, end, low, high, spec: Spec) -> Array:
    """Scores [B, R, S] of a block of queries, tile by tile of the entries that any of them sees.

    q [B, R, I, J] and k [B, S, J] as `round_operand` makes them; low, high: their `joint_range`.
    """
    entries, columns = k.shape[1], min(COLUMNS, k.shape[1])
    heads = jnp.moveaxis(q, 2, 0), jnp.moveaxis(w, 2, 0)[..., None]  # [I B R J], [I B R 1]

    def tile(i, out):
        start, visible = _tile(i, first, end, entries, columns)
        k_tile = jax.lax.dynamic_slice_in_dim(k, start, columns, axis=1)

        def head(total, operands):
            q, w = operands
            return total + w * jax.nn.relu(_dot(q, k_tile, 2, 2)), None

        zero = varying_like(jnp.zeros(visible.shape, jnp.float32), *operands)
        scores = jnp.where(visible, jax.lax.scan(head, zero, heads)[0], -jnp.inf)
        return jax.lax.dynamic_update_slice_in_dim(out, scores, start, axis=2)

    operands = q, k, w, first, end
    out = varying_like(jnp.full((*first.shape, entries), -jnp.inf), *operands)
    out = jax.lax.fori_loop(*_tiles(low, high, columns), tile, out)
    return out.astype(spec.score_dtype)


def _tiles(low, high, columns: int) -> tuple[Array, Array]:
    """(first, end) of the tiles of `columns` entries that a block of queries sees."""
    return jnp.min(low) // columns, (jnp.max(high) + columns - 1) // columns


def _tile(i, first, end, entries: int, columns: int):
    """(its first entry, which of its `columns` each query sees); the last one may begin earlier."""
    start = jnp.minimum(i * columns, entries - columns)
    entry = start + jnp.arange(columns, dtype=jnp.int32)
    return start, (first[..., None] <= entry) & (entry < end[..., None])


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """float32 product of x and y [B, ., .] over an axis of each."""
    return jax.lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((0,), (0,))),
        precision=HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _gradients(q, k, w, first, end, g):
    """(dq, dk, dw), float32, of sum(g * scores); the products are made again, tile by tile."""
    entries, columns = k.shape[1], min(COLUMNS, k.shape[1])
    operands = q, k, w, first, end, g

    def zeros(*shape):
        return varying_like(jnp.zeros(shape, jnp.float32), *operands)

    def block(dk, fresh, q, w, first, end, low, high, g):
        heads = jnp.moveaxis(q, 2, 0), jnp.moveaxis(w, 2, 0)[..., None]
        fresh = fresh[:, None]

        def tile(i, sums):
            dk, dq, dw = sums
            start, visible = _tile(i, first, end, entries, columns)
            new = start + jnp.arange(columns, dtype=jnp.int32) >= i * columns
            k_tile = jax.lax.dynamic_slice_in_dim(k, start, columns, axis=1)
            g_tile = jax.lax.dynamic_slice_in_dim(g, start, columns, axis=2)
            g_tile = jnp.where(visible & new, g_tile, 0.0)
            wide = k_tile.astype(jnp.float32)

            def head(dk, operands):
                q, w = operands
                products = _dot(q, k_tile, 2, 2)
                slope = jnp.where(products > 0, g_tile * w, 0.0)
                dk = dk + _dot(slope, jnp.where(fresh, q.astype(jnp.float32), 0.0), 1, 1)
                dw = jnp.sum(g_tile * jax.nn.relu(products), axis=2)
                return dk, (_dot(slope, wide, 2, 1), dw)

            before = jax.lax.dynamic_slice_in_dim(dk, start, columns, axis=1)
            after, (dq_tile, dw_tile) = jax.lax.scan(head, before, heads)
            dk = jax.lax.dynamic_update_slice_in_dim(dk, after, start, axis=1)
            return dk, dq + dq_tile, dw + dw_tile

        sums = dk, zeros(*heads[0].shape), zeros(*heads[1].shape[:-1])
        dk, dq, dw = jax.lax.fori_loop(*_tiles(low, high, columns), tile, sums)
        return dk, (jnp.moveaxis(dq, 0, 2), jnp.moveaxis(dw, 0, 2))

    blocks = (q, w, first, end, *joint_range(first, end), g)
    dk, (dq, dw) = scan_blocks(block, zeros(*k.shape), blocks, block_rows(q, k))
    return dq, dk, dw

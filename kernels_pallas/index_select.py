"""The top_k best visible entries of each query, without a tensor of all scores.

    index_select(q, k, w, top_k, ...) = select_topk(index_scores(q, k, w, ...), top_k)

Implementations:
    xla        blocks of queries: their scores, then their selection. The same bits as the two
               operations' forms of that name.
    tpu        scores and threshold in VMEM (Mosaic); output "mask" or "threshold".
    gpu        the Triton kernels of both, over blocks of queries.
    reference  the right-hand side, from references.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from kernels_pallas import dispatch
from kernels_pallas.blocks import over_blocks
from kernels_pallas.compat import varying_like
from kernels_pallas.index_scores import (
    Spec,
    block_rows,
    block_scores,
    check_operands,
    folded,
    is_small,
    round_operand,
    scores_of,
    specify,
)
from kernels_pallas.select_bisection import positions
from kernels_pallas.select_topk import (
    Output,
    check_selection,
    favours_top_k,
    gpu_refusal,
    nothing,
    select_by,
)
from kernels_pallas.visibility import joint_range
from v4jax.numerics import Format

NARROWEST = 512  # entries; a selection from fewer is not worth more code
WINDOWS = 3


def index_select(
    q: Array,
    k: Array,
    head_weights: Array,
    top_k: int,
    ratio: int = 4,
    segment_ids: Array | None = None,
    qk_format: Format | str | None = None,
    score_dtype: DTypeLike = "float32",
    output: Output = "indices",
    implementation: str | None = None,
    *,
    offset: Array | int = 0,
    interpret: bool = False,
):
    """The selection of select_topk(index_scores(...), top_k), in the same forms.

    q [B, T, I, J], k [B, S, J], head_weights [B, T, I] -> int32 [B, T, top_k], best first, -1 where
    fewer are visible; output "ascending": the lowest index first; "mask": bool [B, T, S];
    "threshold": (value, last) [B, T], of score_dtype and int32. The other arguments are those of
    `index_scores`, which see. No gradient passes. Raises ValueError, one line, for what does not
    fit.
    """
    q, k, head_weights = operands = jax.lax.stop_gradient((q, k, head_weights))
    first, end = check_operands("index_select", *operands, ratio, segment_ids, offset)
    spec = specify("index_select", q, k, qk_format, score_dtype)
    check_selection("index_select", spec.score_dtype, top_k, output)
    if 0 in (*first.shape, k.shape[1]):
        empty = jnp.zeros((*first.shape, k.shape[1]), spec.score_dtype)
        return nothing(empty, top_k, output)
    name = dispatch.choose(
        "index_select",
        implementation,
        {
            "gpu": dispatch.needs("gpu", interpret) or gpu_refusal(k.shape[1], top_k),
            "tpu": dispatch.needs("tpu", interpret) or _tpu_refusal(operands, spec, output),
            "xla": None,
            "reference": None,
        },
        f"{q.shape[2]} heads x {q.shape[3]}, S {k.shape[1]}, top_k {top_k}, {spec.score_dtype}, "
        + output,
    )
    spec = dataclasses.replace(spec, implementation=name, interpret=interpret)
    if name == "reference" or (name == "xla" and is_small(q, k)):
        by = "top_k" if favours_top_k(k.shape[1], top_k, output) else "bisection"
        by = name if name == "reference" else by
        return select_by(by, scores_of(*operands, first, end, spec), top_k, output)
    q, k, w = (x.astype(jnp.float32) for x in operands)
    rounded = round_operand(q, spec), round_operand(k, spec), w, first, end
    return {"gpu": _gpu, "tpu": _tpu, "xla": _xla}[name](rounded, top_k, spec, output)


def _xla(operands: tuple, top_k: int, spec: Spec, output: Output):
    q, k, w, first, end = operands

    def block(q, w, first, end, low, high):
        scores = block_scores(q, k, w, first, end, low, high, spec)
        return _select_between(jnp.min(low), jnp.max(high), scores, top_k, output)

    return over_blocks(block, (q, w, first, end, *joint_range(first, end)), block_rows(q, k))


def _select_between(low, high, scores, top_k: int, output: Output):
    """The selection from scores [B, R, S] that are -inf but in low <= s < high.

    Made in the narrowest of a few windows of entries that hold this range.
    """
    size = scores.shape[2]
    widths = [size]
    while widths[-1] >= 2 * NARROWEST and len(widths) < WINDOWS:
        widths.append(-(-widths[-1] // 2))

    def window(width: int):
        by = "top_k" if favours_top_k(width, top_k, output) else "bisection"
        start = jnp.minimum(low, size - width)
        part = jax.lax.dynamic_slice_in_dim(scores, start, width, axis=2)
        found = select_by(by, part, top_k, output)
        if output == "threshold":
            return found[0], jnp.where(found[1] < 0, -1, found[1] + start)
        if output == "mask":
            every = varying_like(jnp.zeros(scores.shape, bool), found)
            return jax.lax.dynamic_update_slice_in_dim(every, found, start, axis=2)
        return jnp.where(found < 0, -1, found + start)

    fits = sum((high - low <= width).astype(jnp.int32) for width in widths[1:])
    if len(widths) == 1:
        return window(size)
    return jax.lax.switch(fits, [functools.partial(window, width) for width in widths])


def _gpu(operands: tuple, top_k: int, spec: Spec, output: Output):
    from kernels_pallas import index_gpu

    q, k, w, first, end = operands

    def kernel(q, k, **scales):
        return index_gpu.index_select(
            q, k, w, first, end, top_k, **scales,
            score_dtype=spec.score_dtype, output=output, interpret=spec.interpret,
        )  # fmt: skip

    return folded(kernel, q, k, spec)


def _tpu(operands: tuple, top_k: int, spec: Spec, output: Output):
    from kernels_pallas import index_tpu

    form = "mask" if output == "ascending" else output
    q, k, w, first, end = operands

    def kernel(q, k, **scales):
        return index_tpu.select(
            q, k, w, first, end, top_k, **scales,
            score_dtype=spec.score_dtype, output=form, interpret=spec.interpret,
        )  # fmt: skip

    found = folded(kernel, q, k, spec) if dispatch.tpu_has_fp8() else kernel(q, k)
    return positions(found, top_k) if output == "ascending" else found


def _tpu_refusal(operands, spec: Spec, output: Output) -> str | None:
    from kernels_pallas import index_tpu

    q, k, _ = operands
    if output == "indices":
        return "output='indices' needs an order by score, which is not made there"
    try:
        index_tpu.Tiles.make(q.shape[2], q.shape[3], q.shape[1], k.shape[1], spec.operand)
    except ValueError as error:
        return str(error).removeprefix("index_select: tpu: ")
    return None

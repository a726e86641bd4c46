"""The top_k best scores of each row, exactly: lowest index first among equals, -0 equal to +0.

What is -inf, or NaN, is never selected. No gradient passes.

Implementations:
    bisection  counts what reaches a threshold: `select_bisection`.
    top_k      `lax.top_k`, the faster one where few of many are wanted.
    gpu        Triton.
    reference  sorts.
"""

from typing import Literal, overload

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas import dispatch, select_bisection

Output = Literal["indices", "ascending", "mask", "threshold"]
OUTPUTS = ("indices", "ascending", "mask", "threshold")
Threshold = tuple[Array, Array]


@overload
def select_topk(
    scores: Array,
    top_k: int,
    *,
    output: Literal["indices", "ascending", "mask"] = "indices",
    implementation: str | None = None,
    interpret: bool = False,
) -> Array: ...
@overload
def select_topk(
    scores: Array,
    top_k: int,
    *,
    output: Literal["threshold"],
    implementation: str | None = None,
    interpret: bool = False,
) -> Threshold: ...
def select_topk(scores, top_k, *, output="indices", implementation=None, interpret=False):
    """scores float32 or bfloat16 [..., S] -> the selection of the top_k best of each row.

    output: "indices": int32 [..., top_k], best first, -1 where fewer than top_k are above -inf.
    "ascending": the same, the lowest index first. "mask": bool [..., S]. "threshold": (value [...]
    in the scores' dtype, last int32 [...]): selected are the s with score > value, or score ==
    value and s <= last; (-inf, -1) where no more than top_k are above -inf.
    implementation: a name of the module's list; None takes the best for platform and shape.
    interpret: run a Pallas kernel in its interpreter. Raises ValueError, one line, on other input.
    """
    if scores.ndim < 1:
        raise ValueError(f"select_topk: scores {scores.shape}, allowed: [..., S]")
    check_selection("select_topk", scores.dtype, top_k, output)
    scores = jax.lax.stop_gradient(scores)
    if scores.size == 0:
        return nothing(scores, top_k, output)
    order = {"bisection": select_bisection.refusal(scores.shape[-1], top_k, output), "top_k": None}
    if favours_top_k(scores.shape[-1], top_k, output):
        order = dict(reversed(order.items()))
    name = dispatch.choose(
        "select_topk",
        implementation,
        {
            "gpu": dispatch.needs("gpu", interpret) or gpu_refusal(scores.shape[-1], top_k),
            **order,
            "reference": None,
        },
        f"S {scores.shape[-1]}, top_k {top_k}, {scores.dtype}, {output}",
    )
    return select_by(name, scores, top_k, output, interpret)


def check_selection(operation: str, dtype, top_k: int, output: str) -> None:
    """ValueError, one line, for what a selection cannot be made of."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"{operation}: scores of {dtype}, allowed: float32, bfloat16")
    if output not in OUTPUTS:
        raise ValueError(f"{operation}: output={output!r}, allowed: {', '.join(OUTPUTS)}")
    if not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"{operation}: top_k={top_k!r}, allowed: an integer, 1 or more")


def favours_top_k(size: int, top_k: int, output: Output) -> bool:
    """Whether `lax.top_k` is the faster one: measured on a CPU, with either version of jax.

    It goes over a row once, with a heap of top_k. Counting goes over it 16 or 32 times, in vectors,
    and about as often again to gather what it found.
    """
    if select_bisection.refusal(size, top_k, output):
        return True
    listed = output in ("indices", "ascending")
    return top_k * (64 if listed else 256) < size or top_k**2 * (2 if listed else 8) < size


def gpu_refusal(size: int, top_k: int) -> str | None:
    """Why the Triton kernel cannot select top_k of `size`, or None."""
    from kernels_pallas import select_topk_gpu

    most = 2 * select_topk_gpu.WIDTH
    return None if min(top_k, size) <= most else f"top_k={top_k}, allowed: at most {most}"


def select_by(name: str, scores: Array, top_k: int, output: Output, interpret=False):
    """select_topk of checked scores by the implementation `name`."""
    if name == "gpu":
        from kernels_pallas import select_topk_gpu

        return select_topk_gpu.select(scores, top_k, output=output, interpret=interpret)
    if name == "bisection":
        return select_bisection.select(scores, top_k, output)
    keys, k = select_bisection.keys(scores), min(top_k, scores.shape[-1])
    if name == "top_k":
        clean = select_bisection.scores_of(keys, scores.dtype).astype(jnp.float32)
        index = jax.lax.top_k(clean, k)[1]
    else:
        index = jnp.argsort(keys, axis=-1, stable=True, descending=True)[..., :k]
    return _ranked(scores, keys, index, top_k, output)


def _ranked(scores, keys, index, top_k: int, output: Output):
    """The selection, given the keys of all and the indices of the best, best first."""
    size, lowest = keys.shape[-1], select_bisection.lowest(keys.dtype)
    best = jnp.take_along_axis(keys, index, axis=-1)
    index = jnp.where(best > lowest, index.astype(jnp.int32), -1)
    if output in ("indices", "ascending"):
        if output == "ascending":
            index = ascending(index, size)
        fill = [(0, 0)] * (index.ndim - 1) + [(0, max(0, top_k - size))]
        return jnp.pad(index, fill, constant_values=-1)
    many = jnp.sum(keys > lowest, axis=-1, keepdims=True) > top_k
    value = jnp.where(many, best[..., -1:], lowest)
    last = jnp.where(best == value, index, -1).max(axis=-1, keepdims=True)
    last = jnp.where(value > lowest, last, -1)
    if output == "threshold":
        return select_bisection.scores_of(value, scores.dtype)[..., 0], last[..., 0]
    return (keys > value) | ((keys == value) & (jnp.arange(size, dtype=jnp.int32) <= last))


def ascending(index: Array, size: int) -> Array:
    """Indices in ascending order, then the -1s."""
    index = jnp.sort(jnp.where(index < 0, size, index), axis=-1)
    return jnp.where(index < size, index, -1)


def nothing(scores, top_k: int, output: Output):
    """The selection where there is no score."""
    *lead, size = scores.shape
    if output == "threshold":
        return jnp.full(lead, -jnp.inf, scores.dtype), jnp.full(lead, -1, jnp.int32)
    if output == "mask":
        return jnp.zeros((*lead, size), bool)
    return jnp.full((*lead, top_k), -1, jnp.int32)

"""Whether gradients through FP4 weights still point where they should: a probe, at times.

Straight-through training hands the gradient at the rounded weights to the masters. The probe takes
the gradient at the masters too, of the same batch, so it costs about two gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from v4jax.numerics import Format, fp8_tiles, quantize
from v4jax.numerics.formats import E2M1, E8M0
from v4jax.quantization import Quantization, flat_paths, resolve
from v4jax.training import remedies
from v4jax.training.remedies import PLAIN, Memory, RemedyConfig
from v4jax.training.weight_health import part_of

Metrics = dict[str, Array]


def make_probe(
    loss: Callable[..., Array],
    quantization: Quantization,
    config: RemedyConfig = PLAIN,
    seed: int = 0,
    jit: Callable[..., Any] = jax.jit,
) -> Callable[..., Metrics]:
    """(params, memory, step, *arguments) -> {"fp4/<part>/<name>": float32 []}, see `compare`.

    loss: (params, *arguments) -> float32 [], what a training step differentiates. config, seed: as
    the run's, so that the weights are rounded as in its step. jit: what compiles; the gradient is
    one program, called twice. {} where the quantization has no FP4 weights.
    """

    def gradient(weights: Mapping[str, Array], params: Any, *arguments: Any) -> Mapping[str, Array]:
        return jax.grad(lambda w: loss(remedies.changed(params, w), *arguments))(weights)

    def rounded(params: Any, memory: Memory, step: Array) -> tuple[Any, dict, dict]:
        resolved = resolve(quantization, params)
        values = remedies.rounded(config, params, resolved, memory, step, seed)
        return values, remedies.fp4(values, resolved), remedies.fp4(params, resolved)

    def told(at_rounded, at_master, params: Any) -> Metrics:
        return compare(at_rounded, at_master, params, resolve(quantization, params).weights)

    gradient, rounded, told = jit(gradient), jit(rounded), jit(told)

    def probe(params: Any, memory: Memory, step: Array, *arguments: Any) -> Metrics:
        values, at, masters = rounded(params, memory, step)
        if not at:
            return {}
        # What is not FP4 is as the step has it in both.
        return told(gradient(at, values, *arguments), gradient(masters, values, *arguments), params)

    return probe


def compare(
    at_rounded: Mapping[str, Array],
    at_master: Mapping[str, Array],
    params: Any,
    formats: Mapping[str, Format],
) -> Metrics:
    """Of gradients by path, at the rounded weights and at the masters, over each part's weights:

    ste_cosine: their cosine. grad_norm: of that at the rounded. over_noise: grad_norm over sqrt(3)
    times the norm of their difference, below 1 FP4 training stalls ("FP4 All the Way", arXiv
    2505.19115); both NaN where there is no gradient at all, as where MTP's loss does not count.
    zero_gradient: share of elements whose gradient at the rounded weights is 0.
    scale_spread: log2 of the largest ratio of block scales in a 128x128 tile, up to 14 the FP8 path
    is without loss (`numerics.fp8_tiles`); of MXFP4 alone.
    """
    flat = flat_paths(params)
    sums: dict[str, dict[str, Array]] = {}
    spreads: dict[str, list[Array]] = {}
    for path, g in at_rounded.items():
        part, fmt = part_of(path), formats[path]
        g, other = g.astype(jnp.float32), at_master[path].astype(jnp.float32)
        terms = (g * other, g * g, other * other, jnp.square(g - other), g == 0, jnp.ones_like(g))
        names = ("dot", "at_rounded", "at_master", "noise", "zero", "elements")
        for name, term in zip(names, terms, strict=True):
            mine = sums.setdefault(part, {})
            mine[name] = mine.get(name, 0.0) + jnp.sum(term, dtype=jnp.float32)
        if (fmt.element, fmt.scale) == (E2M1, E8M0):
            spread = fp8_tiles(quantize(flat[path], fmt)).max_spread
            spreads.setdefault(part, []).append(spread)
    found: Metrics = {}
    for part, of in sums.items():
        norm = jnp.sqrt(of["at_rounded"])
        both = jnp.maximum(norm * jnp.sqrt(of["at_master"]), 1e-30)
        noise = jnp.maximum(jnp.sqrt(3 * of["noise"]), 1e-30)
        found |= {
            f"fp4/{part}/ste_cosine": jnp.where(norm > 0, of["dot"] / both, jnp.nan),
            f"fp4/{part}/grad_norm": norm,
            f"fp4/{part}/over_noise": jnp.where(norm > 0, norm / noise, jnp.nan),
            f"fp4/{part}/zero_gradient": of["zero"] / of["elements"],
        }
        if part in spreads:
            largest = jnp.max(jnp.stack(spreads[part]))
            found[f"fp4/{part}/scale_spread"] = largest.astype(jnp.float32)
    return found

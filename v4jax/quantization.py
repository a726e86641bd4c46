"""Which tensor gets which format: data (path pattern -> format), resolved and printed.

The parameter tree never changes. Weights are rounded as a whole, once a step, before the forward
pass (`quantize_params`), so neither remat nor microbatches see the rounding, and the gradient with
respect to the rounded weights goes straight to the float32 masters (report 5.2.1). The indexer's
query and key are rounded where they arise; their pseudo-paths are `activations/...`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from v4jax.layers.context import IndexFormats
from v4jax.model import Transformer
from v4jax.numerics import (
    MXFP4,
    Format,
    TwoLevel,
    bytes_of,
    fake_quantize,
    format_named,
    fp8_tiles,
    quantize,
)

ACTIVATIONS = ("activations/index_query", "activations/index_key", "activations/index_scores")


OPTED_OUT = "none"


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Ordered (regex, format name) rules; the first whose regex matches a whole path wins.

    Paths are parameter paths, such as `layers/1/mlp/experts/down_proj`, and ACTIVATIONS. Format
    names are `v4jax.numerics.format_named`'s, "bf16" for activations/index_scores alone, and
    "none" for what a later rule would take and is to stay as it is.
    """

    rules: tuple[tuple[str, str], ...] = ()

    def without(self, *patterns: str) -> "Quantization":
        """The same, but for what matches one of the patterns."""
        return Quantization((*((pattern, OPTED_OUT) for pattern in patterns), *self.rules))


NO_QUANTIZATION = Quantization()
PARTS = {
    "routed experts": (r".*/experts/(gate_up|down)_proj", "mxfp4"),
    "index query and key": (r"activations/index_(query|key)", "mxfp4"),
    "shared experts": (r".*/shared_experts/.*_proj/weight", "mxfp4"),
    "attention": (r".*/self_attn/.*_proj/weight", "mxfp4"),
    "MTP projections": (r"mtp/[eh]_proj/weight", "mxfp4"),
}
# The report's scope (5.2.1): routed experts, MTP's too, and the indexer's QK path.
PAPER = Quantization((PARTS["routed experts"], PARTS["index query and key"]))
# Beside it every other linear map but the head, the routers and the hyper-connections.
ALL_LINEARS = Quantization(tuple(PARTS.values()))
# The same weights in FP8, which loses next to nothing: what arms differ by when formats do not.
ALL_LINEARS_FP8 = Quantization(
    tuple((path, "fp8_128x128") for path, _ in ALL_LINEARS.rules if not path.startswith("activ"))
)
SCOPES = {"paper": PAPER, "all_linears": ALL_LINEARS, "all_linears_fp8": ALL_LINEARS_FP8}
# An option of its own (5.2.1): the report quantizes index scores to BF16 beside FP4.
BF16_INDEX_SCORES = ("activations/index_scores", "bf16")


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A quantization over one model: parameter path -> format, and the indexer's formats.

    opted_out: sites that a rule keeps from a later one.
    """

    weights: Mapping[str, Format]
    index: IndexFormats
    opted_out: tuple[str, ...] = ()


def flat_paths(params) -> dict[str, jax.Array]:
    """Leaves of a parameter tree (nested dict or nnx.State) by path, joined with "/"."""
    pure = nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params
    leaves = jax.tree_util.tree_leaves_with_path(pure)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def resolve(quantization: Quantization, params) -> Resolved:
    """Matches the rules to a model's parameters (arrays or shapes).

    Raises ValueError, one line, for an unknown format, a pattern that matches nothing, or a
    matrix or an index head whose shape its format cannot take.
    """
    paths = flat_paths(params)
    shapes = {path: leaf.shape for path, leaf in paths.items() if len(leaf.shape) >= 2}
    for path, leaf in paths.items():
        if path.endswith("/indexer/kv_norm/weight"):
            shapes |= dict.fromkeys(ACTIVATIONS, leaf.shape[-1:])
    chosen, used = {}, set()
    for site in shapes:
        matching = [rule for rule in quantization.rules if re.fullmatch(rule[0], site)]
        if matching:
            pattern, name = matching[0]
            used.add(pattern)
            if name != OPTED_OUT or len(matching) > 1:
                chosen[site] = _format(pattern, name, site)
    for pattern, _ in quantization.rules:
        if pattern not in used:
            raise ValueError(f"Quantization.rules: pattern {pattern!r} matches no tensor")
    for site, fmt in chosen.items():
        if isinstance(fmt, Format):
            if site in ACTIVATIONS and fmt.rotated and shapes[site][0].bit_count() != 1:
                raise ValueError(
                    f"Quantization.rules: {site}: index_head_dim is {shapes[site][0]}, the "
                    "Hadamard rotation before rounding needs a power of two"
                )
            if site in ACTIVATIONS and isinstance(fmt.rule, TwoLevel):
                raise ValueError(
                    f"Quantization.rules: {site}: the scale of {fmt.name} spans all tokens, later "
                    "ones too; take a format whose scales are of blocks alone"
                )
            try:
                fmt.scale_shape(shapes[site])
            except ValueError as error:
                raise ValueError(f"Quantization.rules: {site}: {error}") from None
    opted_out = tuple(site for site, fmt in chosen.items() if fmt == OPTED_OUT)
    for site in opted_out:
        del chosen[site]
    index = IndexFormats(*(chosen.pop(site, None) for site in ACTIVATIONS))
    return Resolved(chosen, index, opted_out)


def _format(pattern: str, name: str, site: str):
    if name == OPTED_OUT:
        return name
    if site == "activations/index_scores":
        if name != "bf16":
            raise ValueError(f"Quantization.rules: {pattern!r}: index scores allow only bf16")
        return name
    try:
        return format_named(name)
    except ValueError as error:
        raise ValueError(f"Quantization.rules: {pattern!r}: {error}, {OPTED_OUT}") from None


_round = jax.jit(fake_quantize, static_argnums=1)  # eager calls share a compilation by shape


@jax.named_scope("quantization")
def quantize_params(params, weights: Mapping[str, Format]):
    """The parameter tree with the chosen leaves fake-quantized, straight-through; others as is."""

    def leaf(path, x):
        fmt = weights.get(
            jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        )
        return x if fmt is None else _round(x, fmt)

    return jax.tree_util.tree_map_with_path(leaf, params)


def quantized(model: Transformer, quantization: Quantization) -> Transformer:
    """A copy of the model that computes in the given formats; the original is untouched."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    resolved = resolve(quantization, params)
    copy = nnx.merge(graphdef, quantize_params(params, resolved.weights), rest)
    copy.index_formats = resolved.index
    return copy


def table(resolved: Resolved, params) -> list[tuple[str, str, str, int, int]]:
    """(path, shape, format, BF16 bytes, bytes in the format) for each quantized weight, and the
    indexer's activations with zero bytes; then what is opted out, as "none". That, and what is not
    listed, keeps the compute dtype."""
    paths = flat_paths(params)
    rows = [
        (
            path,
            "x".join(map(str, paths[path].shape)),
            fmt.name,
            2 * int(np.prod(paths[path].shape)),
            bytes_of(paths[path].shape, fmt),
        )
        for path, fmt in resolved.weights.items()
    ]
    index = resolved.index
    for site, fmt in zip(ACTIVATIONS, (index.query, index.key, index.scores), strict=True):
        if fmt is not None:
            rows.append((site, "", fmt if isinstance(fmt, str) else fmt.name, 0, 0))
    for site in resolved.opted_out:
        shape = paths[site].shape if site in paths else ()
        size = 2 * math.prod(shape) if shape else 0
        rows.append((site, "x".join(map(str, shape)), OPTED_OUT, size, size))
    return rows


def lossless_share(quantization: Quantization, params):
    """params -> the share of 128x128 tiles of MXFP4 weights that FP8 holds without loss; or None.

    Report 5.2.1: FP4 weights run in the FP8 path unchanged where the block scales of a tile span
    at most 2^14 (`v4jax.numerics.fp8_tiles`).
    """
    resolved = resolve(quantization, params)
    paths = [path for path, fmt in resolved.weights.items() if fmt == MXFP4]
    if not paths:
        return None

    @jax.jit
    def share(params):
        flat = flat_paths(params)
        tiles = np.array([_tile_count(flat[path].shape) for path in paths])
        shares = jnp.stack([fp8_tiles(quantize(flat[path], MXFP4)).share for path in paths])
        return jnp.sum(shares * tiles) / tiles.sum()

    return share


def _tile_count(shape: tuple[int, ...]) -> int:
    """128x128 tiles of the matrices in an array of `shape`, short ones at the edges included."""
    *stack, rows, columns = shape
    return math.prod(stack) * -(-rows // 128) * -(-columns // 128)

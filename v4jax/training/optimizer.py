"""The optimizer: Muon for matrices, plain AdamW for the rest, one table for which leaf is which.

Muon (report 2.4, Algorithm 1), for each logically independent matrix W with gradient G:

    M <- mu M + G                        momentum, without a (1 - mu) factor
    O <- HybridNS(mu M + G)              Nesterov; 8 + 2 Newton-Schulz rows on X / ||X||_F
    W <- W (1 - eta lambda) - eta sqrt(max(n, m)) gamma O

On an orthogonal O the last factor makes the RMS of the update exactly gamma = 0.18, AdamW's size,
so that one learning rate serves both groups. All matrices of one shape, wherever they stand in
the tree, are stacked and go through one batched Newton-Schulz iteration.

Departures from the report: AdamW's decay (0.1) reaches the embedding and the head only. The
report names no exemption; norms, hyper-connection bases and scales, sinks and position biases
are vectors or offsets whose rest value is not 0, and V4.1 does not decay biases and scales. Not
said by the report and decided here: sinks and position biases are AdamW's; query projections are
not split by head.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

MUON, ADAMW, FROZEN = "muon", "adamw", "frozen"
NEWTON_SCHULZ = 8 * ((3.4445, -4.7750, 2.0315),) + 2 * ((2.0, -1.5, 0.5),)


# Splits: (rows of the leaf, model config) -> rows of each independent matrix, in order.
def whole(rows: int, model_config) -> tuple[int, ...]:
    return (rows,)


def halves(rows: int, model_config) -> tuple[int, ...]:
    return _equal(rows, 2)


def groups(rows: int, model_config) -> tuple[int, ...]:
    return _equal(rows, model_config.o_groups)


def streams(rows: int, model_config) -> tuple[int, ...]:
    """W_pre, W_post and W_res of a hyper-connection: M, M and M*M rows."""
    m = model_config.hc_mult
    return (m, m, m * m)


def series(rows: int, model_config) -> tuple[int, ...]:
    """A compressor's series of entries: W^a and W^b in CSA (2c rows), one in HCA (c rows)."""
    c = model_config.head_dim
    return (c,) * min(rows // c, 2)


def _equal(rows: int, parts: int) -> tuple[int, ...]:
    return (rows // parts,) * parts


class Row(NamedTuple):
    """Leaves whose whole path matches `path`; with `decay`, weight decay applies to them.

    The last two axes of a Muon leaf are a matrix [out, in], which `split` cuts along `out`;
    all axes before them count matrices (experts, stacked layers).
    """

    path: str
    group: str
    decay: bool
    split: Callable[[int, Any], tuple[int, ...]] = whole


_BLOCK = r"(layers/\d+|units/\d+|mtp/block)/"
_ATTENTION = _BLOCK + "self_attn/"
_COMPRESSOR = _ATTENTION + "compressor/"

# The first row that matches decides; a leaf without one is an error.
ROWS = (
    Row(r"(embed_tokens|lm_head)/weight", ADAMW, True),
    Row(r"norm/weight|mtp/(enorm|hnorm|norm)/weight", ADAMW, False),
    Row(_BLOCK + r"(input|post_attention)_layernorm/weight", ADAMW, False),
    Row(_ATTENTION + r"(q_a|kv)_norm/weight", ADAMW, False),
    Row(_COMPRESSOR + r"(indexer/)?kv_norm/weight", ADAMW, False),
    Row(_BLOCK + r"(attn|ffn)_hc/(base|scale)", ADAMW, False),
    Row(r"(mtp/)?hc_head/hc_(base|scale)", ADAMW, False),
    Row(_ATTENTION + r"sinks", ADAMW, False),
    Row(_COMPRESSOR + r"(indexer/)?position_bias", ADAMW, False),
    Row(_BLOCK + r"(attn|ffn)_hc/fn", MUON, True, streams),
    Row(r"(mtp/)?hc_head/hc_fn", MUON, True),
    Row(_ATTENTION + r"(q_a|q_b|kv|o_b)_proj/weight", MUON, True),
    Row(_ATTENTION + r"o_a_proj/weight", MUON, True, groups),
    Row(_COMPRESSOR + r"(kv|gate)_proj/weight", MUON, True, series),
    Row(_COMPRESSOR + r"indexer/(kv|gate)_proj/weight", MUON, True, halves),
    Row(_COMPRESSOR + r"indexer/(q_b|weights)_proj/weight", MUON, True),
    Row(_BLOCK + r"mlp/gate/weight", MUON, True),
    Row(_BLOCK + r"mlp/experts/gate_up_proj", MUON, True, halves),
    Row(_BLOCK + r"mlp/experts/down_proj", MUON, True),
    Row(_BLOCK + r"mlp/shared_experts/(gate|up|down)_proj/weight", MUON, True),
    Row(r"mtp/(e|h)_proj/weight", MUON, True),
)
_INDEXER = re.compile(r".*/indexer/.*")
_MTP = re.compile(r"mtp/.*")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Hyperparameters (report 4.2.2; the clip is V3's). Construction raises a one-line ValueError.

    `train_indexer` and `train_mtp` must be false where the loss that trains those leaves has
    weight 0: without a gradient they are neither moved nor decayed, and have no state.
    """

    learning_rate: float = 2e-3  # the peak, of both groups; the report's 2.7e-4 is for 284B
    weight_decay: float = 0.1
    momentum: float = 0.95
    update_rms: float = 0.18
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-20  # float32 gradients below 5e-19 square to 0: their first step is up to 48
    clip_norm: float = 1.0
    ns_dtype: str = "float32"  # operands of Newton-Schulz's matmuls; bfloat16 on accelerators
    matrices: str = MUON  # what moves the matrices: Muon, or AdamW as everything else
    train_indexer: bool = True
    train_mtp: bool = True

    def __post_init__(self):
        for name in ("learning_rate", "update_rms", "eps", "clip_norm"):
            self._require(name, lambda v: v > 0, "a number > 0")
        for name in ("momentum", "b1", "b2"):
            self._require(name, lambda v: 0 <= v < 1, "a number in [0, 1)")
        self._require("weight_decay", lambda v: v >= 0, "a number >= 0")
        for name, allowed in (("ns_dtype", ("float32", "bfloat16")), ("matrices", (MUON, ADAMW))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"OptimizerConfig.{name}: got {getattr(self, name)!r}, allowed: "
                    + " | ".join(allowed)
                )

    def _require(self, name: str, holds: Callable[[float], bool], allowed: str):
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not holds(value):
            raise ValueError(f"OptimizerConfig.{name}: got {value!r}, allowed: {allowed}")


class Leaf(NamedTuple):
    """One parameter and what the optimizer does with it. `split` is () outside Muon."""

    path: str
    shape: tuple[int, ...]
    group: str
    decay: bool
    split: tuple[int, ...]

    @property
    def matrices(self) -> int:
        """How many matrices are orthogonalised, each on its own."""
        return math.prod(self.shape[:-2]) * len(self.split)


def label(path: str, shape: tuple[int, ...], model_config) -> Leaf:
    """The table's verdict on one leaf.

    Args:
      path: keys joined by "/", as in "layers/0/self_attn/sinks".
      shape: the leaf's shape.
      model_config: read for `hc_mult`, `o_groups` and `head_dim`.
    Raises:
      ValueError: no row matches, or the leaf's rows cannot be split as its row says.
    """
    row = next((row for row in ROWS if re.fullmatch(row.path, path)), None)
    if row is None:
        raise ValueError(f"optimizer: no row of ROWS matches leaf {path!r} {list(shape)}")
    if row.group != MUON:
        return Leaf(path, tuple(shape), row.group, row.decay, ())
    split = row.split(shape[-2], model_config) if len(shape) >= 2 else ()
    if not split or sum(split) != shape[-2]:
        raise ValueError(
            f"optimizer: leaf {path!r} {list(shape)} is not [..., out, in] with rows that "
            f"split by {row.split.__name__!r} (got {list(split)})"
        )
    return Leaf(path, tuple(shape), row.group, row.decay, split)


def label_tree(params, model_config, config: OptimizerConfig) -> tuple[Leaf, ...]:
    """`label` for every leaf of a nested dict (arrays or ShapeDtypeStructs), frozen ones marked."""
    labelled = []
    for path, leaf in _paths(params).items():
        entry = label(path, leaf.shape, model_config)
        untrained = (not config.train_indexer and _INDEXER.fullmatch(path)) or (
            not config.train_mtp and _MTP.fullmatch(path)
        )
        if untrained:
            entry = entry._replace(group=FROZEN, decay=False, split=())
        elif entry.group == MUON and config.matrices == ADAMW:
            entry = entry._replace(group=ADAMW, split=())
        labelled.append(entry)
    return tuple(labelled)


def describe(leaves: tuple[Leaf, ...]) -> str:
    """A printable table of `label_tree`'s result: path, shape, group, matrices, decay."""
    rows = [("leaf", "shape", "group", "matrices", "decay")]
    for leaf in leaves:
        matrices = str(leaf.matrices) if leaf.group == MUON else "-"
        shape = "x".join(map(str, leaf.shape))
        rows.append((leaf.path, shape, leaf.group, matrices, "yes" if leaf.decay else "no"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def newton_schulz(x: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Orthogonalises [B, n, m] (n <= m is the cheap orientation): U V^T of each matrix, nearly.

    Singular values end within 5e-4 of 1 (float32; 1e-2 with bfloat16 operands) where they were
    above about 1e-4 of the matrix's norm; smaller ones are lifted in part. A zero matrix stays
    zero, NaN stays NaN. Operands are cast to `dtype`; sums and the rest are float32.
    """
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT

    def matmul(subscripts, a, b):
        return jnp.einsum(
            subscripts,
            a.astype(dtype),
            b.astype(dtype),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def step(x, abc):
        a, b, c = abc
        gram = matmul("Bnm,Bkm->Bnk", x, x)
        return a * x + matmul("Bnk,Bkm->Bnm", b * gram + c * matmul("Bnk,Bkl->Bnl", gram, gram), x)

    x = x.astype(jnp.float32)
    # First to a largest element of 1: squares of very small gradients would underflow. The norm
    # is then at least 1 unless the matrix is zero.
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1.0)
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    x = x / jnp.maximum(norm, 1.0)
    # A scan, not ten copies: a tenth of the program for each matrix shape, and no slower.
    rows = jnp.asarray(NEWTON_SCHULZ, jnp.float32)
    return lax.scan(lambda x, abc: (step(x, abc), None), x, rows)[0]


class MuonState(NamedTuple):
    momentum: Any  # M, float32, the tree of the parameters


def scale_by_muon(
    splits: Mapping[str, tuple[int, ...]],
    *,
    momentum: float = 0.95,
    update_rms: float = 0.18,
    ns_dtype: Any = jnp.float32,
) -> optax.GradientTransformation:
    """Algorithm 1's direction, sqrt(max(n, m)) gamma O, without learning rate and decay.

    Args:
      splits: for each leaf's path, the rows of its independent matrices (`Leaf.split`).
      momentum: mu.
      update_rms: gamma, the RMS of each matrix's update.
      ns_dtype: operands of Newton-Schulz's matmuls.
    """

    def init(params):
        return MuonState(jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params))

    def update(grads, state, params=None):
        del params
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        accumulated = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, grads)
        nesterov = jax.tree.map(lambda m, g: momentum * m + g, accumulated, grads)
        return _orthogonalize(nesterov, splits, update_rms, ns_dtype), MuonState(accumulated)

    return optax.GradientTransformation(init, update)


def _orthogonalize(tree, splits: Mapping[str, tuple[int, ...]], update_rms: float, dtype):
    """Every matrix of the tree to RMS `update_rms`: one Newton-Schulz call a matrix shape."""
    parts = {
        path: jnp.split(leaf, [sum(splits[path][:i]) for i in range(1, len(splits[path]))], -2)
        for path, leaf in _paths(tree).items()
    }
    stacks: dict[tuple[int, int], list[tuple[str, int]]] = {}  # (n, m) -> parts of that shape
    for path, pieces in parts.items():
        for i, piece in enumerate(pieces):
            n, m = sorted(piece.shape[-2:])
            stacks.setdefault((n, m), []).append((path, i))
    for (n, m), places in stacks.items():
        wide = [_wide(parts[path][i]) for path, i in places]
        stack = jnp.concatenate([x.reshape(-1, n, m) for x in wide])
        stack = newton_schulz(stack, dtype) * (math.sqrt(m) * update_rms)
        start = 0
        for (path, i), x in zip(places, wide, strict=True):
            stop = start + math.prod(x.shape[:-2])
            out = stack[start:stop].reshape(x.shape)
            parts[path][i] = out if parts[path][i].shape == x.shape else out.mT
            start = stop
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.concatenate(parts[_name(path)], -2), tree
    )


def _wide(x: jax.Array) -> jax.Array:
    return x if x.shape[-2] <= x.shape[-1] else x.mT


class OptimizerState(NamedTuple):
    """A pytree of arrays. The dicts hold the leaves of their own group, under their own paths."""

    step: jax.Array  # int32 [], updates done
    muon: MuonState
    adamw: optax.ScaleByAdamState


def build_optimizer(
    params, model_config, config: OptimizerConfig, schedule: Callable[[jax.Array], jax.Array]
) -> optax.GradientTransformation:
    """Global-norm clipping, then Muon and AdamW as `ROWS` says, then decay and learning rate.

    Args:
      params: a nested dict of arrays or ShapeDtypeStructs; only paths and shapes are read.
      model_config: see `label`.
      config: hyperparameters.
      schedule: updates done, int32 [], -> a factor of `config.learning_rate`.
    Returns:
      A transformation whose `update(grads, state, params)` gives the change of each parameter,
      in its dtype, zero for frozen leaves, whose gradients do not count in the norm either.
    Raises:
      ValueError: as `label`.
    """
    leaves = {leaf.path: leaf for leaf in label_tree(params, model_config, config)}
    muon = scale_by_muon(
        {path: leaf.split for path, leaf in leaves.items() if leaf.group == MUON},
        momentum=config.momentum,
        update_rms=config.update_rms,
        ns_dtype=jnp.dtype(config.ns_dtype),
    )
    adamw = optax.scale_by_adam(config.b1, config.b2, config.eps)
    clip = optax.clip_by_global_norm(config.clip_norm)

    def pick(tree, *names):
        return _pick(tree, lambda path: leaves[path].group in names)

    def init(params):
        params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        step = jnp.zeros((), jnp.int32)
        return OptimizerState(step, muon.init(pick(params, MUON)), adamw.init(pick(params, ADAMW)))

    def update(grads, state, params):
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), pick(grads, MUON, ADAMW))
        with jax.named_scope("clip"):
            grads, _ = clip.update(grads, clip.init(grads))
        with jax.named_scope("muon"):
            matrices, muon_state = muon.update(pick(grads, MUON), state.muon)
        with jax.named_scope("adamw"):
            others, adamw_state = adamw.update(pick(grads, ADAMW), state.adamw)
        directions = _paths(matrices) | _paths(others)
        rate = config.learning_rate * schedule(state.step)

        def change(path, p):
            leaf = leaves[_name(path)]
            if leaf.group == FROZEN:
                return jnp.zeros_like(p)
            decay = config.weight_decay if leaf.decay else 0.0
            return (-rate * (directions[leaf.path] + decay * p)).astype(p.dtype)

        updates = jax.tree_util.tree_map_with_path(change, params)
        return updates, OptimizerState(state.step + 1, muon_state, adamw_state)

    return optax.GradientTransformation(init, update)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _paths(tree) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _pick(tree: dict, keep: Callable[[str], bool], prefix: str = "") -> dict:
    """The nested dict with only the leaves whose path `keep` accepts, without empty dicts."""
    picked = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            value = _pick(value, keep, path + "/")
            if value:
                picked[key] = value
        elif keep(path):
            picked[key] = value
    return picked

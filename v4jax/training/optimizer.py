"""The optimizer: Muon for matrices, plain AdamW for the rest, one table for which leaf is which.

Muon is in `v4jax.training.muon`. Its updates have AdamW's size, so that one learning rate serves
both groups; the indexer may have one of its own.

Departures from the report: AdamW's decay (0.1) reaches the embedding and the head only. The
report names no exemption; norms, hyper-connection bases and scales, sinks and position biases
are vectors or offsets whose rest value is not 0, and V4.1 does not decay biases and scales. Not
said by the report and decided here: sinks and position biases are AdamW's; query projections are
not split by head.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from v4jax.model import part_of
from v4jax.quantization import flat_paths
from v4jax.training.muon import COEFFICIENTS, MuonState, scale_by_muon

MUON, ADAMW, FROZEN = "muon", "adamw", "frozen"


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

    indexer_learning_rate: the indexer's peak, None: as the others'. clip: of the norm of all
    gradients together, or of each part of the model (`v4jax.model.PARTS`) on its own.
    newton_schulz: the report's 8 + 2 rows, or the first 5, as Muon came.
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
    indexer_learning_rate: float | None = None
    clip: str = "global"
    newton_schulz: str = "hybrid"

    def __post_init__(self):
        for name in ("learning_rate", "update_rms", "eps", "clip_norm"):
            self._require(name, lambda v: v > 0, "a number > 0")
        for name in ("momentum", "b1", "b2"):
            self._require(name, lambda v: 0 <= v < 1, "a number in [0, 1)")
        self._require("weight_decay", lambda v: v >= 0, "a number >= 0")
        if self.indexer_learning_rate is not None:
            self._require("indexer_learning_rate", lambda v: v > 0, "a number > 0, or None")
        for name, allowed in (
            ("ns_dtype", ("float32", "bfloat16")),
            ("matrices", (MUON, ADAMW)),
            ("clip", ("global", "group")),
            ("newton_schulz", tuple(COEFFICIENTS)),
        ):
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
    for path, leaf in flat_paths(params).items():
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


class OptimizerState(NamedTuple):
    """A pytree of arrays. The dicts hold the leaves of their own group, under their own paths."""

    step: jax.Array  # int32 [], updates done
    muon: MuonState
    adamw: optax.ScaleByAdamState


def build_optimizer(
    params,
    model_config,
    config: OptimizerConfig,
    schedule: Callable[[jax.Array], jax.Array],
    *,
    only_indexer: bool = False,
    index_start: int = 0,
) -> optax.GradientTransformation:
    """Clipping, then Muon and AdamW as `ROWS` says, then decay and learning rate.

    Args:
      params: a nested dict of arrays or ShapeDtypeStructs; only paths and shapes are read.
      model_config: see `label`.
      config: hyperparameters.
      schedule: updates done, int32 [], -> a factor of the peak learning rates.
      only_indexer: the indexer's warm-up: its leaves move, at the constant peak; all others keep
        their values and their optimizer's state to the last bit. The state's tree is the same.
      index_start: updates before the indexer's loss counts, in which its leaves, that have no
        gradient, do not decay either.
    Returns:
      A transformation whose `update(grads, state, params)` gives the change of each parameter,
      in its dtype, zero for leaves that do not learn, whose gradients do not count in the norm.
    Raises:
      ValueError: as `label`.
    """
    leaves = {leaf.path: leaf for leaf in label_tree(params, model_config, config)}
    muon = scale_by_muon(
        {path: leaf.split for path, leaf in leaves.items() if leaf.group == MUON},
        momentum=config.momentum,
        update_rms=config.update_rms,
        ns_dtype=jnp.dtype(config.ns_dtype),
        coefficients=COEFFICIENTS[config.newton_schulz],
    )
    adamw = optax.scale_by_adam(config.b1, config.b2, config.eps)

    def of(tree, group, indexer: bool | None = None):
        """The leaves of a group, of it the indexer's or all others."""
        return _pick(
            tree,
            lambda path: leaves[path].group == group and indexer in (None, _is_indexer(path)),
        )

    def learning(tree):
        return _pick(
            tree,
            lambda path: leaves[path].group != FROZEN and (not only_indexer or _is_indexer(path)),
        )

    def init(params):
        params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        step = jnp.zeros((), jnp.int32)
        return OptimizerState(step, muon.init(of(params, MUON)), adamw.init(of(params, ADAMW)))

    def muon_update(grads, state):
        directions, new = muon.update(grads, MuonState(_pick_like(state.momentum, grads)))
        return directions, MuonState(_replaced(state.momentum, new.momentum))

    def adamw_update(grads, state, step):
        """Bias is corrected by how often a leaf was updated: the indexer's since its loss counts,
        the others' by the state's count, which an indexer's warm-up leaves alone."""
        mu, nu = state.mu, state.nu
        directions: dict[str, jax.Array] = {}
        counts = {True: jnp.maximum(step - index_start, 0), False: state.count}
        for indexer, count in counts.items():
            some = of(grads, ADAMW, indexer)
            if some:
                part = optax.ScaleByAdamState(count, _pick_like(mu, some), _pick_like(nu, some))
                found, part = adamw.update(some, part)
                directions |= flat_paths(found)
                mu, nu = _replaced(mu, part.mu), _replaced(nu, part.nu)
        count = state.count if only_indexer else state.count + 1
        return directions, optax.ScaleByAdamState(count, mu, nu)

    def update(grads, state, params):
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), learning(grads))
        with jax.named_scope("clip"):
            grads = _clipped(grads, config)
        with jax.named_scope("muon"):
            matrices, muon_state = muon_update(of(grads, MUON), state.muon)
        with jax.named_scope("adamw"):
            others, adamw_state = adamw_update(of(grads, ADAMW), state.adamw, state.step)
        directions = flat_paths(matrices) | others
        scale = 1.0 if only_indexer else schedule(state.step)
        rate = config.learning_rate * scale
        indexer_rate = (config.indexer_learning_rate or config.learning_rate) * scale
        if index_start:
            indexer_rate = jnp.where(state.step < index_start, 0.0, indexer_rate)

        def change(path, p):
            leaf = leaves[_name(path)]
            if leaf.path not in directions:
                return jnp.zeros_like(p)
            eta = indexer_rate if _is_indexer(leaf.path) else rate
            decay = config.weight_decay if leaf.decay else 0.0
            return (-eta * (directions[leaf.path] + decay * p)).astype(p.dtype)

        updates = jax.tree_util.tree_map_with_path(change, params)
        return updates, OptimizerState(state.step + 1, muon_state, adamw_state)

    return optax.GradientTransformation(init, update)


def _clipped(grads: dict, config: OptimizerConfig) -> dict:
    """Gradients, all together or each part of the model alone, at a norm of at most clip_norm."""
    clip = optax.clip_by_global_norm(config.clip_norm)
    if config.clip == "global":
        return clip.update(grads, clip.init(grads))[0]
    for part in dict.fromkeys(map(part_of, flat_paths(grads))):
        of_part = _pick(grads, lambda path, part=part: part_of(path) == part)
        grads = _replaced(grads, clip.update(of_part, clip.init(of_part))[0])
    return grads


def _is_indexer(path: str) -> bool:
    return _INDEXER.fullmatch(path) is not None


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


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


def _pick_like(tree: dict, part: dict) -> dict:
    """The leaves of `tree` that `part` has too."""
    return {k: _pick_like(tree[k], v) if isinstance(v, dict) else tree[k] for k, v in part.items()}


def _replaced(tree: dict, part: dict) -> dict:
    """`tree` with the leaves of `part` in place of its own."""
    return tree | {k: _replaced(tree[k], v) if isinstance(v, dict) else v for k, v in part.items()}

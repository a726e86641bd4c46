"""DeepSeek-V4: embed -> layers over M residual streams -> stream head -> logits; MTP beside.

The page to read first. `Transformer(cfg, rngs=nnx.Rngs(0))(tokens)` is the whole forward pass.
Weights are float32 and nothing is fake-quantized unless `v4jax.quantization.quantized` is asked.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from v4jax import parallel
from v4jax.config import ModelConfig
from v4jax.layers.block import Block
from v4jax.layers.context import UNROUNDED, Context, make_context
from v4jax.layers.hyper_connections import StreamHead
from v4jax.layers.mtp import MTP
from v4jax.layers.parameter import Linear, RMSNorm, parameter
from v4jax.layers.router import RouterBias, hash_table


class Output(NamedTuple):
    """What a forward pass returns.

    logits: float32 [B, T, V]; row t predicts token t+1.
    mtp_logits: float32 [B, T-1, V]; row t predicts token t+2. None without MTP.
    aux: {"layers": a tuple with a dict for each layer, "mtp": the MTP block's dict or None}. A
        dict holds `expert_load` [E], `balance_loss` (top-k layers), `disagreement` (the same, with
        routes), `clamped` (with a swiglu_limit), `index_loss` and `index_kept_mass` (CSA layers
        whose rows hold a window) and, where collected, `streams`, `maps`, `expert_ids`, `index`.
    """

    logits: jax.Array
    mtp_logits: jax.Array | None
    aux: dict[str, Any]


class Embedding(nnx.Module):
    """Token embedding [V, D], not scaled."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        shape = (cfg.vocab_size, cfg.hidden_size)
        self.weight = parameter(cfg, rngs, "matrix", shape, ("vocab", "embed"))


class Transformer(nnx.Module):
    """A DeepSeek-V4 language model.

    dtype: what matmuls and residual streams compute in; the parameters are float32 always, and
    so is what the release keeps in float32 (hyper-connection coefficients, norms, routers,
    compressor softmax, attention softmax, index scores, logits).
    token_counts: [V] how often training sees each token, to balance the hash layers over; None
    balances over ids.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jax.typing.DTypeLike = jnp.float32,
        token_counts: np.ndarray | None = None,
        hash_seed: int = 0,
    ):
        self.config, self.dtype = cfg, jnp.dtype(dtype)
        self.index_formats = UNROUNDED
        counts = np.ones(cfg.vocab_size) if token_counts is None else token_counts
        prefix, unit, repeats = cfg.schedule

        def block(layer: int, rngs: nnx.Rngs) -> Block:
            attention, mlp = cfg.layers[layer]
            table = None
            if mlp == "hash_moe":
                table = hash_table(
                    (hash_seed, layer), counts, cfg.n_routed_experts, cfg.num_experts_per_tok
                )
            return Block(cfg, rngs, attention, mlp, table)

        self.embed_tokens = Embedding(cfg, rngs)
        self.layers = nnx.List([block(i, rngs) for i in range(prefix)])
        self.units = nnx.List([_stacked(block, prefix + j, repeats, rngs) for j in range(unit)])
        self.hc_head = StreamHead(cfg, rngs)
        self.norm = RMSNorm(cfg, rngs, cfg.hidden_size)
        self.lm_head = Linear(cfg, rngs, cfg.hidden_size, cfg.vocab_size, ("vocab", "embed"))
        if cfg.num_nextn_predict_layers:
            self.mtp = MTP(cfg, rngs)

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        *,
        dense_index: jax.Array | bool = False,
        collect: bool = False,
        routes: jax.Array | None = None,
    ) -> Output:
        """tokens: int32 [B, T]. segment_ids: int32 [B, T], one id a packed sample, 0 = padding.

        With segment ids nothing crosses a sample's border: the result equals running the samples
        apart. dense_index: CSA attends to every visible entry (the indexer's dense stage).
        collect: keep what analysis reads in aux. A float32 matmul is one on every platform.
        routes: int [R, B, T, K] of `chosen_experts`, the ids that "moe" routers take in place of
        their own choice (report 4.2.3); the weights are the gate's of now. Hash layers ignore
        theirs. Raises ValueError where the shape is another.
        """
        with jax.default_matmul_precision("highest"):
            return self._forward(tokens, segment_ids, dense_index, collect, routes)

    def _forward(self, tokens, segment_ids, dense_index, collect, routes) -> Output:
        check_routes(self.config, tokens, routes)
        ctx = make_context(
            self.config,
            tokens,
            segment_ids,
            index_formats=self.index_formats,
            dense_index=dense_index,
            collect=collect,
        )
        # Cast after the gather: its transpose sums the gradient of a token's row in float32.
        with jax.named_scope("embedding"):
            embedded = parallel.over_rows(
                lambda table, tokens: table[tokens], self.embed_tokens.weight[...], tokens
            ).astype(self.dtype)

        def routed(layer: int) -> Context:
            if routes is None:
                return ctx
            return dataclasses.replace(ctx, routes=routes[layer])

        streams = (embedded,) * self.config.hc_mult
        layers_aux = []
        for i, block in enumerate(self.layers):
            own = routed(i)
            with jax.named_scope(f"layer_{i}"):
                streams, aux = _remat(self.config, lambda s, b=block, c=own: b(s, c))(streams)
            layers_aux.append(aux)
        if self.units:
            streams, stacked = self._scan_units(streams, ctx, routes)
            for i in range(self.config.schedule[2]):
                layers_aux.extend(jax.tree.map(lambda a, i=i: a[i], aux) for aux in stacked)
        with jax.named_scope("head"):
            logits = self._logits(self.norm(self.hc_head(streams)))
        mtp_logits, mtp_aux = None, None
        if self.config.num_nextn_predict_layers:
            last = routed(self.config.num_hidden_layers)
            mtp = _remat(self.config, lambda s: self.mtp(s, embedded, last))
            with jax.named_scope("mtp"):
                x, mtp_aux = mtp(streams)
                with jax.named_scope("head"):
                    mtp_logits = self._logits(x[:, :-1])
        return Output(logits, mtp_logits, {"layers": tuple(layers_aux), "mtp": mtp_aux})

    def _scan_units(self, streams, ctx: Context, routes: jax.Array | None):
        """Runs the unit `repeats` times; aux: for each of its layers a dict of stacked leaves.

        All repeats are traced once, so a scope names a layer's place in the unit.
        """
        graphdef, state = nnx.split(self.units)
        prefix, unit, repeats = self.config.schedule
        if routes is not None:
            routes = routes[prefix : prefix + repeats * unit]
            routes = routes.reshape(repeats, unit, *routes.shape[1:])

        def body(streams, of_repeat):
            state, routes = of_repeat
            aux = []
            blocks: nnx.List[Block] = nnx.merge(graphdef, state)
            for i, block in enumerate(blocks):
                c = ctx if routes is None else dataclasses.replace(ctx, routes=routes[i])
                run = _remat(self.config, lambda s, b=block, c=c: b(s, c), scanned=True)
                with jax.named_scope(f"unit_{i}"):
                    streams, block_aux = run(streams)
                aux.append(block_aux)
            return streams, tuple(aux)

        return jax.lax.scan(body, streams, (state, routes))

    def _logits(self, x: jax.Array) -> jax.Array:
        """float32 [..., V] of x [..., D]: the release keeps the head in float32."""
        return self.lm_head(x.astype(jnp.float32))


def _stacked(block, layer: int, repeats: int, rngs: nnx.Rngs) -> Block:
    """`repeats` blocks like layer `layer`, every leaf with a leading axis."""
    split = nnx.split_rngs(splits=repeats)
    make = nnx.vmap(lambda rngs: block(layer, rngs), in_axes=0, out_axes=0)
    return split(make)(rngs)


def _remat(cfg: ModelConfig, f, scanned: bool = False):
    """Applies the configured rematerialisation policy to a block."""
    if cfg.remat == "none":
        return f
    policy = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "full": jax.checkpoint_policies.nothing_saveable,
    }[cfg.remat]
    return jax.checkpoint(f, policy=policy, prevent_cse=not scanned)


def routed_blocks(cfg: ModelConfig) -> int:
    """R, the blocks that routes are for: the layers, then MTP's."""
    return cfg.num_hidden_layers + cfg.num_nextn_predict_layers


def check_routes(cfg: ModelConfig, tokens: jax.Array, routes: jax.Array | None) -> None:
    """Raises ValueError, one line, where routes are no integers [R, B, T, K] of `tokens` [B, T]."""
    wanted = (routed_blocks(cfg), *tokens.shape, cfg.num_experts_per_tok)
    if routes is None or (routes.shape == wanted and jnp.issubdtype(routes.dtype, jnp.integer)):
        return
    raise ValueError(f"routes: got {routes.dtype} {routes.shape}, allowed: integers {wanted}")


def chosen_experts(
    model: Transformer,
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
    dense_index: jax.Array | bool = False,
) -> jax.Array:
    """int32 [R, B, T, K]: the experts of each token by these parameters, R layers and then MTP.

    What `Transformer`'s `routes` takes. Forward only, to be jitted: the compiler drops whatever no
    choice depends on, such as logits and losses. Rows stay where tokens' rows are on a mesh.
    tokens, segment_ids: int32 [B, T].
    """
    aux = model(tokens, segment_ids, dense_index=dense_index, collect=True).aux
    blocks = [*aux["layers"], *([aux["mtp"]] if aux["mtp"] else [])]
    return jnp.stack([jax.lax.stop_gradient(block["expert_ids"]) for block in blocks])


def abstract_model(cfg: ModelConfig) -> Transformer:
    """The model with shapes in place of arrays: no memory, seconds even for `pro`."""
    counts = np.ones(cfg.vocab_size)
    return nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0), token_counts=counts))


PARTS = (  # first match wins
    ("MTP module", "mtp/"),
    ("embedding", "embed_tokens/"),
    ("lm_head", "lm_head/"),
    ("indexers", "/indexer/"),
    ("compressors", "/compressor/"),
    ("attention core", "/self_attn/"),
    ("routers", "/gate/"),
    ("routed experts", "/experts/"),
    ("shared experts", "/shared_experts/"),
    ("hyper-connections", "_hc/"),
    ("stream head", "hc_head/"),
    ("layer and final norms", "norm/"),
)


def part_of(path: str) -> str | None:
    """The name in PARTS of the leaf at `path`, joined with "/"; None outside of all."""
    return next((name for name, mark in PARTS if mark in path), None)


def parameter_counts(cfg: ModelConfig) -> dict[str, int]:
    """Parameters of each part and the totals, built abstractly."""
    params, biases, _ = nnx.state(abstract_model(cfg), nnx.Param, RouterBias, ...)
    counts = dict.fromkeys([name for name, _ in PARTS[1:]] + ["MTP module"], 0)
    for state in (params, biases):
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            path = jax.tree_util.keystr(path, simple=True, separator="/")
            part = part_of(path)
            assert part is not None
            # A release stores the selection bias as a parameter; T counts the main layers' out.
            if state is params or part == "MTP module":
                counts[part] += math.prod(leaf.shape)
    mtp = counts.pop("MTP module")
    total = sum(counts.values())
    routed = counts["routed experts"]
    active = total - routed + routed * cfg.num_experts_per_tok // cfg.n_routed_experts
    return counts | {
        "total without MTP": total,
        "active": active,
        "active without the embedding table": active - counts["embedding"],
        "MTP module": mtp,
        "total with MTP": total + mtp,
    }

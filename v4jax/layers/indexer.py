"""The lightning indexer: which compressed entries a query attends to (report 2.3.1, eqs. 13-16).

    q^I = rope(q_latent q_b_proj.T)                     no norm; I heads of J channels
    k   = entries of the indexer's own compressor, width J
    w   = x weights_proj.T * I^-1/2                     may be negative
    score[t, c] = sum_i w[t, i] relu(q^I[t, i] . k[c]) * J^-1/2
    keep the K best visible entries, lowest index first among equals (-0 equals +0)

Asked to, q^I and k are rotated by a Hadamard matrix and rounded to FP4 (report 5.2.1 and the
released code: the rotation spreads outliers over the blocks and leaves q.k unchanged), and scores
to BF16. No gradient of the language-model loss passes the selection; the indexer learns from
`index_loss`, whose teacher is the attention that its layer really computes.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

import kernels_pallas
from v4jax import parallel
from v4jax.config import CSA, ModelConfig
from v4jax.layers import rope
from v4jax.layers.compressor import Compressor
from v4jax.layers.context import Context, IndexFormats
from v4jax.layers.parameter import Linear
from v4jax.layers.sparse_attention import in_pieces, take_entries
from v4jax.numerics import fake_quantize, hadamard

Operands = tuple[jax.Array, jax.Array, jax.Array]
MASKED = -1e30  # finite: with -inf, p * log(q) would be NaN where p is 0


class Indexer(Compressor):
    """The keys' compressor (it is one, of width J) with the queries and head weights."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        heads, width = cfg.index_n_heads, cfg.index_head_dim
        rate = cfg.compress_rates.compressed_sparse_attention
        super().__init__(cfg, rngs, rate, width, overlap=True, axis="index")
        self.q_b_proj = Linear(cfg, rngs, cfg.q_lora_rank, heads * width, ("index", "rank"))
        self.weights_proj = Linear(cfg, rngs, cfg.hidden_size, heads, ("index", "embed"))
        self.heads = heads

    @jax.named_scope("indexer")
    def operands(self, x: jax.Array, q_latent: jax.Array, ctx: Context) -> Operands:
        """x [B, T, D], q_latent [B, T, R] -> q [B, T, I, J], k [B, C, J], w float32 [B, T, I].

        Both inputs are detached here: nothing of the indexer trains the main model.
        """
        x, q_latent = jax.lax.stop_gradient((x, q_latent))
        cos, sin = ctx.rotary[CSA]
        q = self.q_b_proj(q_latent).reshape(*x.shape[:2], self.heads, self.width)
        q = rope.rotate(q, (cos[:, :, None], sin[:, :, None]))
        k = self.entries(x, ctx.windows[CSA], ctx.entry_rotary[CSA])
        w = self.weights_proj(x).astype(jnp.float32) * self.heads**-0.5
        return q, k, w


@jax.named_scope("indexer")
def scores(operands: Operands, ctx: Context) -> jax.Array:
    """Scores float32 [B, T, C] of every entry, -inf where it is not visible; see the module."""
    q, k, w, fmt = _rotated(operands, ctx.index_formats)
    of_rows = functools.partial(
        kernels_pallas.index_scores, ratio=ctx.windows[CSA].rate, qk_format=fmt
    )
    found = parallel.over_rows(
        lambda _, q, k, w, ids: of_rows(q, k, w, segment_ids=ids), None, q, k, w, ctx.segment_ids
    )
    return _rounded(found, ctx.index_formats)


@jax.named_scope("selection")
def select(operands: Operands, ctx: Context, top_k: int) -> jax.Array:
    """int32 [B, T, K]: the top_k best visible entries, ascending, then -1 where fewer are visible.

    The lowest of equal scores are taken; -0 and +0 are equal. No gradient.
    """
    q, k, w, fmt = _rotated(operands, ctx.index_formats)
    of_rows = functools.partial(
        kernels_pallas.index_select,
        top_k=top_k,
        ratio=ctx.windows[CSA].rate,
        qk_format=fmt,
        score_dtype=jnp.bfloat16 if ctx.index_formats.scores == "bf16" else jnp.float32,
        output="ascending",
    )
    return parallel.over_rows(
        lambda _, q, k, w, ids: of_rows(q, k, w, segment_ids=ids), None, q, k, w, ctx.segment_ids
    )


@jax.named_scope("indexer")
def scores_at(index: jax.Array, operands: Operands, ctx: Context) -> jax.Array:
    """Scores float32 [B, T, K] of the entries `index` int32 [B, T, K]; -1 reads the first."""
    q, k, w, fmt = _rotated(operands, ctx.index_formats)
    if fmt is not None:
        q, k = fake_quantize(q, fmt), fake_quantize(k, fmt)
    keys = k.astype(jnp.float32)  # so that their gradient adds up in it

    def of_piece(piece):
        q, w, index = piece
        found = take_entries(keys, index).astype(q.dtype)
        products = jnp.einsum("BTIJ,BTKJ->BTIK", q, found, preferred_element_type=jnp.float32)
        return jnp.einsum("BTIK,BTI->BTK", jax.nn.relu(products), w)

    batch, _, heads, width = q.shape
    numbers = batch * (index.shape[-1] * (width + heads) + heads * width)
    return _rounded(in_pieces(of_piece, (q, w, index), numbers), ctx.index_formats)


def _rounded(scores: jax.Array, formats: IndexFormats) -> jax.Array:
    """Float32 scores as they are compared, straight-through."""
    if formats.scores != "bf16":
        return scores
    # Not a cast there and back, which a compiler may drop; and no gradient in BF16.
    rounded = jax.lax.reduce_precision(scores, exponent_bits=8, mantissa_bits=7)
    change = jnp.where(scores > -jnp.inf, rounded - scores, 0.0)
    return scores + jax.lax.stop_gradient(change)  # exact: the change is a few bits of scores


@jax.named_scope("quantization")
def _rotated(operands: Operands, formats: IndexFormats):
    """(q, k, w * J^-1/2, format that q and k are yet to be rounded to, or None)."""
    q, k, w = operands
    w = w * q.shape[-1] ** -0.5
    if any(f is not None and f.rotated for f in (formats.query, formats.key)):
        q, k = hadamard(q), hadamard(k)  # both, or their products would be of two bases
    if formats.query == formats.key:
        return q, k, w, formats.query
    q, k = (
        x if f is None else fake_quantize(x, f) for x, f in ((q, formats.query), (k, formats.key))
    )
    return q, k, w, None


@jax.named_scope("index_loss")
def index_loss(scores: jax.Array, mass: jax.Array, among: jax.Array, valid: jax.Array) -> jax.Array:
    """KL of the indexer from the attention it serves (training from V3.2, in V4's form). Scalar.

        p[t, c] = mass[t, c] / sum over `among`;  q = softmax of scores over `among`
        mean over valid t with an entry of  sum_c p (log p - log q)

    scores [B, T, C] float32. mass [B, T, C]: probability that the layer's heads together give to
    each entry, out of the joint softmax over window, entries and sink; detached here. among
    bool [B, T, C]: the entries attended to. valid bool [B, T]: false on padding.
    """
    mass = jnp.where(among, jax.lax.stop_gradient(mass), 0.0)
    total = jnp.sum(mass, axis=-1, keepdims=True)
    counted = valid[..., None] & (total > 0)
    p = mass / jnp.where(total > 0, total, 1.0)
    log_q = jax.nn.log_softmax(jnp.where(among, scores, MASKED), axis=-1)
    log_p = jnp.log(jnp.where(p > 0, p, 1.0))
    kl = jnp.where(among & counted, p * (log_p - log_q), 0.0)
    return jnp.sum(kl) / jnp.maximum(jnp.sum(counted), 1)

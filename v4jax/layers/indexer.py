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

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax.config import CSA, ModelConfig
from v4jax.layers import rope
from v4jax.layers.compressor import Compressor
from v4jax.layers.context import UNROUNDED, Context, IndexFormats
from v4jax.layers.parameter import Linear
from v4jax.numerics import Format, fake_quantize, hadamard

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


def index_scores(operands: Operands, formats: IndexFormats = UNROUNDED) -> jax.Array:
    """Scores float32 [B, T, C] of q [B, T, I, J], k [B, C, J], w [B, T, I]; see the module."""
    q, k, w = operands
    q, k = _round_operand(q, formats.query), _round_operand(k, formats.key)
    products = jnp.einsum("BTIJ,BCJ->BTIC", q, k, preferred_element_type=jnp.float32)
    scores = jnp.einsum("BTIC,BTI->BTC", jax.nn.relu(products), w) * q.shape[-1] ** -0.5
    if formats.scores == "bf16":
        # Not a cast there and back, which a compiler may drop; and straight-through.
        rounded = jax.lax.reduce_precision(scores, exponent_bits=8, mantissa_bits=7)
        scores = jax.lax.stop_gradient(rounded) + (scores - jax.lax.stop_gradient(scores))
    return scores


def _round_operand(x: jax.Array, fmt: Format | None) -> jax.Array:
    return x if fmt is None else fake_quantize(hadamard(x), fmt)


def select(scores: jax.Array, visible: jax.Array, top_k: int) -> jax.Array:
    """bool [B, T, C]: the top_k best visible entries, lowest index first among equal scores.

    scores: float32 [B, T, C]. -0 and +0 are equal. Fewer than top_k where fewer are visible.
    """
    if top_k >= scores.shape[-1]:
        return visible
    scores = jax.lax.stop_gradient(
        jnp.where(visible, jnp.where(scores == 0, 0.0, scores), -jnp.inf)
    )
    threshold = jax.lax.top_k(scores, top_k)[0][..., -1:]
    above, equal = scores > threshold, visible & (scores == threshold)
    room = top_k - jnp.sum(above, axis=-1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=-1) <= room))


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

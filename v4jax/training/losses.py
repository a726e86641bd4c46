"""What is minimised: cross-entropies, balance, the indexer's KL, and options beside them.

    CE + mtp_weight CE_mtp + balance sum L_bal + index sum KL_index + z_loss mean (log Z)^2

With `distill` the student's CE is mixed with the KL from its frozen parent, over the whole
vocabulary (report 5.1.2 does so after pre-training, from many teachers and on its own samples;
here it is an arm of QAT): (1 - distill) CE + distill KL(parent || student).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from v4jax.model import Output
from v4jax.training.data import predicted


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights of the losses beside the cross-entropy (report 4.2.2).

    balance: sequence-wise balance loss. index: the indexer's KL, per CSA layer; 0 freezes the
    indexer. bias_speed: step of the routers' selection bias, outside the gradient. z_loss: of the
    squared logarithm of the softmax's denominator (PaLM's 1e-4; the report has none). distill:
    share of the parent's KL in the cross-entropy of QAT arms, 0 to 1.
    """

    balance: float = 1e-4
    index: float = 1.0
    bias_speed: float = 0.001
    z_loss: float = 0.0
    distill: float = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"Objective.{field.name}: got {value!r}, allowed: a number >= 0")
        if self.distill > 1:
            raise ValueError(f"Objective.distill: got {self.distill!r}, allowed: 0 to 1")


@jax.named_scope("losses")
def losses(
    out: Output, tokens: jax.Array, segment_ids: jax.Array, parent: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Scalars `loss` (nats a token), `mtp_loss`, `balance_loss`, `index_loss`, `z_loss`, and
    `distill_loss` (nats a token) where the parent's logits [B, T, V] are given.

    tokens, segment_ids: int32 [B, T+1]; out is the model's on tokens[:, :-1]. The MTP loss is
    summed over its targets and divided by the main loss's count, as V3 divides by the length.
    """
    counted = predicted(segment_ids)
    count = jnp.maximum(jnp.sum(counted), 1)
    nll = optax.softmax_cross_entropy_with_integer_labels(out.logits, tokens[:, 1:])
    found = {"loss": jnp.sum(nll * counted) / count}
    log_z = jax.nn.logsumexp(out.logits, axis=-1)
    found["z_loss"] = jnp.sum(jnp.square(log_z) * counted) / count
    if parent is not None:
        found["distill_loss"] = jnp.sum(divergence(parent, out.logits) * counted) / count
    if out.mtp_logits is not None:
        both = counted[:, 1:] & counted[:, :-1]
        nll = optax.softmax_cross_entropy_with_integer_labels(out.mtp_logits, tokens[:, 2:])
        found["mtp_loss"] = jnp.sum(nll * both) / count
    blocks = [*out.aux["layers"], *([out.aux["mtp"]] if out.aux["mtp"] else [])]
    for name in ("balance_loss", "index_loss"):
        found[name] = sum((b[name] for b in blocks if name in b), jnp.zeros(()))
    return found


def divergence(parent: jax.Array, student: jax.Array) -> jax.Array:
    """KL(parent || student) of logits [..., V]: float32 [...], nats. The parent has no gradient."""
    parent = jax.lax.stop_gradient(parent)
    log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (parent, student))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

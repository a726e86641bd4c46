"""Compressed entries: one for every window of tokens (report 2.3.1 CSA, 2.3.2 HCA).

    K = x kv_proj.T, Z = x gate_proj.T + position_bias[slot in the window]
    HCA: e_w = sum_j softmax_j(Z[w m' + j]) * K[w m' + j]      per channel, over the m' slots
    CSA: projections are twice as wide. Channels of the first half are a token's contribution to
         the NEXT window's entry, those of the second half to its OWN: the softmax runs over 2m
         slots, m of window w-1 (first half; absent for a sample's first window) and m of w.
    e_w <- rope(rmsnorm(e_w) * kv_norm, position of the window's first token)

Projections, softmax and sum in float32. Names: the report's C^a is the current window's series,
C^b the previous one's; transformers' docstrings swap the letters. Departures: none.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax.config import ModelConfig
from v4jax.layers import rope
from v4jax.layers.parameter import Linear, RMSNorm, parameter
from v4jax.layers.windows import Windows


class Compressor(nnx.Module):
    """Turns windows of tokens into entries of `width` channels; `overlap` is CSA's form."""

    def __init__(
        self, cfg: ModelConfig, rngs: nnx.Rngs, rate: int, width: int, overlap: bool, axis: str
    ):
        out = (1 + overlap) * width
        self.kv_proj = Linear(cfg, rngs, cfg.hidden_size, out, (axis, "embed"))
        self.gate_proj = Linear(cfg, rngs, cfg.hidden_size, out, (axis, "embed"))
        self.position_bias = parameter(cfg, rngs, "zero", (rate, out), (None, axis))
        self.kv_norm = RMSNorm(cfg, rngs, width)
        self.width, self.overlap = width, overlap

    @jax.named_scope("compressor")
    def entries(self, x: jax.Array, windows: Windows, rotary) -> jax.Array:
        """x [B, T, D] -> [B, C, width] in x's dtype, normed and rotated.

        rotary: (cos, sin) [B, C, r/2] at each window's first token.
        """
        x32 = x.astype(jnp.float32)
        kv = windows.split(self.kv_proj(x32))  # [B C m width or 2 width]
        gate = windows.split(self.gate_proj(x32)) + self.position_bias[...]
        if self.overlap:
            kv = self._with_previous(kv, 0.0, windows)
            gate = self._with_previous(gate, -jnp.inf, windows)
        entries = jnp.sum(jax.nn.softmax(gate, axis=2) * kv, axis=2).astype(x.dtype)
        return rope.rotate(self.kv_norm(entries), rotary)

    def _with_previous(self, x: jax.Array, absent: float, windows: Windows) -> jax.Array:
        """[B, C, m, 2 width] -> [B, C, 2m, width]: previous window's first half, own second."""
        previous = jnp.roll(x[..., : self.width], 1, axis=1)
        previous = jnp.where(windows.first[..., None, None], absent, previous)
        return jnp.concatenate([previous, x[..., self.width :]], axis=2)

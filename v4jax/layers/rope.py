"""Partial rotary embedding with adjacent pairs, two thetas, and YaRN (report 2.3.3).

The last r = qk_rope_head_dim of a head turn; pair i is channels (H-r+2i, H-r+2i+1), by the angle
position * f_i with f_i = theta^(-2i/r). Sliding layers use `rope_theta`, plain; CSA and HCA
layers use `compress_rope_theta`, with YaRN where configured, for everything they rotate. There
is no mscale: neither cos and sin nor the softmax scale are multiplied.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.config import ModelConfig


def _plain(theta: float, r: int) -> np.ndarray:
    return theta ** (-np.arange(0, r, 2, dtype=np.float64) / r)


def main_frequencies(cfg: ModelConfig) -> np.ndarray:
    """Frequencies of the sliding layers, float32 [r/2]."""
    return _plain(cfg.rope_theta, cfg.qk_rope_head_dim).astype(np.float32)


def compress_frequencies(cfg: ModelConfig) -> np.ndarray:
    """Frequencies of the CSA and HCA layers, float32 [r/2]."""
    r, theta, yarn = cfg.qk_rope_head_dim, cfg.compress_rope_theta, cfg.rope_scaling
    frequencies = _plain(theta, r)
    if yarn is not None:

        def dim(beta):  # the (fractional) pair that turns beta times over the original length
            turns = yarn.original_max_position_embeddings / (2 * math.pi * beta)
            return r * math.log(turns) / (2 * math.log(theta))

        low = max(math.floor(dim(yarn.beta_fast)), 0)
        high = min(math.ceil(dim(yarn.beta_slow)), r - 1)
        high = high + 0.001 if low == high else high
        ramp = np.clip((np.arange(r // 2) - low) / (high - low), 0, 1)
        frequencies = frequencies * (1 - ramp) + frequencies / yarn.factor * ramp
    return frequencies.astype(np.float32)


def table(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), float32 [..., r/2], of integer positions [...]."""
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array], inverse: bool = False) -> jax.Array:
    """Rotates the last r channels of x [..., H] in float32; cos, sin broadcast to [..., r/2].

    `inverse` turns by the negative angle: attention's output is turned back by the query's.
    """
    cos, sin = rotary
    return _rotate(x, cos, -sin if inverse else sin)


@jax.custom_vjp
def _rotate(x, cos, sin):
    r = 2 * cos.shape[-1]
    pairs = x[..., -r:].astype(jnp.float32).reshape(*x.shape[:-1], r // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    turned = turned.reshape(*x.shape[:-1], r).astype(x.dtype)
    return jnp.concatenate([x[..., :-r], turned], axis=-1)


def _rotate_backward(rotary, g):
    """A rotation's transpose is its inverse; the tables, made of positions, have no gradient."""
    cos, sin = rotary
    g = jax.lax.optimization_barrier(g)
    return _rotate(g, cos, -sin), jnp.zeros_like(cos), jnp.zeros_like(sin)


_rotate.defvjp(lambda x, cos, sin: (_rotate(x, cos, sin), (cos, sin)), _rotate_backward)

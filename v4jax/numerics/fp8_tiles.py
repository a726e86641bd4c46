"""How much of an FP4 weight the FP8 path represents without loss (report 5.2.1).

Let a tile of 128 x 128 have the FP8 scale S = 2^-6 * (its largest FP4 scale). Then an element of
the tile is, in E4M3, its E2M1 value times its FP4 scale / S. Every E2M1 value times 2^k is an E4M3
value for k in [-8, 6], so a tile is lossless if its scales span at most 2^14 (and beyond that, only
if the elements happen to be large). Blocks of zeros have no say: their scale is arbitrary.

FP8_128X128 finds such an S by itself, unless the tile's maximum is below 448 * 2^-23 (5.3e-5),
where its floor of 1e-4 makes S larger.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from v4jax.numerics import blocks
from v4jax.numerics.formats import E2M1, E8M0, FP8_128X128
from v4jax.numerics.storage import Quantized

LOSSLESS_SPREAD = 14  # log2 of the largest ratio of scales within a lossless tile


class Fp8Tiles(NamedTuple):
    """share: float32, tiles without loss / all tiles. max_spread: int32, log2 of a tile's largest
    ratio of scales, over all tiles; 255 where a block holds NaN."""

    share: Array
    max_spread: Array


def fp8_tiles(q: Quantized) -> Fp8Tiles:
    """Losslessness of FP4 weights [..., out, in] with E8M0 scales as FP8 in tiles of 128 x 128.

    Tiles at the edges may be short. Needs the values, not only the scales: a block of zeros has
    scale code 1, but so has a block whose values are tiny, and other writers use other codes.
    """
    rows, columns = FP8_128X128.block
    fmt = q.format
    if (fmt.element, fmt.scale) != (E2M1, E8M0) or fmt.block[0] != 1 or columns % fmt.block[1]:
        raise ValueError(f"fp8_tiles: {fmt.name} is not E2M1 with E8M0 scales in rows of a tile")
    code = lax.bitcast_convert_type(q.scales, jnp.uint8).astype(jnp.int32)
    nonzero = jnp.any(blocks.split(q.values.astype(jnp.float32) != 0, fmt.tile), axis=-1)
    nan = code == 255
    tile = (rows, columns // fmt.block[1])
    inner = blocks.inner_axes(tile)
    # Padding is zero in both, so it counts as a block of zeros.
    high = jnp.max(blocks.split(jnp.where(nonzero, code, 0), tile), axis=inner)
    low = 255 - jnp.max(blocks.split(jnp.where(nonzero, 255 - code, 0), tile), axis=inner)
    spread = jnp.maximum(high - low, 0)
    spread = jnp.where(jnp.any(blocks.split(nan, tile), axis=inner), 255, spread)
    return Fp8Tiles(jnp.mean(spread <= LOSSLESS_SPREAD, dtype=jnp.float32), jnp.max(spread))

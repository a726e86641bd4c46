"""Block-scaled number formats: records, quantization, packing, the Hadamard rotation.

Knows jax and ml_dtypes, not Flax. Every function is pure, and works under jit, vmap, grad and scan.
"""

from v4jax.numerics.formats import (
    FORMATS,
    FP8_1X128,
    FP8_128X128,
    MXFP4,
    MXFP4_EVEN,
    MXFP4_FLOOR,
    NVFP4,
    Format,
    format_named,
    is_mxfp4,
)
from v4jax.numerics.fp8_tiles import Fp8Tiles, fp8_tiles
from v4jax.numerics.hadamard import hadamard
from v4jax.numerics.quantize import (
    dequantize,
    fake_quantize,
    quantize,
    quantize_stochastically,
    quantize_toward,
    take_apart,
)
from v4jax.numerics.scales import PowerOfTwo, TwoLevel
from v4jax.numerics.storage import Packed, Quantized, bytes_of, pack, unpack

__all__ = [
    "FORMATS",
    "FP8_128X128",
    "FP8_1X128",
    "MXFP4",
    "MXFP4_EVEN",
    "MXFP4_FLOOR",
    "NVFP4",
    "Format",
    "Fp8Tiles",
    "Packed",
    "PowerOfTwo",
    "Quantized",
    "TwoLevel",
    "bytes_of",
    "dequantize",
    "fake_quantize",
    "format_named",
    "fp8_tiles",
    "hadamard",
    "is_mxfp4",
    "pack",
    "quantize",
    "quantize_stochastically",
    "quantize_toward",
    "take_apart",
    "unpack",
]

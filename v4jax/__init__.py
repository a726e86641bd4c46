"""v4jax: a scaled-down, faithful DeepSeek-V4 in JAX, and its switch from BF16 to FP4.

This file is only a table of names. Each is imported when it is first asked for, so that
`import v4jax` costs nothing and touches no device.
"""

import importlib

_NAMES = {
    "ModelConfig": "v4jax.config",
    "Transformer": "v4jax.model",
    "load_hf": "v4jax.interop",
    "load_run": "v4jax.training.run",
    "pack_experts": "v4jax.packing",
}
_MODULES = ("config", "interop", "model", "numerics", "parallel", "presets", "quantization")

__all__ = [*_NAMES, *_MODULES]


def __getattr__(name: str):
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"v4jax.{name}")
    raise AttributeError(f"module 'v4jax' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return __all__

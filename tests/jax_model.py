"""Our model built from the reference's configs and parameters, and jit for tests."""

from __future__ import annotations

import re
from types import SimpleNamespace

import jax
import numpy as np
from flax import nnx

from v4jax.config import CompressRates, ModelConfig, RopeScaling
from v4jax.interop import load_state_dict, state_dict
from v4jax.model import Transformer, abstract_model

# Compiling is nearly all that a test of a small model costs. These take a half to a quarter of
# the time and make slower code. JAX before 0.11 generates the code of fused loops by a way that is
# slower still, unless told not to.
QUICK_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
} | ({"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {})


def quick_jit(function, **options):
    """jax.jit that compiles by QUICK_COMPILE."""
    return jax.jit(function, compiler_options=QUICK_COMPILE, **options)


def model_config(cfg: SimpleNamespace, **changes) -> ModelConfig:
    """The ModelConfig of a reference config, with fields of ours (scan_layers, ...) set."""
    fields = vars(cfg) | changes
    scaling = fields["rope_scaling"]
    fields["rope_scaling"] = None if scaling is None else RopeScaling(**vars(scaling))
    fields["compress_rates"] = CompressRates(**vars(fields["compress_rates"]))
    return ModelConfig(**fields)


def build(cfg: SimpleNamespace, params: dict[str, np.ndarray], **changes) -> Transformer:
    """The float32 model with the given parameters, named as in tests/reference.py."""
    block = re.compile(rf"model\.layers\.{len(cfg.layer_types)}\.")  # there the MTP block's
    model = abstract_model(model_config(cfg, **changes))
    load_state_dict(model, {block.sub("mtp.0.", name): params[name] for name in params})
    return model


def split(model: Transformer):
    """(graphdef, parameters, the rest): the pieces of a pure function of the parameters."""
    return nnx.split(model, nnx.Param, ...)


def by_reference_name(model: Transformer, params: nnx.State) -> dict[str, np.ndarray]:
    """A tree like the model's parameters, gradients for example, by the reference's names.

    The MTP block is left out, as are biases and tables.
    """
    graphdef, _, rest = split(model)
    flat = state_dict(nnx.merge(graphdef, params, rest))
    buffers = ("e_score_correction_bias", "tid2eid")
    return {n: v for n, v in flat.items() if not n.startswith("mtp.") and not n.endswith(buffers)}

"""A model whose routed experts are held in MXFP4, four and a quarter bits a weight, and run so.

    packed = v4jax.pack_experts(model)

On a CPU the bytes are those of a checkpoint (`numerics.Packed`), elsewhere those that the kernels
read (`kernels_pallas.planar.Planar`). The forward pass equals that of
`quantization.quantized(model, EXPERTS)`, bit for bit on the same implementation of `expert_matmul`:
both multiply by the same numbers in the same order.
"""

import functools

import jax
from flax import nnx

from kernels_pallas.dispatch import platform
from kernels_pallas.planar import to_planar
from v4jax.layers.experts import Experts, PackedWeight
from v4jax.model import Transformer
from v4jax.numerics import MXFP4, pack, quantize


def pack_experts(model: Transformer) -> Transformer:
    """A copy of `model` with its routed experts in packed MXFP4, MTP's too; the original is as it
    was, and shares every other array with the copy. Experts that are packed already stay so.

    For inference: packed weights get no gradient. Raises ValueError, one line, for an expert whose
    width MXFP4 cannot hold, naming it.
    """
    copy = nnx.merge(*nnx.split(model))
    for path, module in nnx.iter_modules(copy):
        if not isinstance(module, Experts):
            continue
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(module, name)
            if isinstance(weight, PackedWeight):
                continue
            try:
                packed = _packed(weight.get_value(), planar=platform() != "cpu")
            except ValueError as error:
                where = "/".join(map(str, (*path, name)))
                raise ValueError(f"pack_experts: {where}: {error}") from None
            setattr(module, name, PackedWeight(packed))
    return copy


def expert_arrays(model: Transformer) -> list[jax.Array]:
    """The arrays that hold the routed experts' weights, packed or not."""
    experts = [module for _, module in nnx.iter_modules(model) if isinstance(module, Experts)]
    return jax.tree.leaves([nnx.state(module) for module in experts])


@functools.partial(jax.jit, static_argnames="planar")
def _packed(w: jax.Array, planar: bool):
    """[..., E, N, K] in bytes."""
    packed = pack(quantize(w, MXFP4))
    return to_planar(packed) if planar else packed

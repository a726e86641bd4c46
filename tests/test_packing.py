"""A model with packed experts: the forward pass of the fake-quantized one, in the bytes of FP4."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import v4jax
from kernels_pallas.dispatch import compiling_for
from kernels_pallas.planar import Planar
from tests.jax_model import quick_jit
from tests.training import tiny
from v4jax.config import CSA, HCA, SLIDING
from v4jax.inference.generate import generate
from v4jax.interop import state_dict
from v4jax.layers.experts import PackedWeight
from v4jax.model import Transformer
from v4jax.numerics import Packed, bytes_of
from v4jax.packing import expert_arrays, pack_experts
from v4jax.quantization import PAPER, PARTS, Quantization, quantized

pytestmark = pytest.mark.slow

EXPERTS = Quantization((PARTS["routed experts"],))
CONFIGS = {
    "unrolled": tiny.model(),
    "scanned": tiny.model(
        layer_types=(SLIDING, *(CSA, HCA) * 2),
        mlp_layer_types=("hash_moe", *("moe",) * 4),
        scan_layers=True,
    ),
}


def forward(model, tokens):
    out = model(tokens)
    return out.logits, out.mtp_logits


FORWARD = jax.jit(forward)  # quick_jit's programs differ in the last bit with what surrounds a loop


@pytest.fixture(scope="module", params=[*CONFIGS])
def model(request):
    return built(CONFIGS[request.param])


def built(config, **options):
    make = quick_jit(lambda: nnx.state(Transformer(config, rngs=nnx.Rngs(0), **options)))
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), **options))
    nnx.update(model, make())
    return model


def text(rows=2, length=24):
    return np.random.default_rng(0).integers(0, 257, (rows, length)).astype(np.int32)


def test_the_forward_pass_is_that_of_fake_quantized_experts(model):
    """Bit for bit, MTP's logits too: the same numbers, multiplied in the same order."""
    packed = v4jax.pack_experts(model)
    found = FORWARD(packed, text())
    assert tiny.same_bits(found, FORWARD(quantized(model, EXPERTS), text()))
    assert not np.array_equal(found[0], FORWARD(model, text())[0])


def test_the_papers_scope_packs_a_quantized_model(model):
    """Index formats stay; experts already on FP4's grid keep their values."""
    rounded = quantized(model, PAPER)
    packed = pack_experts(rounded)
    assert packed.index_formats == rounded.index_formats
    assert tiny.same_bits(FORWARD(packed, text()), FORWARD(rounded, text()))


def test_no_float_copy_of_an_expert_is_left(model):
    before = nnx.split(model)
    packed = pack_experts(model)
    arrays, floats = expert_arrays(packed), expert_arrays(model)
    assert arrays and all(array.dtype == jnp.uint8 for array in arrays)
    from_formula = sum(bytes_of(w.shape, packed.layers[0].mlp.experts.down_proj.get_value().format)
                       for w in floats)  # fmt: skip
    assert sum(array.nbytes for array in arrays) == from_formula
    size = {name: sum(x.nbytes for x in jax.tree.leaves(nnx.state(m)))
            for name, m in (("float", model), ("packed", packed))}  # fmt: skip
    assert size["float"] - size["packed"] == sum(w.nbytes for w in floats) - from_formula
    after = nnx.split(model)  # the original is as it was, array for array
    assert after[0] == before[0]
    pairs = zip(jax.tree.leaves(after[1]), jax.tree.leaves(before[1]), strict=True)
    assert all(a is b for a, b in pairs)


def test_packing_again_changes_nothing_and_leaves_survive_a_file(model, tmp_path):
    packed = pack_experts(model)
    graphdef, state = nnx.split(packed)
    assert tiny.same_bits(nnx.split(pack_experts(packed))[1], state)
    leaves, structure = jax.tree.flatten(state)
    np.savez(tmp_path / "packed.npz", *map(np.asarray, leaves))
    with np.load(tmp_path / "packed.npz") as file:
        stored = jax.tree.unflatten(structure, [jnp.asarray(file[name]) for name in file.files])
    assert tiny.same_bits(FORWARD(nnx.merge(graphdef, stored), text()), FORWARD(packed, text()))


def test_a_packed_model_generates_what_the_rounded_one_does():
    model = built(CONFIGS["unrolled"])
    prompt = text(1, 9)[0]
    found = generate(pack_experts(model), prompt, 3, length=12)
    assert np.array_equal(found, generate(quantized(model, EXPERTS), prompt, 3, length=12))


def test_bfloat16_models_pack_too():
    model = built(CONFIGS["unrolled"], dtype=jnp.bfloat16)
    found = FORWARD(pack_experts(model), text())
    assert tiny.same_bits(found, FORWARD(quantized(model, EXPERTS), text()))


def test_accelerators_get_planes():
    """Another layout of the same bits; a CPU runs it too."""
    model = built(CONFIGS["unrolled"])
    with compiling_for("gpu"):
        planes = pack_experts(model)
    here = pack_experts(model)
    for packed, kind in ((planes, Planar), (here, Packed)):
        found = nnx.to_flat_state(nnx.state(packed, PackedWeight))
        weights = [variable.get_value() for _, variable in found]
        assert len(weights) == 4 and all(isinstance(w, kind) for w in weights)
    assert tiny.same_bits(FORWARD(planes, text()), FORWARD(here, text()))


def test_what_cannot_be_packed_ends_in_one_line():
    with pytest.raises(
        ValueError, match="^pack_experts: layers/0/mlp/experts/down_proj: mxfp4: "
    ) as e:
        pack_experts(built(tiny.model(moe_intermediate_size=48)))
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="experts are packed: take the model before pack_experts"):
        state_dict(pack_experts(built(CONFIGS["unrolled"])))

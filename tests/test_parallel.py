"""Logical axes: every parameter names its own, and the table maps each without collisions."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from v4jax import parallel, presets
from v4jax.config import CSA, HCA, SLIDING
from v4jax.model import Transformer, abstract_model


def variables(cfg):
    state = nnx.state(abstract_model(cfg), nnx.Param)
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_variable)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in leaves}


@pytest.mark.parametrize("name", ["nano", "small", "pro"])
def test_every_parameter_names_its_axes_and_every_axis_is_mapped(name):
    cfg = presets.PRESETS[name]()
    repeats = cfg.schedule[2]
    for path, variable in variables(cfg).items():
        stacked = path.startswith("units/")
        assert len(variable.logical_axes) == len(variable.shape) - stacked, path
        assert not stacked or variable.shape[0] == repeats, path
        assert len(parallel.partition_spec(variable)) == len(variable.shape), path


def test_every_large_matrix_shards_over_fsdp_and_small_vectors_do_not():
    for path, variable in variables(presets.pro()).items():
        spec = parallel.partition_spec(variable)
        if path.endswith(("_proj", "_proj/weight", "embed_tokens/weight", "lm_head/weight")):
            inner = ("/q_b_proj/", "/o_a_proj/")  # neither their input nor their output is D
            expected = not any(part in path for part in inner)
            assert ("fsdp" in spec) == expected, path
        if path.endswith(("norm/weight", "base", "scale", "sinks")):
            assert spec == PartitionSpec(*[None] * len(variable.shape)), path


def test_unknown_and_colliding_axes_are_refused_in_one_line():
    variable = nnx.Param(np.zeros((4, 4)), logical_axes=("embed", "nonsense"))
    with pytest.raises(ValueError, match="unknown logical axis 'nonsense'"):
        parallel.partition_spec(variable)
    variable = nnx.Param(np.zeros((4, 4)), logical_axes=("embed", "embed"))
    with pytest.raises(ValueError, match="a mesh axis twice"):
        parallel.partition_spec(variable)


def test_a_model_sharded_over_eight_devices_computes_what_one_device_does():
    cfg = dataclasses.replace(
        presets.nano(64),
        hidden_size=32,
        layer_types=(SLIDING, CSA, HCA),
        mlp_layer_types=("hash_moe", "moe", "moe"),
        num_nextn_predict_layers=0,
    )
    make = jax.jit(lambda: nnx.split(Transformer(cfg, rngs=nnx.Rngs(0))))
    graphdef, state = make()
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put(state, parallel.shardings(state, mesh))
    embedding = placed["embed_tokens"]["weight"]
    assert embedding[...].sharding.spec == PartitionSpec(None, "fsdp")
    tokens = np.arange(80, dtype=np.int32).reshape(2, 40) * 7 % 64
    forward = jax.jit(lambda state: nnx.merge(graphdef, state)(tokens).logits)
    np.testing.assert_allclose(forward(placed), forward(state), rtol=2e-5, atol=2e-6)

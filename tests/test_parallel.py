"""The mesh from a text, logical axes, and what follows from them for states and batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tests.jax_model import quick_jit
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


@pytest.mark.slow
def test_a_model_sharded_over_eight_devices_computes_what_one_device_does():
    cfg = dataclasses.replace(
        presets.nano(64),
        hidden_size=32,
        layer_types=(SLIDING, CSA, HCA),
        mlp_layer_types=("hash_moe", "moe", "moe"),
        num_nextn_predict_layers=0,
    )
    make = quick_jit(lambda: nnx.split(Transformer(cfg, rngs=nnx.Rngs(0))))
    graphdef, state = make()
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put(state, parallel.shardings(state, mesh))
    embedding = placed["embed_tokens"]["weight"]
    assert embedding[...].sharding.spec == PartitionSpec(None, "fsdp")
    tokens = np.arange(80, dtype=np.int32).reshape(2, 40) * 7 % 64
    forward = quick_jit(lambda state: nnx.merge(graphdef, state)(tokens).logits)
    np.testing.assert_allclose(forward(placed), forward(state), rtol=2e-5, atol=2e-6)


# ---- the mesh ----


@pytest.mark.parametrize(
    ("text", "shape"),
    [("data=2,fsdp=4", (2, 4)), ("fsdp=8", (1, 8)), (" fsdp = 2 , data=4", (4, 2))],
)
def test_a_mesh_is_what_its_text_says(text, shape):
    mesh = parallel.make_mesh(text)
    assert mesh is not None
    assert mesh.devices.shape == shape and mesh.axis_names == ("data", "fsdp")
    assert parallel.mesh_sizes(parallel.describe(mesh), 8) == dict(mesh.shape)
    assert parallel.share(mesh) == (0, 1)  # one process has all rows


def test_without_a_text_there_is_no_mesh_and_nothing_is_placed():
    batch = (np.arange(4),)
    assert parallel.make_mesh(None) is None and parallel.make_mesh("") is None
    assert parallel.share(None) == (0, 1)
    assert parallel.place_rows(batch, None) is batch
    parallel.check_rows(None, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=2,fsdp=2", "that is 4 devices, allowed: 8"),
        ("model=8", "'model=8', allowed: data and fsdp"),
        ("data=2,data=4", "data is there twice"),
        ("data=0,fsdp=8", "'data=0'"),
        ("data", "'data'"),
        ("data=two", "'data=two'"),
        ("data=8,", "''"),
        ("8", "'8'"),
    ],
)
def test_a_wrong_mesh_ends_in_one_line(text, message):
    with pytest.raises(ValueError) as caught:
        parallel.make_mesh(text)
    assert str(caught.value).startswith(f"--mesh={text}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_batch_that_does_not_spread_ends_in_one_line():
    mesh = parallel.make_mesh("data=2,fsdp=4")
    parallel.check_rows(mesh, 16)
    with pytest.raises(ValueError, match="--batch_size=12: .* a multiple of 8$"):
        parallel.check_rows(mesh, 12)


class Device:
    """Enough of a device for the order of processes."""

    def __init__(self, process_index: int):
        self.process_index = process_index


@pytest.mark.parametrize(
    ("owners", "order"),
    [([0, 0, 1, 1], [0, 1]), ([1, 1, 0, 0], [1, 0]), ([0, 1, 0, 1], None), ([0], [0])],
)
def test_a_process_has_its_rows_in_one_piece(owners, order):
    class Layout:
        devices = np.array([Device(i) for i in owners])

    assert parallel._processes(Layout) == order


# ---- where leaves live ----


def parameters():
    """Two layers' worth of parameters, one path the end of another."""
    matrix = nnx.Param(jnp.zeros((3, 8)), logical_axes=("heads", "embed"))
    return nnx.State(
        {
            "norm": {"weight": nnx.Param(jnp.zeros(8), logical_axes=(None,))},
            "mtp": {"norm": {"weight": matrix}},
        }
    )


def test_optimizer_state_lies_where_its_parameter_does():
    mesh = parallel.make_mesh("data=2,fsdp=4")
    values = {"norm": {"weight": jnp.zeros(8)}, "mtp": {"norm": {"weight": jnp.zeros((3, 8))}}}
    tree = {
        "params": values,
        "momentum": {"of": values},
        "row_means": {"mtp": {"norm": {"weight": jnp.zeros(3)}}},  # as a factored one has
        "step": jnp.zeros((), jnp.int32),
    }
    found = parallel.spread(tree, parameters(), mesh)
    whole, split = PartitionSpec(), PartitionSpec(None, "fsdp")
    for name in ("params", "momentum"):
        part = found[name] if name == "params" else found[name]["of"]
        assert part["mtp"]["norm"]["weight"] == NamedSharding(mesh, split)
        assert part["norm"]["weight"].spec == PartitionSpec(None)
    assert found["row_means"]["mtp"]["norm"]["weight"].spec == whole
    assert found["step"].spec == whole


def test_an_axis_that_does_not_divide_ends_in_one_line():
    state = nnx.State({"w": nnx.Param(jnp.zeros((3, 6)), logical_axes=("heads", "embed"))})
    with pytest.raises(ValueError, match=r"w \[3, 6\] has an axis of 6, which fsdp=4 does not"):
        parallel.spread({}, state, parallel.make_mesh("data=2,fsdp=4"))


# ---- inside programs, and back ----


def test_over_rows_is_the_plain_call_without_a_mesh_and_local_with_one():
    seen = []

    def ranked(scale, x, y):
        seen.append(x.shape)
        return jnp.argsort(x, axis=0) * scale, x + y

    x = jnp.asarray(np.random.default_rng(0).permutation(16).reshape(16, 1))
    parallel.over_rows(ranked, 2, x, x)
    mesh = parallel.make_mesh("data=2,fsdp=4")
    with jax.set_mesh(mesh):
        order, total = jax.jit(lambda x: parallel.over_rows(ranked, 2, x, x))(x)
    with jax.set_mesh(jax.make_mesh((8,), ("other",))):
        parallel.over_rows(ranked, 2, x, x)
    assert seen == [(16, 1), (2, 1), (16, 1)]
    np.testing.assert_array_equal(total, 2 * x)
    local = np.concatenate([np.argsort(x[i : i + 2], axis=0) for i in range(0, 16, 2)])
    np.testing.assert_array_equal(order, 2 * local)


def test_arrays_go_to_the_mesh_and_back():
    mesh = parallel.make_mesh("data=2,fsdp=4")
    x = np.arange(64, dtype=np.float32).reshape(8, 8)
    placed = parallel.place_rows((x,), mesh)[0]
    assert placed.sharding == parallel.rows_sharding(mesh)
    assert placed.addressable_data(0).shape == (1, 8)
    np.testing.assert_array_equal(parallel.to_host(placed), x)
    columns = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    back = parallel.on_one_device({"x": parallel.from_host(x, columns)})["x"]
    assert back.devices() == {jax.local_devices()[0]}
    np.testing.assert_array_equal(back, x)

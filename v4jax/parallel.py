"""Where arrays live: one mesh, and one table from logical axes to mesh axes.

    data    copies of the parameters; each sees other rows of the batch
    fsdp    parts of the parameters and of the optimizer's state; each sees other rows too

`make_mesh("data=2,fsdp=4")` spreads a batch's rows over all eight devices and the parameters over
four. Layers name the logical axes of each parameter once, where they make it
(`layers/parameter.py`), and RULES maps those to mesh axes; what has a parameter's path, such as its
momentum, lies where the parameter does. A program on one device has no mesh, and nothing here
changes it. Expert and context parallelism are not built: they are an axis each in AXES, and a row
of RULES ("experts") or a second entry of the batch's sharding (time).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")
ROWS = ("data", "fsdp")
"""The mesh axes that the rows of a batch are spread over."""

# Logical axis -> mesh axis (None: replicated). Expert and context parallelism add a row each.
RULES: dict[str | None, str | None] = {
    None: None,
    "embed": "fsdp",  # D, on every matrix once: parameters and optimizer state shard over it
    "vocab": None,
    "heads": None,
    "kv": None,
    "rank": None,
    "groups": None,
    "index": None,
    "experts": None,
    "expert_hidden": None,
    "hidden": None,
}


# ---- the mesh ----


def make_mesh(text: str | None) -> Mesh | None:
    """The mesh that `text` describes, "data=2,fsdp=4", over all devices; an axis left out is 1.

    None where there is one device. Without a text: all devices on fsdp where there are several
    processes, else no mesh, which is the first device alone.

    Raises ValueError, one line, for an unknown axis or size, and where the sizes' product is not
    the number of devices.
    """
    devices = jax.device_count()
    if not text:
        if jax.process_count() == 1:
            return None
        text = f"fsdp={devices}"
    sizes = mesh_sizes(text, devices)
    if devices == 1:
        return None
    shape = tuple(sizes.values())
    mesh = jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))
    if _processes(mesh) is None:  # a process's rows would not be one piece of the batch
        ordered = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
        mesh = Mesh(np.array(ordered).reshape(shape), AXES, axis_types=mesh.axis_types)
    return mesh


def mesh_sizes(text: str, devices: int) -> dict[str, int]:
    """Axis -> size, of "data=2,fsdp=4" and the number of devices; errors as `make_mesh`."""
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, equals, size = (piece.strip() for piece in part.partition("="))
        if axis not in sizes or not equals or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"--mesh={text}: {part.strip()!r}, allowed: {' and '.join(AXES)}, each once with "
                "a size of 1 or more, as in data=2,fsdp=4"
            )
        if text.count(f"{axis}=") > 1:
            raise ValueError(f"--mesh={text}: {axis} is there twice, allowed: once")
        sizes[axis] = int(size)
    product = int(np.prod(list(sizes.values())))
    if product != devices:
        raise ValueError(
            f"--mesh={text}: that is {product} devices, allowed: {devices}, as many as there are"
        )
    return sizes


def describe(mesh: Mesh) -> str:
    """ "data=2,fsdp=4" """
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())


def check_rows(mesh: Mesh | None, rows: int) -> None:
    """Raises ValueError, one line, where a batch of `rows` does not spread over the mesh evenly."""
    if mesh is not None and rows % mesh.size:
        raise ValueError(
            f"--batch_size={rows}: rows are spread over the {mesh.size} devices of "
            f"--mesh={describe(mesh)}, allowed: a multiple of {mesh.size}"
        )


def _processes(mesh: Mesh) -> list[int] | None:
    """The processes in the order of their rows; None where one's rows are not together."""
    owners = [device.process_index for device in mesh.devices.flat]
    order = [owner for i, owner in enumerate(owners) if i == 0 or owners[i - 1] != owner]
    return order if len(set(order)) == len(order) else None


def share(mesh: Mesh | None) -> tuple[int, int]:
    """(i, n): this process has the i-th of n equal parts of a batch's rows."""
    order = [0] if mesh is None else _processes(mesh)
    assert order is not None, "make_mesh keeps a process's devices together"
    return (order.index(jax.process_index()) if len(order) > 1 else 0), len(order)


# ---- where leaves live ----


def partition_spec(variable: nnx.Variable, rules=RULES) -> PartitionSpec:
    """The mesh axes of a parameter; a stacked one has a leading, replicated layer axis. Packed
    experts, which are several arrays, are replicated.

    Raises ValueError for a logical axis that the table does not name, and for a mesh axis used
    twice in one parameter.
    """
    rank = len(getattr(variable, "shape", ()))
    axes = getattr(variable, "logical_axes", (None,) * rank)
    axes = (None,) * (rank - len(axes)) + tuple(axes)
    for axis in axes:
        if axis not in rules:
            raise ValueError(f"parallel.RULES: unknown logical axis {axis!r} in {axes}")
    mesh_axes = [rules[axis] for axis in axes]
    used = [axis for axis in mesh_axes if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"parallel.RULES: {axes} maps to {mesh_axes}: a mesh axis twice")
    return PartitionSpec(*mesh_axes)


def shardings(state: nnx.State, mesh: Mesh, rules=RULES) -> nnx.State:
    """NamedShardings of a model's state, leaf by leaf."""
    return jax.tree.map(
        lambda v: NamedSharding(mesh, partition_spec(v, rules)),
        state,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def spread(tree: Any, parameters: nnx.State, mesh: Mesh, rules=RULES) -> Any:
    """NamedShardings of `tree`, leaf by leaf: parameters, and an optimizer's state over them.

    A leaf whose path ends in a parameter's path, and that has its shape, lies as the parameter
    does; every other leaf is replicated.

    tree: arrays or shapes. parameters: a model's `nnx.Param` state, abstract or not.
    Raises ValueError, one line, where an axis does not divide, and as `partition_spec`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(
        parameters, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    known = {_name(path): (tuple(v.shape), partition_spec(v, rules)) for path, v in leaves}
    for name, (shape, spec) in known.items():
        for size, axis in zip(shape, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise ValueError(
                    f"--mesh={describe(mesh)}: {name} {list(shape)} has an axis of {size}, which "
                    f"{axis}={mesh.shape[axis]} does not divide"
                )

    def sharding(path, leaf):
        parts = _name(path).split("/")
        for i in range(len(parts)):  # the longest path first
            found = known.get("/".join(parts[i:]))
            if found is not None:
                shape, spec = found
                return NamedSharding(mesh, spec if shape == leaf.shape else PartitionSpec())
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch: its rows, the leading axis, over all devices."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def place_rows(tree: Any, mesh: Mesh | None) -> Any:
    """A batch of which each process has its own rows (see `share`), on the mesh's devices."""
    if mesh is None:
        return tree
    place = functools.partial(jax.make_array_from_process_local_data, rows_sharding(mesh))
    return jax.tree.map(place, tree)


# ---- inside programs ----


def over_rows(f: Callable[..., Any], shared: Any, *arrays: jax.Array | None) -> Any:
    """f(shared, *arrays), by each device on its own rows of `arrays`, their leading axis; None
    stays None.

    For what the compiler would otherwise gather all rows for: sorts, loops and kernels. Outside
    `jax.set_mesh`, or on a mesh without the batch's axes, the plain call. The results have the
    rows as their leading axis too.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in ROWS if axis in mesh.axis_names and axis not in mesh.manual_axes)
    if not axes:
        return f(shared, *arrays)
    rows = PartitionSpec(axes)
    specs = (PartitionSpec(), *(rows for _ in arrays))
    return jax.shard_map(f, in_specs=specs, out_specs=rows, axis_names=set(axes))(shared, *arrays)


# ---- back to the host ----


def to_host(x: jax.Array) -> np.ndarray:
    """A copy of all of `x` in host memory, wherever its parts are.

    Every process must call it, in the same order, where the array is spread over processes: each
    of their devices then holds all of `x` for a moment.
    """
    if x.is_fully_addressable:
        return np.array(x)
    if not x.is_fully_replicated:
        assert isinstance(x.sharding, NamedSharding)
        x = _gather(x.sharding.mesh)(x)
    return np.array(x.addressable_data(0))


@functools.cache
def _gather(mesh: Mesh):
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def from_host(x: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """`x`, which every process has, where `sharding` says (None: on the first device)."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def on_one_device(tree: Any) -> Any:
    """The whole tree on this process's first device; see `to_host` for several processes."""
    return jax.tree.map(lambda x: jax.device_put(to_host(x), jax.local_devices()[0]), tree)

"""Where parameters live: one mesh description and one table from logical to mesh axes.

Layers name the logical axes of each parameter once, where they make it (`layers/parameter.py`).
"""

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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

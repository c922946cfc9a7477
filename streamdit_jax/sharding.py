"""Meshes, and the one table from logical axis names to mesh axes. No other file knows what a PartitionSpec is.

Models do not know how they are sharded. A parameter's *path* (`params/dit/blocks/attention/query/kernel`) is matched
against `RULES`, which name the logical axis of each of its dimensions counted from the last; `TABLE` says along which
mesh axes a logical axis is cut. The same rules fit a parameter, its average, and Adam's moments of it, because their
paths end alike.

Mesh axes: `data` (batch only), `fsdp` (batch, and parameters cut along their `embed` side), `tensor` (heads and the
wide side of FFNs).
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from streamdit_jax.errors import ConfigError

MESH_AXES = ("data", "fsdp", "tensor")

TABLE: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "channels": ("fsdp",),
}

# First match wins. The axes belong to the *last* dimensions; what stands before them (the layer axis of stacked blocks,
# the taps of a convolution) is whole on every device, as is everything that no rule names.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(bias|scale|latent_mean|latent_std|count|step)$", ()),
    (r"(qkv|query|key|value|key_value)/kernel$", ("embed", "heads")),
    (r"attention/out/kernel$", ("heads", "embed")),
    (r"(up|gate|ffn/in)/kernel$", ("embed", "mlp")),
    (r"(down|ffn/out)/kernel$", ("mlp", "embed")),
    (r"embedding$", ("vocab", "embed")),
    (r"conv/kernel$", (None, "channels")),
    (r"kernel$", ("embed", "mlp")),
)

STACKED = "blocks"  # a module of this name holds all layers' parameters, along a leading axis
LARGE = 2**20  # elements; a parameter of this size that stays whole on every device is worth a warning
_warned: set[str] = set()


def path_name(path) -> str:
    """A key path of `jax.tree_util` as "params/dit/blocks/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_stacked(name: str) -> bool:
    """Whether the parameter at this path carries a leading axis over layers."""
    return STACKED in name.split("/")


def make_mesh(axes=None, devices=None) -> jax.sharding.Mesh:
    """A mesh over all devices of all processes.

    Args:
        axes: a `MeshConfig`, or a mapping of axis name → size from `data`, `fsdp`, `tensor`, in any order; -1, at most
            once, takes the devices that are left. None or empty is {"data": -1}: every device takes a part of the
            batch.
        devices: those to use, default `jax.devices()`; a described topology's devices compile for chips that are not
            there.
    Raises:
        ConfigError: an unknown axis, a size that is no count, or sizes whose product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dataclasses.asdict(axes) if dataclasses.is_dataclass(axes) else dict(axes or {"data": -1})
    for name, size in sizes.items():
        if name not in MESH_AXES:
            raise ConfigError(f"mesh.{name}: unknown axis; use {', '.join(MESH_AXES)}")
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or (size < 1 and size != -1):
            raise ConfigError(
                f"mesh.{name}: {size!r} is not a size; use a positive number, or -1 for the devices that are left"
            )
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ConfigError(f"mesh.{rest[1]}: only one axis may be -1, and mesh.{rest[0]} is already")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if rest and len(devices) % fixed == 0:
        sizes[rest[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        wanted = " × ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(f"mesh: {wanted} does not fit {len(devices)} device(s); the product must be {len(devices)}")
    shape = tuple(sizes.get(name, 1) for name in MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, devices=devices, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def logical_axes(name: str, ndim: int) -> tuple[str | None, ...]:
    """The logical axis of each dimension of the array at this path; None is a dimension that is never cut."""
    for pattern, axes in RULES:
        if re.search(pattern, name):
            axes = axes[max(0, len(axes) - (ndim - is_stacked(name))) :]
            return (None,) * (ndim - len(axes)) + axes
    return (None,) * ndim


def partition_spec(
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    mesh: jax.sharding.Mesh,
    name: str = "array",
    table: Mapping[str, tuple[str, ...]] = TABLE,
) -> PartitionSpec:
    """Where each dimension of an array goes. A dimension that its mesh axes do not divide stays whole.

    Args:
        axes: the logical axis of each dimension.
        shape: the array's.
        name: its path, for messages.
        table: logical axis → mesh axes.
    Raises:
        ValueError: a logical axis is not in the table, or two dimensions of the array ask for the same mesh axis.
    Warns:
        once per path, when an array of `LARGE` elements or more stays whole although a rule would cut it.
    """
    entries, used = [], {}
    for dimension, axis in enumerate(axes):
        if axis is not None and axis not in table:
            raise ValueError(f"{name}: logical axis {axis!r} is not in the table; it has {', '.join(table)}")
        targets = tuple(t for t in (table[axis] if axis else ()) if mesh.shape.get(t, 1) > 1)
        for target in targets:
            if target in used:
                raise ValueError(
                    f"{name}: axes {used[target]!r} and {axis!r} collide on mesh axis {target!r}; change the table"
                )
            used[target] = axis
        divides = shape[dimension] % math.prod(mesh.shape[t] for t in targets) == 0
        entries.append((targets if len(targets) > 1 else targets[0]) if targets and divides else None)
    if used and not any(entries) and math.prod(shape) >= LARGE and name not in _warned:
        _warned.add(name)
        cut = " × ".join(f"{target} {mesh.shape[target]}" for target in used)
        warnings.warn(f"{name} {list(shape)} is whole on every device: {cut} divides none of its axes", stacklevel=2)
    return PartitionSpec(*entries)


def param_shardings(tree, mesh: jax.sharding.Mesh):
    """A tree of shardings for parameters, a whole train state, or constants.

    Args:
        tree: arrays or `jax.ShapeDtypeStruct`s.
    Returns: `NamedSharding`s in the same structure.
    Raises, warns: as `partition_spec`.
    """

    def place(path, leaf):
        name = path_name(path)
        shape = tuple(np.shape(leaf))
        return NamedSharding(mesh, partition_spec(logical_axes(name, len(shape)), shape, mesh, name))

    return jax.tree_util.tree_map_with_path(place, tree)


def abstract_arrays(tree, mesh: jax.sharding.Mesh):
    """The tree as `jax.ShapeDtypeStruct`s with shardings, as a restore or a compilation ahead of time asks for it."""
    shardings = param_shardings(tree, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def place(tree, mesh: jax.sharding.Mesh):
    """Arrays that every process has in full → global arrays, cut as `param_shardings` says."""

    def cut(leaf, sharding):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        whole = np.asarray(jnp.asarray(leaf))
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(cut, tree, param_shardings(tree, mesh))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The first axis cut along `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(TABLE["batch"]))


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """Into how many parts `batch_sharding` cuts: a global batch size is a multiple of it."""
    return math.prod(mesh.shape.get(axis, 1) for axis in TABLE["batch"])


def shard_batch(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch → global arrays. Scalars are the same on every process and stay whole.

    Args:
        batch: arrays [b, …] with b = global batch size / number of processes, the rows of this process.
    Returns: arrays [global batch size, …].
    """
    whole, cut = replicated(mesh), batch_sharding(mesh)

    def place(local):
        local = np.asarray(local)
        return jax.make_array_from_process_local_data(cut if local.ndim else whole, local)

    return jax.tree.map(place, dict(batch))

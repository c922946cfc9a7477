"""Meshes, and the one table from logical axis names to mesh axes. No other file knows what a PartitionSpec is.

Parameters: their *path* (`params/dit/blocks/attention/query/kernel`) is matched against `RULES`, which name the logical
axis of each of their dimensions counted from the last. The same rules fit a parameter, its average, and Adam's moments
of it, because their paths end alike. Activations: models name their logical axes (`constrain`), and know no mesh; the
mesh comes from the context in which a function is traced (`on`). `TABLE` says for both along which mesh axes a logical
axis is cut.

Mesh axes, from the slowest network to the fastest: `data` (batch only; its outermost part goes over several slices),
`fsdp` (batch, and parameters cut along their `embed` side), `window` (tokens, cut at whole windows, see
`kernels.window_parallel`), `tensor` (heads and the wide side of FFNs).
"""

import contextlib
import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from streamdit_jax.errors import ConfigError

MESH_AXES = ("data", "fsdp", "window", "tensor")

# What the names mean: batch, examples; tokens, a video's, in token order; embed, a kernel's side towards the residual
# stream (an activation's is never cut); heads, mlp, the wide sides of attention and FFN, of kernels and activations;
# vocab, rows of an embedding; channels, a convolution's outputs.
TABLE: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "tokens": ("window",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "channels": ("fsdp", "tensor"),
}

# First match wins. The axes belong to the *last* dimensions; what stands before them (the layer axis of stacked blocks,
# the taps of a convolution) is whole on every device, as is everything that no rule names.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(bias|scale|latent_mean|latent_std|count|step)$", ()),
    (r"qkv/quantized_kernel$", ("heads", "embed")),  # quantised kernels lie as [out, in]
    (r"attention/out/quantized_kernel$", ("embed", "heads")),
    (r"(up|gate)/quantized_kernel$", ("mlp", "embed")),
    (r"down/quantized_kernel$", ("embed", "mlp")),
    (r"(qkv|query|key|value|key_value)/kernel$", ("embed", "heads")),
    (r"attention/out/kernel$", ("heads", "embed")),
    (r"patch_embedding/kernel$", (None, "embed")),
    (r"velocity/kernel$", ("embed", None)),
    (r"(up|gate|ffn/in)/kernel$", ("embed", "mlp")),
    (r"(down|ffn/out)/kernel$", ("mlp", "embed")),
    (r"embedding$", ("vocab", "embed")),
    (r"conv/kernel$", (None, "channels")),
    (r"kernel$", ("embed", "mlp")),
)

STACKED = "blocks"  # a module of this name holds all layers' parameters, along a leading axis
LARGE = 2**20  # elements; a parameter of this size that stays whole on every device is worth a warning
WHOLE_SHARE = 0.02  # of all parameters; more than this whole on every device is a mistake
_warned: set[str] = set()


def path_name(path) -> str:
    """A key path of `jax.tree_util` as "params/dit/blocks/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_stacked(name: str) -> bool:
    """Whether the parameter at this path carries a leading axis over layers, as "blocks/up/kernel" does and
    "blocks/0/up/kernel", of a layer by itself, does not.
    """
    return re.search(rf"(^|/){STACKED}/(?!\d+/)", name) is not None


def make_mesh(axes=None, devices=None) -> jax.sharding.Mesh:
    """A mesh over all devices of all processes, placed so that neighbours on it are neighbours on the chips' network.

    Args:
        axes: a `MeshConfig`, or a mapping of axis name → size from `data`, `fsdp`, `window`, `tensor`, in any order;
            -1, at most once, takes the devices that are left. None or empty is {"data": -1}: every device takes a part
            of the batch. Beside them `slices`, default 1: groups of devices that only the slower network between hosts
            joins; the outermost part of `data` goes over them.
        devices: those to use, default `jax.devices()`; a described topology's devices compile for chips that are not
            there.
    Raises:
        ConfigError: an unknown axis, a size that is no count, sizes whose product is not the number of devices, or
            slices that divide neither devices nor `data`, or that the devices are not.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dataclasses.asdict(axes) if dataclasses.is_dataclass(axes) else dict(axes or {"data": -1})
    slices = sizes.pop("slices", 1)
    for name, size in sizes.items():
        if name not in MESH_AXES:
            raise ConfigError(f"mesh.{name}: unknown axis; use {', '.join(MESH_AXES)}")
        if not _is_count(size) and size != -1:
            raise ConfigError(
                f"mesh.{name}: {size!r} is not a size; use a positive number, or -1 for the devices that are left"
            )
    if not _is_count(slices):
        raise ConfigError(f"mesh.slices: {slices!r} is not a count of slices; use a positive number")
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
    return jax.sharding.Mesh(_arrange(shape, slices, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _is_count(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 1


def _arrange(shape: tuple[int, ...], slices: int, devices: list) -> np.ndarray:
    """The devices as an array of this shape, whose first axis goes over the slices in its outermost part."""
    if shape[0] % slices:
        raise ConfigError(f"mesh.slices: {slices} slices do not divide a data axis of {shape[0]}; make it a multiple")
    known = {getattr(device, "slice_index", None) for device in devices}
    if slices > 1 and len(known) > 1 and len(known) != slices:
        raise ConfigError(f"mesh.slices: {slices}, but the devices lie in {len(known)} slices")
    inner = (shape[0] // slices, *shape[1:])
    if slices > 1 and len(known) == slices:
        outer = (slices,) + (1,) * len(inner[1:])
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    groups = np.split(np.array(devices, dtype=object), slices)
    parts = [
        mesh_utils.create_device_mesh(inner, list(group), allow_split_physical_axes=len(group) > 1) for group in groups
    ]
    return np.concatenate(parts)


_target = jax.make_user_context(None)  # JAX keys its caches of traces by it: no trace for one device serves another


@contextlib.contextmanager
def on(mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Functions that are traced inside lay their activations on this mesh, and choose their kernels for its devices; on
    one device, only the latter.

    Trace and lower inside it; a compiled function runs anywhere. It is the thread's own, and cannot be entered while
    tracing. A function called inside and outside of it is traced twice.
    """
    # On one device nothing is laid, but Pallas asks the context for the kind of TPU.
    laid = jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh.size == 1 else jax.set_mesh(mesh)
    with _target(mesh.devices.flat[0]), laid:
        yield


def target() -> jax.Device:
    """The device that one traces for: the first of the mesh of the context (`on`), or of this process.

    A described device, one that is not there, has a platform and a kind like any other.
    """
    return _target.value or jax.devices()[0]


def _context() -> jax.sharding.AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def parts(axis: str) -> int:
    """Into how many parts the mesh of the context cuts a logical axis; 1 without one."""
    mesh = _context()
    return 1 if mesh is None else _parts(axis, mesh)


def _parts(axis: str, mesh) -> int:
    return math.prod(mesh.shape.get(target, 1) for target in TABLE[axis])


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` as it is, laid on the mesh of the context; without one, `x`.

    axes: the logical axis of each dimension, None for one that is whole on every device. See `partition_spec`.
    """
    mesh = _context()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(
        x, partition_spec(axes, x.shape, mesh, f"activation {'·'.join(map(str, axes))}")
    )


def constrain_parameters(tree):
    """A tree of parameters or gradients as it is, laid on the mesh of the context as `RULES` lay parameters."""
    mesh = _context()
    if mesh is None:
        return tree

    def lay(path, leaf):
        name = path_name(path)
        spec = partition_spec(logical_axes(name, leaf.ndim), leaf.shape, mesh, name)
        return jax.lax.with_sharding_constraint(leaf, spec)

    return jax.tree_util.tree_map_with_path(lay, tree)


def map_shards(
    function: Callable,
    arrays: Sequence[jax.Array],
    axes: Sequence[tuple[str | None, ...]],
    out_axes: tuple[str | None, ...],
) -> jax.Array:
    """`function(*arrays)`, by each device of the context's mesh on its own part; without a mesh, on the whole.

    axes: the logical axes of each array; out_axes: those of the result. An axis is cut along those of its mesh axes
        that divide every dimension of that name.
    """
    mesh = _context()
    if mesh is None:
        return function(*arrays)
    sizes = [(name, size) for array, names in zip(arrays, axes) for name, size in zip(names, array.shape) if name]
    common = {name: math.gcd(*(size for other, size in sizes if other == name)) for name, _ in sizes}
    cut = {}
    for name, size in common.items():
        cut[name] = _that_divide(size, TABLE[name], mesh)

    def spec(names):
        named = [tuple(cut.get(name, ())) for name in names]
        # Axes of one device are named too, wherever: backward, what is not named is summed over.
        alone = tuple(axis for axis in mesh.axis_names if mesh.shape[axis] == 1 and axis not in sum(named, ()))
        return PartitionSpec(named[0] + alone, *named[1:])

    # Kernels do not say along which axes their results vary, so that cannot be checked.
    mapped = jax.shard_map(function, in_specs=tuple(map(spec, axes)), out_specs=spec(out_axes), check_vma=False)
    return mapped(*arrays)


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
    """Where each dimension of an array goes. One that its mesh axes do not divide is cut along those that do, if any.

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
        for target in table[axis] if axis else ():
            if mesh.shape.get(target, 1) == 1:
                continue
            if target in used:
                raise ValueError(
                    f"{name}: axes {used[target]!r} and {axis!r} collide on mesh axis {target!r}; change the table"
                )
            used[target] = axis
        targets = _that_divide(shape[dimension], table[axis], mesh) if axis else ()
        entries.append(targets if len(targets) > 1 else (targets[0] if targets else None))
    if used and not any(entries) and math.prod(shape) >= LARGE and name not in _warned:
        _warned.add(name)
        cut = " × ".join(f"{target} {mesh.shape[target]}" for target in used)
        warnings.warn(f"{name} {list(shape)} is whole on every device: {cut} divides none of its axes", stacklevel=2)
    return PartitionSpec(*entries)


def _that_divide(size: int, axes: tuple[str, ...], mesh) -> tuple[str, ...]:
    """Of a dimension's mesh axes, neighbours that divide its size: those that cut it into the most parts."""
    axes = tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)
    runs = [axes[first:last] for first in range(len(axes)) for last in range(first + 1, len(axes) + 1)]
    parts = {run: math.prod(mesh.shape[axis] for axis in run) for run in runs}
    return max((run for run in runs if size % parts[run] == 0), key=parts.get, default=())


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


def require_cut(params, mesh: jax.sharding.Mesh, field: str) -> None:
    """ConfigError, beginning with `field`, if the mesh has axes that cut parameters, and more than `WHOLE_SHARE` of
    these (and than `LARGE` numbers) would lie whole on every device all the same.
    """
    cutting = {axis: mesh.shape.get(axis, 1) for axis in ("fsdp", "tensor") if mesh.shape.get(axis, 1) > 1}
    if not cutting:
        return
    leaves = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    total = sum(leaf.size for _, leaf in leaves)
    whole = []
    for name, leaf in leaves:
        axes = logical_axes(name, leaf.ndim)
        if not any(partition_spec(axes, leaf.shape, mesh, name)):
            whole.append((leaf.size, name, leaf.shape, axes))
    share = sum(size for size, *_ in whole) / total
    if share <= WHOLE_SHARE or share * total <= LARGE:
        return
    largest = [f"{name} {list(shape)}{_divisors(shape, axes, cutting)}" for _, name, shape, axes in sorted(whole)[-3:]]
    sizes = " × ".join(f"{axis} {size}" for axis, size in cutting.items())
    raise ConfigError(
        f"{field}: {sizes} leaves {share:.0%} of the parameters whole on every device; "
        f"the largest: {'; '.join(largest[::-1])}"
    )


def _divisors(shape: tuple[int, ...], axes: tuple[str | None, ...], cutting: Mapping[str, int]) -> str:
    """The sizes, up to those of the mesh, of the mesh axes that would cut an array, in words."""
    fits = []
    for size, axis in zip(shape, axes):
        for target in TABLE[axis] if axis else ():
            divisors = [n for n in range(2, cutting.get(target, 1) + 1) if size % n == 0]
            fits += [f"{target} = {' or '.join(map(str, divisors))}"] if divisors else []
    return f" (cut by {', '.join(fits)})" if fits else " (cut by no size of these)"


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The first axis cut along `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(TABLE["batch"]))


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """Into how many parts `batch_sharding` cuts: a global batch size is a multiple of it."""
    return _parts("batch", mesh)


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

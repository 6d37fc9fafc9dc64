"""Where arrays lie: the only module that maps logical axis names to axes of the device mesh.

Parameters name their dimensions ("embed", "mlp", …), the tables below give each name a mesh axis, and the same triple
serves initialisation, restoring and importing: abstract tree → shardings → arrays made in place, none ever whole on one
device unless it is meant to be. Batches are split by groups (axis G) over the mesh axes `data` and `fsdp`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jfe_jax.config import MeshConfig
from jfe_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# None: never split. A weight's layers are scanned over, so each device needs its share of every layer.
PARAMETER_RULES: Mapping[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "vocab": "tensor",
    "patch": None,
    "position": None,
    "rank": None,
}

# Activations keep their width whole: `fsdp` already splits their groups.
ACTIVATION_RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "group": BATCH_AXES,
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "embed": None,
}

# Left whole where the mesh axis does not divide them: Gemma's single kv head cannot be split.
REPLICATED_IF_INDIVISIBLE = frozenset({"kv_heads"})


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh `data` × `fsdp` × `tensor` of the config, over `devices` (all there are).

    With -1 on one axis that axis takes all devices that the others leave; without, surplus devices stay idle. TPU
    slices, between which the network is slow, meet along `data` alone.

    Raises:
      UserError: too few devices, two -1, an axis below 1, or devices that do not divide; several slices that do not
        share `data`, or of which only a part would be used.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    written = f"mesh {' x '.join(f'{axis}={size}' for axis, size in sizes.items())}"
    if len(free) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise UserError(f"{written}: axes are 1 or more, and at most one is -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if fixed > len(devices):
        raise UserError(f"{written} needs {fixed} devices; there are {len(devices)}")
    if free:
        if len(devices) % fixed:
            raise UserError(f"{written}: {len(devices)} devices do not divide by {fixed}; give every axis its size")
        sizes[free[0]] = len(devices) // fixed
    shape = tuple(sizes.values())
    # A GPU's "slice" is its host; between those, any axis may go.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices > 1:
        if sizes["data"] % slices or math.prod(shape) != len(devices):
            raise UserError(
                f"{written}: {len(devices)} devices in {slices} slices; data has to be a multiple of {slices}, and "
                "every device used: set mesh.data to -1"
            )
        within = (sizes["data"] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices)
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)
    devices = devices[: math.prod(shape)]
    try:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    except NotImplementedError:
        # A torus whose axes have to be cut for these sizes, as 4x8x8 for 16 x 16.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def group_count(mesh: Mesh) -> int:
    """G, the groups that a batch on this mesh is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def parameter_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, name: str = "weight") -> P:
    """Partition of a weight of `shape` whose dimensions have the logical names `axes`.

    Vectors (norms, biases; `layers` does not count) are not split over `fsdp`: gathering one costs more than it saves.

    Raises:
      ValueError: a name that no rule knows, or two dimensions on one mesh axis: the weight's declaration is wrong.
      UserError: a dimension that its mesh axis does not divide, and that may not stay whole.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name}: {len(shape)} dimensions, {len(axes)} axis names {tuple(axes)}")
    spec: list[str | None] = []
    vector = sum(axis != "layers" for axis in axes) == 1
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in PARAMETER_RULES:
            raise ValueError(f"{name}: no sharding rule for axis {axis!r}; known: {', '.join(PARAMETER_RULES)}")
        target = None if axis is None else PARAMETER_RULES[axis]
        if vector and target == "fsdp":
            target = None
        if target in spec and target is not None:
            raise ValueError(f"{name}: two of its axes {tuple(axes)} fall on mesh axis {target!r}")
        if target is not None and size % mesh.shape[target]:
            if axis not in REPLICATED_IF_INDIVISIBLE:
                raise UserError(
                    f"mesh.{target}={mesh.shape[target]} does not divide {name}'s axis {axis!r} of {size}; "
                    f"choose a divisor of {size}"
                )
            target = None
        spec.append(target)
    return P(*spec)


def parameter_shardings(abstract: Any, axes: Any, mesh: Mesh) -> Any:
    """`abstract` (leaves with a shape) with each leaf replaced by its NamedSharding.

    Args:
      abstract: the parameter tree, arrays or ShapeDtypeStructs.
      axes: the same tree with a tuple of logical axis names at each leaf.
      mesh: where they are to lie.
    """

    def sharding(path: Any, leaf: Any, names: tuple[str | None, ...]) -> NamedSharding:
        return NamedSharding(mesh, parameter_spec(names, leaf.shape, mesh, path_name(path)))

    return jax.tree_util.tree_map_with_path(sharding, abstract, axes)


def optimizer_state_shardings(tree: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of a tree that holds copies of the parameter tree, as an optimizer's state does.

    A leaf whose path ends in a parameter's path and whose dimensions divide as that parameter's lies as it; every other
    (a count, a factor of a factored moment) is whole on each device.
    """
    by_path = {_path_keys(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(shardings)[0]}

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        keys = _path_keys(path)
        for start in range(len(keys)):
            found = by_path.get(keys[start:])
            if found is not None and len(found.spec) == len(leaf.shape) and _divides(found.spec, leaf.shape, mesh):
                return found
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _divides(spec: P, shape: Sequence[int], mesh: Mesh) -> bool:
    return all(axis is None or size % mesh.shape[axis] == 0 for axis, size in zip(spec, shape, strict=True))


def init_sharded(function: Callable[..., Any], shardings: Any, *args: Any) -> Any:
    """`function(*args)` compiled so that every output is made where `shardings` puts it."""
    platform = next(iter(jax.tree.leaves(shardings)[0].device_set)).platform
    # It runs once: on the CPU, compiling it with optimisations takes far longer than they save.
    options = {"xla_backend_optimization_level": 0} if platform == "cpu" else None
    return jax.jit(function, out_shardings=shardings, compiler_options=options)(*args)


def abstract_arrays(abstract: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs that carry their sharding: what a checkpoint is restored into."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Pins an activation's layout by logical names, as `constrain(x, ("group", None, None, "mlp"))`.

    Without a mesh in context (`jax.set_mesh`), and for mesh axes that a surrounding `shard_map` already took, it does
    nothing; so models call it freely and run anywhere.
    """
    spec = activation_spec(axes, x.shape)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def activation_spec(axes: Sequence[str | None], shape: Sequence[int]) -> P | None:
    """Partition of an activation by logical names over the mesh axes that are open; None if none is."""
    mesh = jax.sharding.get_abstract_mesh()
    free = auto_axes(mesh)
    if not free:
        return None
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        target = None if axis is None else ACTIVATION_RULES[axis]
        names = tuple(name for name in ((target,) if isinstance(target, str) else target or ()) if name in free)
        whole = axis in REPLICATED_IF_INDIVISIBLE and size % math.prod(mesh.shape[name] for name in names)
        spec.append(None if whole or not names else names)
    return P(*spec)


def auto_axes(mesh: Any) -> set[str]:
    """Axes of an abstract mesh that no surrounding `shard_map` has taken."""
    return {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}


def batch_sharding(mesh: Mesh, chunks: int = 1) -> NamedSharding:
    """Of an array whose leading axis is G, or, with several chunks, whose leading axes are chunks and G."""
    return NamedSharding(mesh, P(BATCH_AXES) if chunks == 1 else P(None, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def put_batch(batch: Any, mesh: Mesh, chunks: int = 1) -> Any:
    """A host batch (NumPy leaves, G of this process's groups leading) as global arrays on the mesh.

    With several chunks, G is chunks times the mesh's groups, and becomes two axes, chunks in front: so every device
    holds its part of every chunk.
    """
    sharding = batch_sharding(mesh, chunks)
    if chunks > 1:
        batch = jax.tree.map(lambda x: x.reshape(chunks, -1, *x.shape[1:]), batch)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def abstract_batch(batch: Any, mesh: Mesh, chunks: int = 1) -> Any:
    """What `put_batch` makes of host batches, as ShapeDtypeStructs; `batch` may have fewer groups than they."""
    groups, layout = group_count(mesh), batch_sharding(mesh, chunks)
    leading = (groups,) if chunks == 1 else (chunks, groups)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((*leading, *leaf.shape[1:]), leaf.dtype, sharding=layout), batch
    )


def path_name(path: Any) -> str:
    """A pytree path as dotted keys: "text.layers.mlp.gate"."""
    return ".".join(_path_keys(path))


def _path_keys(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)

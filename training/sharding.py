"""The device mesh, and which of its axes each logical axis is split over.

Parameters and activations carry logical axis names where they are made. `RULES` is the one place that says what the
names mean on a mesh; `jit` does the rest. All axes are of the type Auto: the compiler places every intermediate array.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from common.errors import UserError, near
from models import partitioning
from ops import dispatch, sequence

AXES = ("data", "fsdp", "tensor", "sequence", "expert")

SMALL = 2**16  # bytes on a device of a parameter whose split is not worth a line
LARGE = 2**20  # bytes of one that would be worth a rule of its own

# logical axis -> the mesh axes that its size is divided by, in this order
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("sequence",),
    "activation": (),  # the residual stream: whole on every device that holds its rows
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "state": (),
    "expert": ("expert",),
}


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Raises a UserError for an axis that does not exist, a size below 1 that is not -1, or more than one -1."""
    for axis in sizes:
        if axis not in AXES:
            raise UserError(f"there is no mesh axis {axis!r}; {near(axis, AXES)}")
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes.values())
    if not whole or list(sizes.values()).count(-1) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        text = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise UserError(f"sizes of the mesh are whole numbers of 1 or more, and one of them may be -1; got {text}")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh of axes `data, fsdp, tensor, sequence, expert`.

    Args:
      sizes: size of each axis; 1 where it is left out, and -1 (at most once) for what fills the devices.
      devices: all devices of all hosts by default.

    Raises:
      UserError: for an unknown axis, a bad size, sizes that do not fit the number of devices, or TPUs of several slices.
    """
    check_sizes(sizes)
    devices = jax.devices() if devices is None else list(devices)
    shape = {axis: sizes.get(axis, 1) for axis in AXES}
    text = ", ".join(f"mesh.{axis}={size}" for axis, size in shape.items())
    filled = [axis for axis in AXES if shape[axis] == -1]
    known = math.prod(size for size in shape.values() if size != -1)
    count = len(devices)
    if filled and count % known == 0:
        shape[filled[0]] = count // known
    elif filled:
        raise UserError(
            f"{text} does not fit {count} devices: the product of the given sizes, {known}, must divide {count}"
        )
    elif known != count:
        raise UserError(
            f"{text} is a mesh of {known} devices, but there are {count}: set one size to -1 to use them all, or "
            f"choose sizes whose product is {count}"
        )
    if devices[0].platform == "tpu" and len(slices := {getattr(device, "slice_index", 0) for device in devices}) > 1:
        raise UserError(f"the devices are of {len(slices)} TPU slices; a run can be on one: start one for each slice")
    # Sizes that are no products of those of the torus that a TPU's chips are in split its axes, and are not refused.
    arranged = mesh_utils.create_device_mesh(tuple(shape.values()), devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Splits the dimensions of an array by `RULES`.

    A mesh axis is left out where its size does not divide the dimension, or where an earlier dimension uses it.

    Args:
      axes: logical name or None of each dimension.
      shape: shape of the array; it may have more, leading dimensions (stacked layers), which are not split.
      mesh: a mesh of `make_mesh`.

    Raises:
      UserError: for an unknown name, or more names than dimensions.
    """
    stacked = len(shape) - len(axes)
    if stacked < 0:
        raise UserError(f"an array of shape {tuple(shape)} has fewer dimensions than axis names {tuple(axes)}")
    taken: set[str] = set()
    entries: list[str | tuple[str, ...] | None] = [None] * stacked
    for axis, size in zip(axes, shape[stacked:], strict=True):
        if axis is not None and axis not in RULES:
            raise UserError(f"there is no logical axis {axis!r}; {near(axis, tuple(RULES))}, or None")
        entry = []
        for mesh_axis in RULES[axis] if axis is not None else ():
            ways = mesh.shape[mesh_axis]
            if ways > 1 and mesh_axis not in taken and size % ways == 0:
                entry.append(mesh_axis)
                taken.add(mesh_axis)
                size //= ways
        entries.append(entry[0] if len(entry) == 1 else tuple(entry) or None)
    return PartitionSpec(*entries)


def used(spec: PartitionSpec) -> set[str]:
    """The mesh axes that an array is split over."""
    return {axis for entry in spec if entry is not None for axis in (entry if isinstance(entry, tuple) else (entry,))}


def sharding(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """`spec` on its mesh."""
    return NamedSharding(mesh, spec(axes, shape, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of every array of a batch: rows over `data`, `fsdp` and `expert`, by whose product their number must divide."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def lay_out(batch: Mapping[str, PyTree], mesh: Mesh) -> dict[str, PyTree]:
    """Splits the arrays of a batch inside a program: rows as `batch_sharding` does, and tokens over `sequence`."""
    if mesh.shape[sequence.AXIS] == 1:
        return jax.lax.with_sharding_constraint(dict(batch), batch_sharding(mesh))
    inputs = batch["inputs"]
    pairs = inputs.ndim == 3 and jnp.issubdtype(inputs.dtype, jnp.integer)  # [batch, 2, length]

    def one(x):
        of_tokens = x.ndim > 1 and x.shape[1] == inputs.shape[1] and not pairs
        axes = ("batch", "length") if of_tokens else ("batch",)
        place = sharding((*axes, *(None,) * (x.ndim - len(axes))), x.shape, mesh)
        return jax.lax.with_sharding_constraint(x, place)

    return jax.tree.map(one, dict(batch))


def batch_ways(mesh: Mesh) -> int:
    """In how many parts `batch_sharding` splits the rows."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


@contextlib.contextmanager
def tracing(mesh: Mesh) -> Iterator[None]:
    """Makes what is traced inside a program for this mesh.

    `models.partitioning.constrain` and `ops.dispatch.local` follow `RULES`, the primitives take the forms of the devices'
    platform, whatever this process computes on, and where the length is split they pass states between its shards.
    """

    is_spec = lambda x: isinstance(x, PartitionSpec)

    def constrain(x, axes):
        target = sharding(axes, x.shape, mesh)
        return x if mesh.size == 1 else jax.lax.with_sharding_constraint(x, target)

    def whole(axes, shape):
        """`spec` with the axes of one device, too: without checks, gradients are summed over all axes that are not named."""
        alone = tuple(axis for axis in AXES if mesh.shape[axis] == 1)
        first, *rest = (() if entry is None else entry for entry in spec(axes, shape, mesh))
        return PartitionSpec((*((first,) if isinstance(first, str) else first), *alone), *rest)

    def localise(function, inputs, output, kernel):
        of_axes = whole if kernel else functools.partial(spec, mesh=mesh)

        def specs(axes, tree):
            return jax.tree.map(lambda x: of_axes((*axes, *(None,) * x.ndim)[: x.ndim], x.shape), tree)

        def run(*arguments):
            in_specs = tuple(specs(axes, tree) for axes, tree in zip(inputs, arguments, strict=True))
            found = jax.eval_shape(function, *arguments)
            if output and isinstance(output[0], tuple):
                out_specs = tuple(specs(axes, tree) for axes, tree in zip(output, found, strict=True))
            else:
                out_specs = specs(output, found)
            checked = {"check_vma": not kernel}  # what a kernel returns does not say over which axes it differs
            of_device = (summed if kernel else differing)(in_specs, out_specs)
            return jax.shard_map(of_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **checked)(*arguments)

        def axes_of(specs):
            return set().union(*map(used, jax.tree.leaves(specs, is_leaf=is_spec)))

        def summed(in_specs, out_specs):
            """The function, and the sums of its results over axes that split arguments and not the result."""
            every = axes_of(in_specs)
            missing = jax.tree.map(lambda spec: tuple(sorted(every - used(spec))), out_specs, is_leaf=is_spec)
            add = lambda x, axes: jax.lax.psum(x, axes) if axes else x
            return lambda *arguments: jax.tree.map(add, function(*arguments), missing)

        def differing(in_specs, out_specs):
            """The function of arguments that are marked as different wherever results are: the derivative of one that is the same
            on several devices is then summed over them at the end, and not where it meets another, which may be in a loop."""
            every = axes_of(out_specs)
            missing = jax.tree.map(lambda spec: tuple(sorted(every - used(spec))), in_specs, is_leaf=is_spec)
            mark = lambda x, axes: jax.lax.pcast(x, axes, to="varying") if axes else x
            return lambda *arguments: function(*jax.tree.map(mark, arguments, missing))

        return function if mesh.size == 1 or sequence.is_inside() else run

    def place(function, arguments, axes, results):
        of_leaf = lambda axes: lambda x: whole(axes, x.shape)
        in_specs = {name: jax.tree.map(of_leaf(axes[name]), x) for name, x in arguments.items()}
        out_specs = tuple(whole(axes, shape) for axes, shape in results)
        # Unchecked: else every loop from a state of zeros would have to say over which axes it will differ.
        shards = jax.shard_map(function, mesh=mesh, in_specs=(in_specs,), out_specs=out_specs, check_vma=False)
        return shards(dict(arguments))

    platform = mesh.devices.flat[0].platform
    with contextlib.ExitStack() as stack:
        stack.enter_context(partitioning.constraints(constrain))
        stack.enter_context(dispatch.localised_by(localise))
        stack.enter_context(dispatch.platform(platform))
        stack.enter_context(sequence.split_over(mesh.shape[sequence.AXIS], place))
        yield


@dataclasses.dataclass(frozen=True)
class Whole:
    """A parameter that a mesh axis does not split: its bytes on each device, and why.

    Attributes:
      name, shape, bytes: of the parameter, and what a device has of it.
      axis: "fsdp" or "tensor".
      reason: as a sentence's end.
      indivisible: whether a size does not divide, and not a rule that is missing.
    """

    name: str
    shape: tuple[int, ...]
    bytes: float
    axis: str
    reason: str
    indivisible: bool


def left_whole(params: PyTree, metadata: PyTree, mesh: Mesh) -> list[Whole]:
    """The parameters that `fsdp` or `tensor` does not split, those of the most bytes first.

    Args:
      params: tree of `jax.ShapeDtypeStruct` with shardings, as in `training.state.Built.abstract`.
      metadata: of the same tree.
      mesh: that they are split over.
    """
    found = []
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), fact in zip(leaves, jax.tree.leaves(metadata), strict=True):
        taken = used(leaf.sharding.spec)
        own = leaf.shape[len(leaf.shape) - len(fact.axes) :]
        sizes = dict(zip(fact.axes, own, strict=True))
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for axis in ("fsdp", "tensor"):
            ways = mesh.shape[axis]
            if ways == 1 or axis in taken or size < SMALL:
                continue
            meant = [name for name in sizes if name is not None and axis in RULES[name]]
            if meant:
                reason = ", ".join(f"{name}={sizes[name]}" for name in meant) + f" does not divide by {ways}"
            elif any(length % ways == 0 for length in own) and size >= LARGE:
                reason = f"no rule splits its axes ({', '.join(str(name) for name in fact.axes)})"
            else:
                continue
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            found.append(Whole(name, leaf.shape, size, axis, reason, bool(meant)))
    return sorted(found, key=lambda whole: -whole.bytes)


def warnings(params: PyTree, metadata: PyTree, mesh: Mesh) -> list[str]:
    """A line for each size of a parameter that does not divide; the arguments are those of `left_whole`."""
    groups: dict[tuple[str, str], list[Whole]] = {}
    for one in left_whole(params, metadata, mesh):
        if one.indivisible:
            groups.setdefault((one.axis, one.reason), []).append(one)
    lines = []
    for (axis, reason), group in groups.items():
        names = ", ".join(one.name for one in group[:2]) + (f" and {len(group) - 2} more" if len(group) > 2 else "")
        size = sum(one.bytes for one in group) / 2**20
        lines.append(f"mesh.{axis} leaves {names} whole ({size:.1f} MiB on each device): {reason}")
    return lines

"""Parameters that a mesh axis could split and leaves whole: said where a run begins, and on the page of a compiled step."""

import dataclasses
import math
from collections.abc import Sequence

import jax

from training import sharding
from training.state import Built

SMALL = 2**16  # bytes on a device of a parameter whose split is not worth a line
LARGE = 2**20  # bytes of one that would be worth a rule of its own


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


def find(built: Built) -> list[Whole]:
    """The parameters that `fsdp` or `tensor` does not split, those of the most bytes first."""
    found = []
    leaves = jax.tree_util.tree_leaves_with_path(built.abstract["params"])
    for (path, leaf), fact in zip(leaves, jax.tree.leaves(built.metadata), strict=True):
        used = {axis for entry in leaf.sharding.spec for axis in (entry if isinstance(entry, tuple) else (entry,))}
        own = leaf.shape[len(leaf.shape) - len(fact.axes) :]
        sizes = dict(zip(fact.axes, own, strict=True))
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for axis in ("fsdp", "tensor"):
            ways = built.mesh.shape[axis]
            if ways == 1 or axis in used or size < SMALL:
                continue
            meant = [name for name in sizes if name is not None and axis in sharding.RULES[name]]
            if meant:
                reason = ", ".join(f"{name}={sizes[name]}" for name in meant) + f" does not divide by {ways}"
            elif any(length % ways == 0 for length in own) and size >= LARGE:
                reason = f"no rule splits its axes ({', '.join(str(name) for name in fact.axes)})"
            else:
                continue
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            found.append(Whole(name, leaf.shape, size, axis, reason, bool(meant)))
    return sorted(found, key=lambda whole: -whole.bytes)


def warnings(whole: Sequence[Whole]) -> list[str]:
    """A line for each size that does not divide."""
    groups: dict[tuple[str, str], list[Whole]] = {}
    for one in whole:
        if one.indivisible:
            groups.setdefault((one.axis, one.reason), []).append(one)
    lines = []
    for (axis, reason), group in groups.items():
        names = ", ".join(one.name for one in group[:2]) + (f" and {len(group) - 2} more" if len(group) > 2 else "")
        size = sum(one.bytes for one in group) / 2**20
        lines.append(f"mesh.{axis} leaves {names} whole ({size:.1f} MiB on each device): {reason}")
    return lines

"""Over which axes of a mesh a collective goes, read from the text of a compiled program."""

import math
import re
from collections.abc import Mapping

import numpy as np


def over_axes(attributes: str, mesh: Mapping[str, int]) -> str:
    """The mesh axes that a collective goes over, as in "data,fsdp"; "" for none, "?" where the text is not understood."""
    sizes, count = tuple(mesh.values()), math.prod(mesh.values())
    if pairs := re.search(r"source_target_pairs=\{\{(.*?)\}\}", attributes):
        groups = [tuple(map(int, pair.split(","))) for pair in pairs.group(1).split("},{")]
    elif iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        rows, columns, shape, order = iota.groups()
        groups = _iota(shape, order).reshape(int(rows), int(columns)).tolist()
    elif named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}", attributes
    ):
        mesh_of_it, shape, order, names = named.groups()
        of_it = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh_of_it)}
        chosen = [list(of_it).index(name) for name in re.findall(r"'(\w+)'", names)]
        if ":" in names or math.prod(of_it.values()) != count:  # a part of an axis
            return "?"
        ids = _iota(shape or str(count), order).reshape(*of_it.values())
        ways = math.prod(ids.shape[place] for place in chosen)
        groups = np.moveaxis(ids, chosen, range(-len(chosen), 0)).reshape(-1, ways).tolist()
    elif listed := re.search(r"replica_groups=\{\{(.*?)\}\}", attributes):
        groups = [tuple(map(int, group.split(","))) for group in listed.group(1).split("},{")]
    elif "replica_groups={}" in attributes:
        groups = [list(range(count))]
    else:
        return "?"
    if any(device >= count for group in groups for device in group):
        return "?"
    varying = set()
    for group in groups:
        places = np.array(np.unravel_index(np.asarray(group), sizes))
        varying |= set(np.flatnonzero(np.ptp(places, axis=1)).tolist())
    return ",".join(axis for number, axis in enumerate(mesh) if number in varying)


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Device numbers as XLA abbreviates them: 0, 1, 2, ... in a shape, its axes then in another order."""
    sizes = [int(n) for n in shape.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids

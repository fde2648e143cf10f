"""Checksums of the bytes of arrays, the same however the arrays are laid out over devices and processes."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path, such as "params/head/kernel"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def checksums(tree: Any) -> dict[str, int]:
    """A 32-bit checksum of the bytes of every leaf, by the leaf's path; the same for every sharding.

    The sum over the words of a leaf of mix(word XOR mix(position)) modulo 2**32, where mix is the finaliser of
    MurmurHash3, a bijection: any change of one word is found for certain, other damage but for one case in 2**32. As a
    sum it needs no order, so every process takes the part that it holds.
    """
    leaves = {
        path: jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for path, leaf in named_leaves(tree).items()
    }
    with ThreadPoolExecutor() as pool:
        sums = np.array(list(pool.map(_local_checksum, leaves.values())), np.uint64)
    if jax.process_count() > 1:
        sums = multihost_utils.process_allgather(sums.astype(np.uint32)).astype(np.uint64).sum(axis=0)
    return dict(zip(leaves, (sums % 2**32).tolist(), strict=True))


def _local_checksum(array: jax.Array) -> int:
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    return sum(_shard_checksum(np.asarray(shard.data), shard.index, array.shape) for shard in shards) % 2**32


def _shard_checksum(data: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> int:
    size = data.dtype.itemsize
    words_each = max(1, size // 4)
    words = np.asarray(data, order="C").reshape(*data.shape, 1).view(f"u{min(size, 4)}").reshape(-1)
    # Position of each word in the whole array, counted in C order modulo 2**32, from the last axis to the first.
    position, stride = np.arange(words_each, dtype=np.uint32), words_each
    for axis in reversed(range(len(shape))):
        start = index[axis].start or 0
        offset = np.arange(start, start + data.shape[axis], dtype=np.uint64) * np.uint64(stride % 2**32)
        position = np.add.outer(offset.astype(np.uint32), position).reshape(-1)
        stride *= shape[axis]
    total, block = 0, 1 << 16  # blocks stay in the cache
    for i in range(0, words.size, block):
        mixed = _mix(words[i : i + block].astype(np.uint32) ^ _mix(position[i : i + block]))
        total += int(mixed.sum(dtype=np.uint64))
    return total


def _mix(h: np.ndarray) -> np.ndarray:
    """MurmurHash3's finaliser of uint32 words, in place."""
    h ^= h >> 16
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> 13
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> 16
    return h

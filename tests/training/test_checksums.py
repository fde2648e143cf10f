"""Checksums: the stated formula, the same under every sharding, and sensitive to every kind of damage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from training.checksums import checksums, named_leaves


def mix(h: int) -> int:
    h = ((h ^ h >> 16) * 0x85EBCA6B) % 2**32
    h = ((h ^ h >> 13) * 0xC2B2AE35) % 2**32
    return h ^ h >> 16


def by_hand(data: bytes, size: int) -> int:
    words = [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]
    return sum(mix(word ^ mix(i)) for i, word in enumerate(words)) % 2**32


def one(x) -> int:
    return checksums({"x": jnp.asarray(x)})["x"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool"])
def test_formula(dtype):
    x = np.random.default_rng(0).normal(size=(5, 7)).astype(jnp.dtype(dtype))
    assert one(x) == by_hand(x.tobytes(), x.dtype.itemsize)


def test_formula_in_64_bits_scalars_and_empty_arrays():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(3, 5))
        assert one(x) == by_hand(x.tobytes(), 4)
    assert one(np.float32(2.5)) == by_hand(np.float32(2.5).tobytes(), 4)
    assert one(np.zeros((0, 3), np.float32)) == 0


def test_long_array():
    x = np.arange(70_000, dtype=np.int32)  # more than one block
    assert one(x) == by_hand(x.tobytes(), 4)


def test_random_keys():
    key = jax.random.key(7)
    assert one(jax.random.key_data(key)) == checksums({"x": key})["x"] != checksums({"x": jax.random.key(8)})["x"]


def test_sharding_does_not_matter():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x = np.random.default_rng(1).normal(size=(8, 16, 24)).astype(np.float32)
    want = by_hand(x.tobytes(), 4)
    for spec in [(), ("a",), (None, "b"), (None, "a", "b"), (("a", "b"),), ("b", None, "a"), (None, None, ("b", "a"))]:
        assert one(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))) == want, spec


def test_damage_is_seen():
    rng = np.random.default_rng(2)
    x = rng.normal(size=64).astype(np.float32)
    seen = {one(x)}
    for word in (0, 31, 63):
        for bit in range(32):
            y = x.view(np.uint32).copy()
            y[word] ^= np.uint32(1 << bit)
            seen.add(one(y.view(np.float32)))
    assert len(seen) == 1 + 3 * 32
    for y in (
        -x,
        np.where(np.arange(64) < 2, -x, x),
        x[::-1],
        np.roll(x, 1),
        np.sort(x),
        np.where(np.arange(64) < 60, x, 0),
    ):
        before = len(seen)
        seen.add(one(y))
        assert len(seen) == before + 1


def test_paths():
    tree = {"params": {"w": 1}, "opt": ({"m": 2}, None, 3)}
    assert named_leaves(tree) == {"params/w": 1, "opt/0/m": 2, "opt/2": 3}

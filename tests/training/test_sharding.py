"""Meshes, the table of logical axes, and the constraint that models call."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from models.partitioning import constrain
from tests.processes import ROOT
from training import sharding


def mesh(count=8, **sizes):
    return sharding.make_mesh(sizes, jax.devices()[:count])


def test_minus_one_fills_the_devices_and_axes_are_auto():
    made = mesh(data=-1, tensor=2)
    assert dict(made.shape) == {"data": 4, "fsdp": 1, "tensor": 2, "sequence": 1, "expert": 1}
    assert set(made.axis_types) == {AxisType.Auto}
    assert dict(sharding.make_mesh({"fsdp": -1}).shape) == {
        "data": 1,
        "fsdp": 8,
        "tensor": 1,
        "sequence": 1,
        "expert": 1,
    }
    assert mesh(1).size == 1


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 3}, ("mesh of 3 devices", "there are 8", "-1")),
        ({"data": -1, "tensor": 3}, ("8 devices", "must divide 8")),
        ({"data": -1, "fsdp": -1}, ("one of them may be -1",)),
        ({"data": 0}, ("1 or more", "mesh.data=0")),
        ({"tensors": 2}, ("'tensors'", "did you mean 'tensor'")),
    ],
)
def test_sizes_that_do_not_fit_say_what_to_set(sizes, words):
    with pytest.raises(ValueError) as error:
        sharding.make_mesh(sizes, jax.devices())
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "mlp"), (8, 6), ("fsdp", "tensor")),
        (("vocab", "embed"), (10, 4), ("tensor", "fsdp")),
        (("embed", "heads", None), (3, 8, 4, 5), (None, "fsdp", "tensor", None)),  # stacked layers
        (("embed", "heads", None), (8, 3, 5), ("fsdp", None, None)),  # 3 heads do not divide by 2
        (("heads", "mlp"), (4, 4), ("tensor", None)),  # each mesh axis once
        (("mlp", "state"), (4, 4), ("tensor", None)),
        (("batch", "length", "activation"), (8, 6, 4), (("data", "fsdp"), None, None)),
        (("batch", "length", "mlp"), (2, 6, 4), ("data", None, "tensor")),  # 2 rows: only data divides
        ((), (), ()),
    ],
)
def test_spec(axes, shape, expected):
    assert sharding.spec(axes, shape, mesh(data=2, fsdp=2, tensor=2)) == PartitionSpec(*expected)


def test_length_is_split_over_the_sequence_axis():
    made = mesh(sequence=4, data=2)
    assert sharding.spec(("batch", "length"), (2, 8), made) == PartitionSpec("data", "sequence")
    assert sharding.spec(("batch", "length"), (2, 6), made) == PartitionSpec("data", None)


def test_spec_refuses_unknown_names_and_too_many():
    with pytest.raises(ValueError, match="'embd'; did you mean 'embed'"):
        sharding.spec(("embd",), (4,), mesh(data=8))
    with pytest.raises(ValueError, match="fewer dimensions"):
        sharding.spec(("embed", "mlp"), (4,), mesh(data=8))


def test_batch_sharding_splits_rows_of_every_rank():
    made = mesh(data=2, fsdp=2, tensor=2)
    for shape in ((8,), (8, 3), (8, 3, 2)):
        x = jax.device_put(jnp.zeros(shape), sharding.batch_sharding(made))
        assert {s.data.shape for s in x.addressable_shards} == {(2, *shape[1:])}
    assert sharding.batch_ways(made) == 4


def test_constrain_acts_inside_the_context_only():
    made = mesh(data=2, fsdp=2, tensor=2)
    x = jnp.arange(4.0 * 6 * 2).reshape(4, 6, 2)

    def inside(x):
        with sharding.tracing(made):
            return constrain(2 * x, "batch", "length", "heads")

    y = jax.jit(inside)(x)
    assert y.sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert (y == 2 * x).all()
    assert constrain(x, "batch", "length", "heads") is x
    with pytest.raises(ValueError, match="needs 3 axis names"):
        constrain(x, "batch", "length")
    with sharding.tracing(made), pytest.raises(ValueError, match="'lenght'; did you mean 'length'"):
        constrain(x, "batch", "lenght", "heads")


def test_first_values_where_every_core_is_a_device():
    """Orthogonal matrices are of a library that waits for threads, which devices that wait so would hold."""
    program = (
        "import jax; from configs import lm; from training import config, setup; chosen = lm.get_config('mixer=rwkv4')\n"
        "chosen.optimizer.name = 'adamw'; built = setup.build(config.resolve(chosen, with_data=False), for_training=True)\n"
        "with jax.set_mesh(built.mesh): state = jax.block_until_ready(built.init(jax.random.key(0)))\n"
        "assert all(leaf.sharding == at for leaf, at in zip(*map(jax.tree.leaves, (state, built.shardings))))"
    )
    flags = f"--xla_force_host_platform_device_count={min(max(2, os.cpu_count()), 16)}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env=environment, timeout=300)

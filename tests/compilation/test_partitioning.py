"""What the compiler of this machine sends between eight devices for what each of them could do alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from compilation import hlo
from models import mixer
from ops.long_convolution import long_convolution
from training import sharding


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices())


def convolved(mesh, x, kernel):
    with sharding.tracing(mesh):
        y, vjp = jax.vjp(long_convolution, x, kernel)
        return y, *vjp(jnp.cos(y))


def mixed(mesh, x, kernel):
    with sharding.tracing(mesh):
        model = mixer.create("fnet", x.shape[2], causal=False, rngs=nnx.Rngs(0))
        y, vjp = jax.vjp(lambda x: model(x)[0], x)
        return y, *vjp(jnp.cos(y))


@pytest.mark.parametrize("function", [convolved, mixed])
def test_transforms_stay_with_their_rows(mesh, function):
    """Forwards and backwards nothing is gathered; gradients of a kernel are summed over the devices that have other rows."""
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    random = np.random.default_rng(0)
    x = jax.device_put(random.standard_normal((8, 16, 6)).astype(np.float32), rows)
    kernel = jax.device_put(random.standard_normal((6, 16)).astype(np.float32), sharding.replicated(mesh))
    compiled = jax.jit(lambda x, kernel: function(mesh, x, kernel)).lower(x, kernel).compile()
    sent = hlo.Program(compiled.as_text()).sent(dict(mesh.shape))
    assert {one.kind for one in sent} == ({"all-reduce"} if function is convolved else set())
    assert all(set(one.axes.split(",")) <= {"data", "fsdp"} for one in sent)
    alone = sharding.make_mesh({}, jax.devices()[:1])
    x, kernel = (jax.device_put(np.asarray(a), jax.devices()[0]) for a in (x, kernel))
    for whole, split in zip(function(alone, x, kernel), compiled(*map(np.asarray, (x, kernel))), strict=True):
        np.testing.assert_allclose(split, whole, atol=2e-5 * float(jnp.max(jnp.abs(whole))))

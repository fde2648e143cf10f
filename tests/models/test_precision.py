"""No product of a mixer is left to a platform's default, which is one pass of bfloat16 on TPUs and TF32 on GPUs."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from models import mixer as mixers
from ops import dispatch
from tests.collection import one_of_each_primitive
from tests.traced import products

WIDTH, LENGTH = 32, 23
HALF = {"bfloat16 bfloat16 float32 default", "bfloat16 bfloat16 bfloat16 default"}
FULL = {"float32 float32 float32 HIGHEST"}


def traced(name: str, dtype) -> set[str]:
    """The products of a mixer's forward and backward pass on a TPU."""
    kind = mixers.find(name)
    graph, params = nnx.split(mixers.sketch(name, WIDTH, causal=kind.causal, length=LENGTH, **kind.tiny))

    def described(p):
        x = p.get_value()
        return p.replace(jax.ShapeDtypeStruct(x.shape, x.dtype if p.get_metadata()["keep_float32"] else dtype))

    def run(params, x):
        y, pull_back = jax.vjp(lambda params, x: nnx.merge(graph, params)(x)[0], params, x)
        return pull_back(y)

    params = jax.tree.map(described, params, is_leaf=lambda p: isinstance(p, nnx.Variable))
    with dispatch.platform("tpu"):
        return set(products(jax.make_jaxpr(run)(params, jax.ShapeDtypeStruct((2, LENGTH, WIDTH), dtype))))


@pytest.mark.parametrize("name", one_of_each_primitive(mixers.names(), pytest.mark.thorough))
def test_products(name):
    """With compute_dtype=float32 all are float32 and HIGHEST; in bfloat16 none mixes types, and those in float32 are HIGHEST."""
    assert traced(name, jnp.float32) <= FULL
    assert traced(name, jnp.bfloat16) <= HALF | FULL

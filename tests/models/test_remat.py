"""What the backward pass has and what it computes again, under the policy of the marks."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from models import mixer as mixers
from models.stack import REMAT
from ops import dispatch, kept
from tests.collection import one_of_each_primitive
from tests.traced import equations


def recomputed(f):
    return jax.checkpoint(f, prevent_cse=False, policy=REMAT["elementwise"])


@pytest.mark.parametrize(("rows", "loops"), [(8, 2), (1, 3)])
def test_scan(rows, loops):
    """Values and gradients are those of the plain loop; it is run a second time only where its states are large."""
    xs = jnp.sin(jnp.arange(5.0 * rows * 3)).reshape(5, rows, 3)

    def body(state, x):
        state = jnp.tanh(state + jnp.cos(x.T @ x))
        return state, x @ state

    def loss(scan):
        def run(xs):
            state, y = scan(body, jnp.zeros((3, 3)), jnp.sin(xs))
            return jnp.sum(jnp.exp(y)) + jnp.sum(state)

        return run

    expected = jax.value_and_grad(loss(jax.lax.scan))(xs)
    got = jax.value_and_grad(recomputed(loss(kept.scan)))(xs)
    for a, b in zip(got, expected, strict=True):
        assert jnp.allclose(a, b, rtol=1e-5, atol=1e-6)
    gradient = jax.make_jaxpr(jax.jit(jax.grad(recomputed(loss(kept.scan)))))(xs).jaxpr
    assert sum(equation.primitive.name == "scan" for equation in equations(gradient)) == loops


@pytest.mark.parametrize("name", one_of_each_primitive(mixers.names(), pytest.mark.thorough))
def test_mixers(name):
    """On a GPU: no more is kept than without a policy, but for an output in the order of a loop beside that of its caller."""
    cls = mixers.find(name)
    graph, params = nnx.split(mixers.sketch(name, 768, causal=cls.causal, length=1024))
    x = jax.ShapeDtypeStruct((1, 1024, 768), jnp.float32)

    def run(params, x):
        return nnx.merge(graph, params)(x)[0].sum()

    def size(f) -> int:
        with dispatch.platform("gpu"):
            kept = jax.eval_shape(lambda params, x: jax.vjp(f, params, x)[1], params, x)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))

    assert size(recomputed(run)) <= 1.25 * size(run)

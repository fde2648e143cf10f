"""DeltaProduct with one step is the delta net that it extends."""

import jax
import pytest
from flax import nnx

from models import mixer as mixers
from tests.tolerance import assert_close


@pytest.mark.parametrize("gated,name", [(False, "delta_net"), (True, "gated_delta_net")])
def test_one_step(gated, name):
    """The same parameters by the same names, the same outputs."""
    sizes = {"expand_key": 1.0, "expand_value": 1.0, "negative_eigenvalues": True}
    simple = mixers.create(name, 16, rngs=nnx.Rngs(0), **sizes)
    product = mixers.create("delta_product", 16, rngs=nnx.Rngs(1), steps=1, gated=gated, **sizes)
    nnx.update(product, nnx.state(simple))
    x = jax.random.normal(jax.random.key(0), (1, 9, 16))
    assert_close(product(x)[0], simple(x)[0])

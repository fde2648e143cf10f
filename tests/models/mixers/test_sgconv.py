"""SGConv: the size of its kernel."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers
from models.mixers.sgconv import multiscale


@pytest.mark.parametrize("length,size,scales", [(512, 64, 4), (500, 64, 4), (16, 64, 1), (17, 16, 2)])
def test_kernel(length, size, scales):
    """As many scales as cover the length; of norm 1 at initialisation; decaying by alpha from scale to scale."""
    mixer = mixers.create("sgconv", 8, rngs=nnx.Rngs(0), length=length, kernel_size=size)
    assert mixer.pieces.shape[1] == scales
    kernel = multiscale(mixer.pieces[...], mixer.decays) / mixer.z[...][..., None]
    assert kernel.shape[-1] == size * 2 ** (scales - 1) >= length
    np.testing.assert_allclose(jnp.sum(kernel**2, -1), 1, rtol=1e-4)
    assert mixer.z.get_metadata()["group"] == "fixed"


def test_decay():
    """A kernel of equal parameters falls in steps of alpha."""
    kernel = np.asarray(multiscale(jnp.ones((1, 3, 1, 4)), (2.0, 2.0)))[0, 0]
    np.testing.assert_allclose(kernel, [4.0] * 4 + [2.0] * 4 + [1.0] * 8, rtol=1e-6)

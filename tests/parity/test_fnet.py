"""FNet against transformers' Fourier layer."""

import jax.numpy as jnp
import pytest

from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "transformers FNet"


@pytest.mark.parametrize("orthonormal", [False, True])
def test_layer(orthonormal):
    """The fast transform of whole sequences and the matrix of packed rows."""
    load("torch")
    fnet = load("transformers.models.fnet.modeling_fnet")
    both, arguments = mixer("fnet", causal=False, orthonormal=orthonormal)
    ours = lambda a: (both(a), both(a, segment_ids=jnp.ones((BATCH, LENGTH), jnp.int32)))
    layer = fnet.FNetBasicFourierTransform(fnet.FNetConfig(hidden_size=WIDTH))

    def theirs(a):
        y = layer(a["x"])[0] / ((WIDTH * LENGTH) ** 0.5 if orthonormal else 1.0)
        return y, y

    assert_parity(ours, theirs, arguments)

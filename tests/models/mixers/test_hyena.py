"""Hyena: its filters."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import mixer as mixers
from tests.tolerance import assert_close


def test_time_axis():
    """Time runs from 0 to 1 over the model's length, not the sequence's: fewer lags are the same filter, cut."""
    mixer = mixers.create("hyena", 4, rngs=nnx.Rngs(0), length=20, order=3)
    assert mixer.filters(20).shape == (2, 4, 20)
    assert_close(mixer.filters(7), mixer.filters(20)[..., :7])


def test_window():
    """Where the MLP is constant in time a filter is its window, which falls to 0.01 at t = 1.5 in the first channel and at
    t = 0.3 in the last."""
    mixer = mixers.create("hyena", 5, rngs=nnx.Rngs(0), length=11, filter_layers=0)
    mixer.filter_in[...] = jnp.zeros_like(mixer.filter_in[...])
    h = np.asarray(mixer.filters(11))[0]
    rates = -np.log(h[:, 10] / h[:, 0])
    np.testing.assert_allclose(rates, np.linspace(np.log(100) / 1.5, np.log(100) / 0.3, 5), rtol=1e-4)

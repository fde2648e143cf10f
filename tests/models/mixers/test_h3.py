"""H3: what its authors' code says of the parameters at initialisation."""

import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers


def test_initialisation():
    """A = -1/2 + i pi n, dt log-uniform in [0.001, 0.1], taps of the shift like those of a convolution with N inputs."""
    mixer = mixers.create("h3", 256, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(-np.exp(mixer.log_a_real[...]), -0.5, rtol=1e-6)
    np.testing.assert_allclose(mixer.a_imag[0], np.pi * np.arange(32), rtol=1e-6)
    log_dt = np.asarray(mixer.log_dt[...])
    assert log_dt.min() >= np.log(0.99e-3) and log_dt.max() <= np.log(0.101)
    assert abs(log_dt.mean() - np.log(1e-2)) < 0.3
    assert 0.12 < np.abs(mixer.shift[...]).max() <= 64**-0.5


def test_refusals():
    with pytest.raises(ValueError, match="head_size"):
        mixers.create("h3", 32, rngs=nnx.Rngs(0), head_size=5)
    with pytest.raises(ValueError, match="even"):
        mixers.create("h3", 32, rngs=nnx.Rngs(0), state=7)

"""RG-LRU: what its paper says of its parameters, and the derivative of its root."""

import jax
import numpy as np
from flax import nnx

from models import mixer as mixers
from models.mixers.rglru import bounded_sqrt


def test_ring():
    """a = exp(-softplus(Lambda)) on the ring [0.9, 0.999], a^2 uniform."""
    mixer = mixers.create("rglru", 1024, rngs=nnx.Rngs(0))
    a = np.exp(-np.log1p(np.exp(np.asarray(mixer.lambda_[...], np.float64))))
    assert 0.9 - 1e-4 <= a.min() and a.max() <= 0.999 + 1e-4
    assert abs((a**2).mean() - (0.9**2 + 0.999**2) / 2) < 0.01


def test_bounded_root():
    """The root itself is exact; its derivative stops at 1000, also at zero."""
    assert bounded_sqrt(4.0) == 2.0
    slopes = [float(jax.grad(bounded_sqrt)(x)) for x in (4.0, 0.0, 1e-12)]
    np.testing.assert_allclose(slopes, [0.25, 1000.0, 1000.0], rtol=1e-5)

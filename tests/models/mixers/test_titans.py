"""How long Titans' memory lasts at initialisation."""

import jax
import numpy as np
from flax import nnx

from models import mixer as mixers


def test_initialisation():
    """Weight decay log-uniform in [0.001, 0.1]; momentum and step size 1/2."""
    mixer = mixers.create("titans", 64, rngs=nnx.Rngs(0), heads=32)
    alpha = np.asarray(jax.nn.sigmoid(mixer.b_alpha[...]))
    assert alpha.min() >= 0.99e-3 and alpha.max() <= 0.101
    assert abs(np.log(alpha).mean() - np.log(1e-2)) < 0.7  # the middle of the law, on a log scale
    assert not np.asarray(mixer.b_eta[...]).any() and not np.asarray(mixer.b_theta[...]).any()

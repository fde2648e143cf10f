"""LinOSS' two discretisations at initialisation: one forgets, the other keeps its energy."""

import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers
from tests.tolerance import assert_close


@pytest.mark.parametrize("discretization", ["im", "imex"])
def test_radius(discretization):
    """im: |eigenvalue|^2 = 1 / (1 + dt^2 A) < 1. imex: 1."""
    linoss = mixers.create("linoss", 8, rngs=nnx.Rngs(0), discretization=discretization)
    m, _ = linoss.discretize()
    radius = np.abs(np.linalg.eigvals(np.moveaxis(np.asarray(m, np.float64), 2, 0)))
    dt = 1 / (1 + np.exp(-np.asarray(linoss.s[...], np.float64)))
    expected = (1 + dt**2 * np.asarray(linoss.a[...])) ** -0.5 if discretization == "im" else np.ones_like(dt)
    assert_close(radius, np.stack([expected, expected], 1))

"""S4 starts as HiPPO-LegS."""

import numpy as np
from flax import nnx

from models import mixer as mixers
from ops.hippo import transition
from tests.tolerance import assert_close

SIZE = 8


def test_initial_system():
    """The diagonal plus low rank matrix has LegS' moments P^T A^k B."""
    s4 = mixers.create("s4", 4, rngs=nnx.Rngs(0), state=SIZE)
    pairs = lambda re, im: np.concatenate([re + 1j * im, re - 1j * im]).astype(np.complex128)
    p, b = (pairs(*np.asarray(z[...])[:, 0]) for z in (s4.p, s4.b))
    diagonal = pairs(-np.exp(np.asarray(s4.log_a_real[0])), np.asarray(s4.a_imag[0]))
    found = np.diag(diagonal) - np.outer(p, p.conj())
    A, B = transition("legs", SIZE)
    P = np.sqrt(np.arange(SIZE) + 0.5)
    for k in range(6):
        moment = p.conj() @ np.linalg.matrix_power(found, k) @ b
        assert_close(moment.real, P @ np.linalg.matrix_power(A, k) @ B)

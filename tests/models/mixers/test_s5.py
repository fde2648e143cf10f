"""S5 starts as a random read-out of HiPPO-LegS' normal part."""

import numpy as np
from flax import nnx

from models import mixer as mixers
from ops.hippo import transition
from tests.tolerance import assert_close

STATE, BLOCKS = 16, 2


def test_initial_system():
    """Every block has the eigenvalues of the normal part; B and C have entries of variance 1 / P before the change of basis."""
    s5 = mixers.create("s5", 64, rngs=nnx.Rngs(0), state=STATE, blocks=BLOCKS)
    a = np.asarray(s5.a_real[...]) + 1j * np.asarray(s5.a_imag[...])
    size = STATE // BLOCKS
    A, _ = transition("legs", size)
    P = np.sqrt(np.arange(size) + 0.5)
    expected = np.linalg.eigvals(A + np.outer(P, P))
    expected = np.sort(expected.imag[expected.imag > 0])
    for block in a.reshape(BLOCKS, -1):
        assert_close(np.sort(block.imag), expected)
        assert_close(block.real, np.full(size // 2, -0.5))
    b = np.asarray(s5.b[:, 0] + 1j * s5.b[:, 1])
    c = np.asarray(s5.c[0, 0] + 1j * s5.c[0, 1])
    # The half of the states that is kept holds half of B's energy, which is 1 for each channel.
    assert 0.7 < 2 * (np.abs(b) ** 2).sum() / 64 < 1.3
    assert 0.7 < (np.abs(c) ** 2).sum() / 64 < 1.3

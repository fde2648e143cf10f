"""The gated state space against the paper's equations, its states stepped with complex numbers in float64."""

import jax.numpy as jnp
import pytest

from tests.parity.oracles import BATCH, LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity
AGAINST = "the paper's equations in float64"


def test_layer():
    """The convolution of whole sequences and the recurrence of packed rows."""
    torch = load("torch")
    both, arguments = mixer("gss", state=6)
    one_segment = jnp.ones((BATCH, LENGTH), jnp.int32)
    ours = lambda a: (both(a), both(a, segment_ids=one_segment))
    gelu = lambda x: torch.nn.functional.gelu(x, approximate="tanh")

    def theirs(a):
        u, v = gelu(a["x"] @ a["w_u"]), gelu(a["x"] @ a["w_v"])
        eigenvalues = torch.complex(-torch.exp(a["log_a_real"]), torch.exp(a["log_a_imag"]))
        transition = torch.exp(eigenvalues)
        C = torch.complex(a["c"][0], a["c"][1])
        h, y = torch.zeros(*v.shape[::2], len(eigenvalues), dtype=C.dtype), []
        for t in range(LENGTH):
            h = transition * h + (transition - 1) / eigenvalues * v[:, t, :, None]
            y.append((C * h).sum(-1).real + a["d"] * v[:, t])
        o = ((torch.stack(y, 1) @ a["w_g"]) * u) @ a["w_o"]
        return o, o

    assert_parity(ours, theirs, arguments, dtype="float64")

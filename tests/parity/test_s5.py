"""S5 against the paper's equations, stepped with complex numbers in float64."""

import jax.numpy as jnp
import pytest

from tests.parity.oracles import BATCH, LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity
AGAINST = "the paper's equations in float64"


@pytest.mark.parametrize("causal", [True, False])
def test_equation(causal):
    """Zero-order hold of a diagonal system, read with conjugate symmetry, in one direction and in both."""
    torch = load("torch")
    function, arguments = mixer("s5", causal=causal, state=16, blocks=2)
    arguments["a_real"][0] = 0.3  # is cut off
    ids = jnp.asarray([[1] * 40 + [2] * (LENGTH - 40)] * BATCH)
    ours = lambda a: (function(a), function(a, segment_ids=ids))

    def theirs(a):
        eigenvalues = torch.complex(a["a_real"].clamp(max=-1e-4), a["a_imag"])
        a_bar = torch.exp(eigenvalues * torch.exp(a["log_dt"]))
        b_bar = torch.complex(a["b"][:, 0], a["b"][:, 1]) * ((a_bar - 1) / eigenvalues)

        def steps(c, x):
            C = torch.complex(c[0], c[1])
            h, y = torch.zeros(x.shape[0], len(a_bar), dtype=C.dtype), []
            for t in range(x.shape[1]):
                h = a_bar * h + x[:, t].to(C.dtype) @ b_bar
                y.append(2 * (h @ C).real)
            return torch.stack(y, 1)

        def layer(x):
            y = steps(a["c"][0], x) + a["d"] * x
            if not causal:
                y = y + steps(a["c"][1], x.flip(1)).flip(1)
            y = torch.nn.functional.gelu(y, approximate="tanh")
            return y * torch.sigmoid(y @ a["w"])

        return layer(a["x"]), torch.cat([layer(a["x"][:, :40]), layer(a["x"][:, 40:])], 1)

    forms = ("sequential", "associative") if causal else ("auto",)
    assert_parity(ours, theirs, arguments, forms=forms, dtype="float64")

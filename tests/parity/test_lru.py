"""The linear recurrent unit against the paper's equations, stepped with complex numbers in float64."""

import pytest

from tests.parity.oracles import assert_parity, load, mixer

pytestmark = pytest.mark.parity
AGAINST = "equations in float64"


def test_equation():
    """Arxiv 2303.06349, equation 7 with the exponential parametrisation of section 3.3, then GELU and the gate."""
    torch = load("torch")
    ours, arguments = mixer("lru", state=24, r_min=0.5)

    def theirs(a):
        eigenvalue = torch.exp(torch.complex(-torch.exp(a["nu_log"]), torch.exp(a["theta_log"])))
        B = torch.complex(a["b"][:, 0], a["b"][:, 1])
        C = torch.complex(a["c"][0], a["c"][1])
        x = a["x"]
        h, y = torch.zeros(x.shape[0], B.shape[1], dtype=B.dtype), []
        for t in range(x.shape[1]):
            h = eigenvalue * h + torch.exp(a["gamma_log"]) * (x[:, t].to(B.dtype) @ B)
            y.append((h @ C).real + a["d"] * x[:, t])
        y = torch.nn.functional.gelu(torch.stack(y, 1), approximate="tanh")
        return torch.nn.functional.glu(torch.einsum("btd,dge->btge", y, a["w_out"]).flatten(2))

    assert_parity(ours, theirs, arguments, forms=("sequential", "associative"), dtype="float64")

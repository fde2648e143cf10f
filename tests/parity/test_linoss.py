"""LinOSS against the paper's two discretisations, each step solved as it is stated, in float64."""

import jax.numpy as jnp
import pytest

from tests.parity.oracles import BATCH, LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity
AGAINST = "the paper's equations in float64"


@pytest.mark.parametrize("discretization", ["im", "imex"])
def test_steps(discretization):
    """Whole sequences and packed rows; some oscillators have no restoring force at all."""
    torch = load("torch")
    function, arguments = mixer("linoss", state=6, discretization=discretization)
    arguments["a"][:2] = -0.5
    ids = jnp.asarray([[1] * 40 + [2] * (LENGTH - 40)] * BATCH)
    ours = lambda a: (function(a), function(a, segment_ids=ids))

    def theirs(a):
        stiffness, dt = torch.relu(a["a"]), torch.sigmoid(a["s"])
        B, C = torch.complex(a["b"][:, 0], a["b"][:, 1]), torch.complex(a["c"][0], a["c"][1])

        def layer(x):
            v, p, y = 0.0, 0.0, []
            for t in range(x.shape[1]):
                force = x[:, t].to(B.dtype) @ B
                if discretization == "im":
                    # p = p_old + dt v and v = v_old + dt (force - A p), solved for v.
                    v = (v + dt * (force - stiffness * p)) / (1 + dt**2 * stiffness)
                else:
                    v = v + dt * (force - stiffness * p)
                p = p + dt * v
                y.append((p @ C).real + a["d"] * x[:, t])
            y = torch.nn.functional.gelu(torch.stack(y, 1), approximate="tanh")
            return torch.nn.functional.glu(torch.einsum("btd,dge->btge", y, a["w_out"]).flatten(2))

        return layer(a["x"]), torch.cat([layer(a["x"][:, :40]), layer(a["x"][:, 40:])], 1)

    assert_parity(ours, theirs, arguments, forms=("sequential", "associative"), dtype="float64")

"""S4 against the paper's continuous system, discretised and stepped as a dense complex matrix recurrence in float64."""

import jax.numpy as jnp
import pytest

from tests.parity.oracles import BATCH, LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity
AGAINST = "the paper's equations in float64"

STATE = 8


@pytest.mark.parametrize("causal", [True, False])
def test_dense(causal):
    """The convolution of whole sequences and the recurrence of packed rows, in one direction and in both."""
    torch = load("torch")
    both, arguments = mixer("s4", causal=causal, state=STATE)
    one_segment = jnp.ones((BATCH, LENGTH), jnp.int32)
    ours = lambda a: (both(a), both(a, segment_ids=one_segment))

    def theirs(a):
        all_states = lambda re, im: torch.cat([torch.complex(re, im), torch.complex(re, -im)], -1)
        eigenvalues = all_states(-torch.exp(a["log_a_real"]), a["a_imag"])
        p, b = all_states(*a["p"]), all_states(*a["b"])
        A = torch.diag_embed(eigenvalues) - p[:, :, None] * p[:, None].conj()
        half_step, identity = torch.exp(a["log_dt"])[:, None, None] / 2, torch.eye(STATE, dtype=A.dtype)
        left = identity - half_step * A
        a_bar = torch.linalg.solve(left, identity + half_step * A)
        b_bar = torch.linalg.solve(left, 2 * half_step[..., 0] * b)

        def steps(c, x):
            h, y = torch.zeros(*x.shape[::2], STATE, dtype=A.dtype), []
            for t in range(x.shape[1]):
                h = (a_bar @ h[..., None])[..., 0] + b_bar * x[:, t, :, None]
                y.append((all_states(*c) * h).sum(-1))
            y = torch.stack(y, 1)
            assert y.imag.abs().max() < 1e-9 * y.real.abs().max()
            return y.real

        y = steps(a["c"][0], a["x"]) + a["d"] * a["x"]
        if not causal:
            # The second kernel acts from lag 1 on: what comes after a token, read from the far end.
            future = steps(a["c"][1], a["x"].flip(1)).flip(1)
            y = y + torch.nn.functional.pad(future[:, 1:], (0, 0, 0, 1))
        y = torch.nn.functional.gelu(y, approximate="tanh")
        y = torch.nn.functional.glu(torch.einsum("btd,dge->btge", y, a["w_out"]).flatten(2))
        return y, y

    assert_parity(ours, theirs, arguments, dtype="float64")

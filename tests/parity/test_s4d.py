"""S4D against the paper's continuous system, discretised and stepped as a dense real matrix recurrence in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from models.mixers.s4d import eigenvalues
from tests.parity.oracles import BATCH, LENGTH, assert_parity, load, mixer
from tests.tolerance import assert_close

pytestmark = pytest.mark.parity
AGAINST = "dense real system, discretised, in float64"

STATE = 8


@pytest.mark.parametrize("causal,discretization", [(True, "zoh"), (True, "bilinear"), (False, "zoh")])
def test_dense(causal, discretization):
    """The convolution of whole sequences and the recurrence of packed rows, in one direction and in both."""
    torch = load("torch")
    both, arguments = mixer("s4d", causal=causal, state=STATE, discretization=discretization)
    one_segment = jnp.ones((BATCH, LENGTH), jnp.int32)
    ours = lambda a: (both(a), both(a, segment_ids=one_segment))

    def system(a):
        """h' = A h + B x with a block [[re, -im], [im, re]] for each eigenvalue: A [D, N, N], B [D, N, 1]."""
        re, im = -torch.exp(a["log_a_real"]), a["a_imag"]
        blocks = torch.stack([torch.stack([re, -im], -1), torch.stack([im, re], -1)], -2)
        A = torch.stack([torch.block_diag(*channel) for channel in blocks])
        B = torch.tensor([1.0, 0.0], dtype=re.dtype).tile(re.shape[1])[None, :, None].expand(re.shape[0], -1, 1)
        return A, B

    def discretize(A, B, dt):
        dt, identity = dt[:, None, None], torch.eye(STATE, dtype=A.dtype)
        if discretization == "bilinear":
            left, right = identity - dt / 2 * A, identity + dt / 2 * A
            return torch.linalg.solve(left, right), torch.linalg.solve(left, dt * B)
        # exp of [[A, B], [0, 0]] dt is [[exp(A dt), int_0^dt exp(A s) B ds], [0, 1]].
        augmented = torch.nn.functional.pad(torch.cat([A, B], -1), (0, 0, 0, 1))
        result = torch.linalg.matrix_exp(dt * augmented)
        return result[:, :STATE, :STATE], result[:, :STATE, STATE:]

    def steps(A, B, c, x):
        """y = 2 Re(C . h) for x [B, T, D]."""
        read = 2 * torch.stack([c[0], -c[1]], -1).flatten(-2)
        h, y = torch.zeros(*x.shape[::2], STATE, dtype=x.dtype), []
        for t in range(x.shape[1]):
            h = (A @ h[..., None] + B * x[:, t, :, None, None])[..., 0]
            y.append((read * h).sum(-1))
        return torch.stack(y, 1)

    def theirs(a):
        A, B = discretize(*system(a), torch.exp(a["log_dt"]))
        y = steps(A, B, a["c"][0], a["x"]) + a["d"] * a["x"]
        if not causal:
            # The second kernel acts from lag 1 on: what comes after a token, read from the far end.
            future = steps(A, B, a["c"][1], a["x"].flip(1)).flip(1)
            y = y + torch.nn.functional.pad(future[:, 1:], (0, 0, 0, 1))
        y = torch.nn.functional.gelu(y, approximate="tanh")
        y = torch.nn.functional.glu(torch.einsum("btd,dge->btge", y, a["w_out"]).flatten(2))
        return y, y

    assert_parity(ours, theirs, arguments, forms=("sequential", "chunked"), dtype="float64")


def test_legs():
    """S4D-LegS: the eigenvalues of HiPPO-LegS' normal part A + P P^T, by a general eigenvalue solver."""
    n = np.arange(2 * STATE)
    A = -np.sqrt(np.outer(2 * n + 1, 2 * n + 1)) * (n[:, None] > n) - np.diag(n + 1)
    P = np.sqrt(n + 0.5)
    expected = np.linalg.eigvals(A + np.outer(P, P))
    expected = expected[expected.imag > 0]
    expected = expected[np.argsort(expected.imag)]
    real, imag = eigenvalues("legs", 2 * STATE)
    assert_close(real, expected.real)
    assert_close(imag, expected.imag)

"""DSS against the paper's kernels, written out and convolved term by term in float64."""

import jax.numpy as jnp
import pytest

from tests.parity.oracles import BATCH, LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity
AGAINST = "the paper's equations in float64"


@pytest.mark.parametrize("kernel,causal", [("exp", True), ("exp", False), ("softmax", True)])
def test_kernel(kernel, causal):
    """The convolution of whole sequences and the recurrence of packed rows; the softmax with growing and decaying modes."""
    torch = load("torch")
    both, arguments = mixer("dss", causal=causal, kernel=kernel, state=4, length=LENGTH, dt_min=0.05)
    one_segment = jnp.ones((BATCH, LENGTH), jnp.int32)
    ours = lambda a: (both(a), both(a, segment_ids=one_segment))
    if kernel == "softmax":
        arguments["a_real"] = arguments["a_real"] + [0, 1, 0, 20]

    def theirs(a):
        real = -torch.exp(a["a_real"]) if kernel == "exp" else a["a_real"]
        eigenvalues = torch.complex(real, a["a_imag"])
        dt = torch.exp(a["log_dt"])[:, None]
        lags = torch.arange(LENGTH)
        if kernel == "exp":
            modes = torch.exp(lags * (dt * eigenvalues)[..., None])
            modes = modes * ((torch.exp(dt * eigenvalues) - 1) / eigenvalues)[..., None]
        else:
            step = dt * eigenvalues
            step = torch.complex(step.real.clamp(max=40 / LENGTH), step.imag)
            modes = torch.exp(lags * step[..., None])
            modes = modes / modes.sum(-1, keepdim=True) / eigenvalues[:, None]
        kernels = torch.einsum("ydn,dnl->ydl", torch.complex(a["w"][:, 0], a["w"][:, 1]), modes).real
        x, y = a["x"], []
        for t in range(LENGTH):
            o = a["d"] * x[:, t] + sum(kernels[0, :, t - s] * x[:, s] for s in range(t + 1))
            if not causal:
                o = o + sum(kernels[1, :, s - t - 1] * x[:, s] for s in range(t + 1, LENGTH))
            y.append(o)
        y = torch.nn.functional.gelu(torch.stack(y, 1), approximate="tanh") @ a["w_out"]
        return y, y

    assert_parity(ours, theirs, arguments, dtype="float64")

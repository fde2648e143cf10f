"""sLSTM against the paper's equations in float64, token by token and with nothing kept in range."""

import numpy as np
import pytest

from tests.parity.oracles import BATCH, LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64"


@pytest.mark.parametrize("exponent", [0.0, 90.0])
def test_layer(exponent):
    """Exponents of moderate size, and exponents that float32 could not hold."""
    torch = load("torch")
    F = torch.nn.functional
    ours, arguments = mixer("slstm")
    arguments["b"][0] += np.float32(exponent)
    heads, size = arguments["norm_weight"].shape

    def theirs(a):
        x, taps = a["x"], a["conv"].shape[0]
        conv = F.conv1d(F.pad(x.mT, (taps - 1, 0)), a["conv"].T[:, None], a["conv_bias"], groups=x.shape[-1]).mT
        seen = {"i": F.silu(conv), "f": F.silu(conv), "z": x, "o": x}
        W = {"i": a["w_if"][:, :, 0], "f": a["w_if"][:, :, 1], "z": a["w_zo"][:, :, 0], "o": a["w_zo"][:, :, 1]}
        h = c = n = torch.zeros(BATCH, heads * size, dtype=x.dtype)
        outputs = []
        for t in range(LENGTH):
            gate = {}
            for g, name in enumerate("ifzo"):
                recurrent = h @ torch.block_diag(*a["r"][:, :, g])
                gate[name] = seen[name][:, t] @ torch.block_diag(*W[name]) + recurrent + a["b"][g].flatten()
            i, f = torch.exp(gate["i"]), torch.sigmoid(gate["f"])
            c, n = f * c + i * torch.tanh(gate["z"]), f * n + i
            h = torch.sigmoid(gate["o"]) * c / n
            outputs.append(h)
        h = torch.stack(outputs, 1).unflatten(-1, (heads, size))
        return (F.layer_norm(h, (size,), eps=1e-5) * a["norm_weight"]).flatten(2)

    assert_parity(ours, theirs, arguments, dtype="float64")

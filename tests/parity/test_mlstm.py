"""mLSTM against the paper's equations in float64, token by token and with nothing kept in range."""

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
    ours, arguments = mixer("mlstm")
    if exponent:  # of a bias alone: float32 rounds varying exponents of this size to 1e-5
        arguments["w_gates"][:, :, 0] = 0
        arguments["w_qkv"][:2] += np.eye(4, dtype=np.float32)  # n . q > 0: h is not a quotient of almost nothing
        arguments["conv_bias"] += 1
        arguments["b_i"] += np.float32(exponent)
    heads = arguments["b_i"].size

    def theirs(a):
        u, z = torch.einsum("btd,dgi->gbti", a["x"], a["w_up"])
        taps = a["conv"].shape[0]
        c = F.conv1d(F.pad(u.mT, (taps - 1, 0)), a["conv"].T[:, None], a["conv_bias"], groups=u.shape[-1]).mT
        c = F.silu(c)
        q, k, v = (x @ torch.block_diag(*w) for x, w in zip((c, c, u), a["w_qkv"]))
        gates = torch.cat([q, k, v], -1) @ a["w_gates"].flatten(0, 1).flatten(1)
        i = torch.exp(gates[..., :heads] + a["b_i"])
        f = torch.sigmoid(gates[..., heads:] + a["b_f"])
        q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
        size = q.shape[-1]
        k = k / size**0.5
        C = torch.zeros(BATCH, heads, size, size, dtype=q.dtype)
        n, h = torch.zeros(BATCH, heads, size, dtype=q.dtype), []
        for t in range(LENGTH):
            write, keep = (g[:, t, :, None] for g in (i, f))
            C = keep[..., None] * C + write[..., None] * v[:, t, :, :, None] * k[:, t, :, None]
            n = keep * n + write * k[:, t]
            read = torch.einsum("bhvk,bhk->bhv", C, q[:, t])
            h.append(read / (n * q[:, t]).sum(-1, keepdim=True).abs().clamp(min=1))
        h = torch.stack(h, 1)
        h = F.layer_norm(h, (size,), eps=1e-5) * a["norm_weight"]
        return ((h.flatten(2) + a["skip"] * c) * F.silu(z)) @ a["w_down"]

    # A factor common to all large writes cancels: b_i has no gradient then.
    constant = ("b_i",) if exponent else ()
    forms = ("sequential", "chunked")
    assert_parity(ours, theirs, arguments, forms=forms, dtype="float64", constant=constant, optimised=bool(exponent))

"""Titans' linear memory against its definition: a memory trained token by token, gradients by autograd, in float64."""

import pytest

from tests.parity.oracles import assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64, the inner gradient by autograd"


def test_layer():
    """The layer, short convolutions and gates included."""
    torch = load("torch")
    ours, arguments = mixer("titans", expand_value=1.5)
    heads = arguments["w_o"].shape[0]
    functional = torch.nn.functional

    def branch(a, name):
        x = functional.pad(a["x"] @ a[f"{name}.weight"], (0, 0, 3, 0)).mT
        taps = a[f"{name}.taps"]
        x = functional.silu(functional.conv1d(x, taps.T[:, None], groups=taps.shape[1]))
        return x.unflatten(1, (heads, -1)).permute(0, 3, 1, 2)  # [B, T, H, size]

    def loss(memory, k, v):
        return (torch.einsum("bhkv,bhk->bhv", memory, k) - v).square().sum() / 2

    def theirs(a):
        q, k, v = (branch(a, name) for name in "qkv")
        q, k = (u / (u.square().sum(-1, keepdim=True) + 1e-6).sqrt() for u in (q, k))
        gates = (torch.sigmoid(a["x"] @ a[f"w_{n}"] + a[f"b_{n}"])[..., None, None] for n in ("alpha", "eta", "theta"))
        alpha, eta, theta = gates
        M = S = torch.zeros(q.shape[0], heads, q.shape[-1], v.shape[-1], dtype=q.dtype)
        outputs = []
        for t in range(q.shape[1]):
            gradient = torch.func.grad(loss)(M, k[:, t], v[:, t])
            S = eta[:, t] * S - theta[:, t] * gradient
            M = (1 - alpha[:, t]) * M + S
            outputs.append(torch.einsum("bhkv,bhk->bhv", M, q[:, t]) * q.shape[-1] ** -0.5)
        o = functional.rms_norm(torch.stack(outputs, 1), v.shape[-1:], a["norm.weight"], 1e-6)
        gate = functional.silu(torch.einsum("btd,dhv->bthv", a["x"], a["w_g"]))
        return torch.einsum("bthv,hvd->btd", o * gate, a["w_o"])

    assert_parity(ours, theirs, arguments, forms=("chunked",), dtype="float64")

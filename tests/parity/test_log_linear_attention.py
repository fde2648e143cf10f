"""Log-linear Mamba-2 against flash-linear-attention's dense form, in transformers' Mamba-2 layer."""

import pytest

from tests.parity.oracles import LENGTH, WIDTH, assert_parity, load, load_fla, mixer

pytestmark = pytest.mark.parity

AGAINST = "fla naive_log_linear_attn"


def test_layer():
    """The layer; its length takes two chunks, and one level beyond them."""
    torch = load("torch")
    fla = load_fla("log_linear_attn")
    heads, state, levels = 2, 8, LENGTH.bit_length() + 1
    ours, arguments = mixer("log_linear_attention", state=state, heads=heads, levels=levels)
    functional = torch.nn.functional

    def branch(a, name):
        x = functional.pad(a["x"] @ a[f"w_{name}"], (0, 0, 3, 0)).mT
        taps = a[f"conv_{name}"]
        return functional.silu(functional.conv1d(x, taps.T[:, None], a[f"conv_{name}_bias"], groups=taps.shape[1])).mT

    def theirs(a):
        u = branch(a, "u").unflatten(2, (heads, -1))
        b, c = branch(a, "bc").unsqueeze(2).split(state, -1)
        dt = functional.softplus(a["x"] @ a["w_dt"] + a["dt_bias"])
        weights = functional.softplus(a["scale_lambda"] * torch.einsum("btd,dhl->bthl", a["x"], a["w_lambda"]))
        o = fla.naive_log_linear_attn(c, b, dt[..., None] * u, -torch.exp(a["a_log"]) * dt, weights)
        o = (o + a["d"][:, None] * u).flatten(2) * functional.silu(a["x"] @ a["w_z"])
        return functional.rms_norm(o, (2 * WIDTH,), a["norm.weight"], 1e-5) @ a["w_out"]

    assert_parity(ours, theirs, arguments, dtype="float64")

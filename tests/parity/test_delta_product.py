"""DeltaProduct against flash-linear-attention's recurrence, in a layer written out."""

import pytest

from tests.parity.oracles import assert_parity, load, load_fla, mixer

pytestmark = pytest.mark.parity

AGAINST = "fla naive_recurrent_gated_delta_product"


@pytest.mark.parametrize("gated,steps,form", [(False, 3, "sequential"), (True, 2, "chunked")])
def test_layer(gated, steps, form):
    """Two and three steps per token, with and without gates; beta up to 2."""
    torch = load("torch")
    fla = load_fla("gated_delta_product")
    ours, arguments = mixer("delta_product", gated=gated, steps=steps)
    heads, value, _ = arguments["w_o"].shape
    functional = torch.nn.functional

    def branch(a, name):
        """[B, n T, H, size]"""
        x = functional.pad(a["x"] @ a[f"{name}.weight"], (0, 0, 3, 0)).mT
        taps = a[f"{name}.taps"]
        x = functional.silu(functional.conv1d(x, taps.T[:, None], groups=taps.shape[1])).mT
        return x.unflatten(2, (-1, heads, value)).flatten(1, 2)

    def theirs(a):
        q, k, v = (branch(a, name) for name in "qkv")
        q, k = (u / (u.square().sum(-1, keepdim=True) + 1e-6).sqrt() for u in (q, k))
        beta = 2 * torch.sigmoid(a["x"] @ a["w_b"]).unflatten(2, (steps, heads)).flatten(1, 2)
        g = -torch.exp(a["a_log"]) * functional.softplus(a["x"] @ a["w_a"] + a["dt_bias"]) if gated else None
        scale = q.shape[-1] ** -0.5
        o, _ = fla.naive_recurrent_gated_delta_product(q, k, v, g, beta, scale, num_householder=steps)
        o = functional.rms_norm(o, o.shape[-1:], a["norm.weight"], 1e-6)
        if gated:
            o = o * functional.silu(torch.einsum("btd,dhv->bthv", a["x"], a["w_g"]))
        return torch.einsum("bthv,hvd->btd", o, a["w_o"])

    assert_parity(ours, theirs, arguments, forms=(form,))

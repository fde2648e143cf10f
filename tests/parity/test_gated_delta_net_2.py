"""Gated DeltaNet-2's rule against flash-linear-attention, with the maps around it written out."""

import pytest

from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, load_fla, mixer, normal

pytestmark = pytest.mark.parity

AGAINST = "fla naive_recurrent_gdn2"


@pytest.mark.parametrize("groups,negative,form", [(1, True, "sequential"), (1, False, "chunked"), (2, False, "auto")])
def test_layer(groups, negative, form, monkeypatch):
    """The layer, short convolutions and gates included; with two value heads for each key head, too.

    The library's function is made to compute in float64: its float32 has errors of more than the tolerance.
    """
    torch, rule = load("torch"), load_fla("gdn2").naive_recurrent_gdn2
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    F = torch.nn.functional
    heads = 4 // groups
    ours, arguments = mixer("gated_delta_net_2", heads=heads, value_heads=4, negative_eigenvalues=negative)
    arguments["x"] = 0.5 * normal(BATCH, LENGTH, WIDTH, seed=22)

    def convolved(a, name):
        u = F.pad((a["x"] @ a[f"{name}.weight"]).mT, (3, 0))
        return F.silu(F.conv1d(u, a[f"{name}.taps"].T[:, None], groups=u.shape[1])).mT

    def unit(y):
        return y * torch.rsqrt((y * y).sum(-1, keepdim=True) + 1e-6)

    def theirs(a):
        q, k = (unit(convolved(a, n).unflatten(2, (heads, -1))) for n in "qk")
        v = convolved(a, "v").unflatten(2, (4, -1))
        f = torch.einsum("btr,rhk->bthk", a["x"] @ a["w_f1"], a["w_f2"])
        g = -torch.exp(a["a_log"])[:, None] * F.softplus(f + a["dt_bias"])
        b, w = (torch.sigmoid(torch.einsum("btd,dhk->bthk", a["x"], a[n])) for n in ("w_b", "w_w"))
        q, k, g, b = (y.repeat_interleave(groups, 2) for y in (q, k, g, b))
        o, _ = rule(q, k, v, g, (1 + negative) * b, w)
        o = F.rms_norm(o, o.shape[-1:], a["norm.weight"], eps=1e-5)
        gate = torch.sigmoid(torch.einsum("btr,rhv->bthv", a["x"] @ a["w_g1"], a["w_g2"]) + a["b_g"])
        return torch.einsum("bthv,hvd->btd", gate * o, a["w_o"])

    assert_parity(ours, theirs, arguments, forms=(form,), dtype="float64")

"""Comba's rule against flash-linear-attention, with the maps around it written out.

The library's token-by-token function decays before the feedback and is another rule; its chunks are what its kernels compute.
"""

import pytest

from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, load_fla, mixer, normal

pytestmark = pytest.mark.parity

AGAINST = "fla naive_chunk_comba"


@pytest.mark.parametrize("groups,form", [(1, "sequential"), (1, "chunked"), (2, "auto")])
def test_layer(groups, form):
    """The layer, short convolutions and gates included; with two value heads for each key head, too."""
    torch, rule = load("torch"), load_fla("comba").naive_chunk_comba
    F = torch.nn.functional
    heads = 4 // groups
    ours, arguments = mixer("comba", heads=heads, value_heads=4)
    arguments["x"] = normal(BATCH, LENGTH, WIDTH, seed=21)

    def convolved(a, name):
        u = F.pad((a["x"] @ a[f"{name}.weight"]).mT, (3, 0))
        return F.silu(F.conv1d(u, a[f"{name}.taps"].T[:, None], groups=u.shape[1])).mT

    def unit(y):
        return y * torch.rsqrt((y * y).sum(-1, keepdim=True) + 1e-6)

    def theirs(a):
        q, k = (unit(convolved(a, n).unflatten(2, (heads, -1))) for n in "qk")
        p = torch.sigmoid(a["c"])[:, None] * k
        q, k, p = (y.repeat_interleave(groups, 2) for y in (q - a["d"][:, None] * p, k, p))
        v = convolved(a, "v").unflatten(2, (4, -1))
        g = -torch.exp(a["a_log"]) * F.softplus(a["x"] @ a["w_a"] + a["dt_bias"])
        o, _ = rule(q, k, v, p, g, torch.sigmoid(a["x"] @ a["w_b"]), chunk_size=16)
        o = F.rms_norm(o, o.shape[-1:], a["norm.weight"], eps=1e-5)
        gate = torch.sigmoid(torch.einsum("btd,dhv->bthv", a["x"], a["w_g"]))
        return torch.einsum("bthv,hvd->btd", gate * o, a["w_o"])

    assert_parity(ours, theirs, arguments, forms=(form,))

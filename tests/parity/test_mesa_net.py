"""MesaNet against flash-linear-attention's exact solution, with the maps around it written out."""

import pytest

from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, load_fla, mixer, normal

pytestmark = pytest.mark.parity

AGAINST = "fla naive_mesa_net_exact"


@pytest.mark.parametrize("gate,form", [(False, "sequential"), (True, "chunked")])
def test_layer(gate, form):
    """Its linear systems are solved by PyTorch, which also differentiates the solutions."""
    torch, fla = load("torch"), load_fla("mesa_net")
    F = torch.nn.functional
    heads, bound = 4, 0.25
    ours, arguments = mixer("mesa_net", heads=heads, lower_bound=bound, steps=16, gate=gate)
    arguments["x"] = normal(BATCH, LENGTH, WIDTH, seed=22)

    def convolved(a, name):
        u = F.pad((a["x"] @ a[f"{name}.weight"]).mT, (3, 0))
        u = F.silu(F.conv1d(u, a[f"{name}.taps"].T[:, None], groups=u.shape[1])).mT.unflatten(2, (heads, -1))
        return u * torch.rsqrt((u * u).sum(-1, keepdim=True) + 1e-6)

    def theirs(a):
        v = torch.einsum("btd,dhv->bthv", a["x"], a["w_v"])
        g, beta = (torch.einsum("btd,dgh->btgh", a["x"], a["w_gates"]) + a["b_gates"]).unbind(2)
        ridge = bound + F.softplus(a["ridge"])
        q, k = convolved(a, "q"), convolved(a, "k")
        o, _, _ = fla.naive_mesa_net_exact(q, k, v, F.logsigmoid(g), ridge, torch.sigmoid(beta))
        o = F.rms_norm(o, o.shape[-1:], a["norm.weight"], eps=1e-5)
        if gate:
            o = o * F.silu(torch.einsum("btd,dhv->bthv", a["x"], a["w_g"]))
        return torch.einsum("bthv,hvd->btd", o, a["w_o"])

    assert_parity(ours, theirs, arguments, forms=(form,))

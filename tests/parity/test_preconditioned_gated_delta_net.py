"""The preconditioned gated delta rule against flash-linear-attention, with the maps around it written out."""

import types

import pytest

from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, load_fla, mixer, normal

pytestmark = pytest.mark.parity

AGAINST = "fla naive_recurrent_precond_gated_delta_rule"


class InFloat64:
    """PyTorch for a module that computes in float32 by name: its rounding errors are larger than the tolerance."""

    def __init__(self, torch):
        self.torch = torch

    def __getattr__(self, name):
        return getattr(self.torch, "float64" if name == "float32" else name)


@pytest.mark.parametrize("form", ["sequential", "chunked"])
def test_layer(form):
    """The layer, short convolutions and gates included."""
    torch, fla = load("torch"), load_fla("precond_gated_delta_rule")
    fla.torch = InFloat64(torch)
    # The kernels have this epsilon, and the plain function has not.
    unit = lambda y, **_: y * torch.rsqrt((y * y).sum(-1, keepdim=True) + 1e-6)
    fla.F = types.SimpleNamespace(normalize=unit)
    F = torch.nn.functional
    heads = 4
    ours, arguments = mixer("preconditioned_gated_delta_net", heads=heads)
    arguments["x"] = normal(BATCH, LENGTH, WIDTH, seed=21)

    def convolved(a, name):
        u = F.pad((a["x"] @ a[f"{name}.weight"]).mT, (3, 0))
        return F.silu(F.conv1d(u, a[f"{name}.taps"].T[:, None], groups=u.shape[1])).mT.unflatten(2, (heads, -1))

    def theirs(a):
        q, k, v = (convolved(a, name) for name in "qkv")
        g, h = (
            -torch.exp(a["a_log"]) * F.softplus(torch.einsum("btd,dgh->btgh", a["x"], a["w_a"]) + a["dt_bias"])
        ).unbind(2)
        beta, gamma = torch.sigmoid(torch.einsum("btd,dgh->btgh", a["x"], a["w_b"])).unbind(2)
        o, _, _ = fla.naive_recurrent_precond_gated_delta_rule(q, k, v, h, g, gamma, beta, log_atk_scale=a["center"])
        o = F.rms_norm(o, o.shape[-1:], a["norm.weight"], eps=1e-5)
        gate = F.silu(torch.einsum("btd,dhv->bthv", a["x"], a["w_g"]))
        return torch.einsum("bthv,hvd->btd", gate * o, a["w_o"])

    assert_parity(ours, theirs, arguments, forms=(form,), dtype="float64")

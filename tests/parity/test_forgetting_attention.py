"""Forgetting attention: the plain layer against fla's naive attention, the "Pro" layer against its equations in float64."""

import pytest

from tests.parity.oracles import LENGTH, assert_parity, load, load_fla, mixer

pytestmark = pytest.mark.parity
AGAINST = "fla naive_forgetting_attn; the Pro layer: its equations in float64"
PLAIN = {"shift": False, "qk_norm": False, "output_norm": False, "output_gate": False}


def projections(torch, a):
    q, k, v = (torch.einsum("btd,dhk->bthk", a["x"], a[f"w_{n}"]) for n in "qkv")
    return q, k, v, torch.nn.functional.logsigmoid(a["x"] @ a["w_f"] + a["b_f"])


def test_fla():
    """Grouped heads and the decay."""
    torch, fla = load("torch"), load_fla("forgetting_attn")
    ours, arguments = mixer("forgetting_attention", kv_heads=2, **PLAIN)

    def theirs(a):
        return torch.einsum("bthk,hkd->btd", fla.naive_forgetting_attn(*projections(torch, a)), a["w_o"])

    assert_parity(ours, theirs, arguments)


def test_pro():
    """Shifted keys and values, norms and gate."""
    torch = load("torch")
    ours, arguments = mixer("forgetting_attention")

    def theirs(a):
        q, k, v, log_f = projections(torch, a)
        rms = lambda z: z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()

        def shifted(z, w):
            share = torch.sigmoid(a["x"] @ w)[..., None]
            return share * torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], 1) + (1 - share) * z

        k, v = shifted(k, a["w_ak"]), shifted(v, a["w_av"])
        q, k, c = rms(q) * a["q_weight"], rms(k) * a["k_weight"], log_f.cumsum(1).transpose(1, 2)
        s = torch.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5 + c[..., None] - c[..., None, :]
        p = torch.softmax(s.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf), -1)
        y = rms(torch.einsum("bhts,bshk->bthk", p, v)) * a["o_weight"]
        y = y * torch.sigmoid(torch.einsum("btd,dhk->bthk", a["x"], a["w_g"]))
        return torch.einsum("bthk,hkd->btd", y, a["w_o"])

    assert_parity(ours, theirs, arguments, dtype="float64")

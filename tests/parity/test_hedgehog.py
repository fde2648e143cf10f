"""Hedgehog against flash-linear-attention's plain linear attention, and against the paper's equation for all tokens."""

import pytest

from tests.parity.oracles import assert_parity, load, load_fla, mixer

pytestmark = pytest.mark.parity

AGAINST = "flash-linear-attention's plain linear attention; the paper's equations in float64"


def features(torch, a):
    """The queries and keys, mapped, and the values: [B, T, H, .]."""
    q, k, v = torch.einsum("btd,dshk->sbthk", a["x"], a["w_qkv"])
    maps = [torch.einsum("bthk,hkf->bthf", z, m) for z, m in zip((q, k), a["map"], strict=True)]
    spikes = [torch.cat([y.exp(), (-y).exp()], -1) for y in maps]
    return *(s / s.sum(-1, keepdim=True) for s in spikes), v


def test_causal():
    torch, fla = load("torch"), load_fla("linear_attn")
    # The library's epsilon is 1e-10, and fixed.
    ours, arguments = mixer("hedgehog", eps=1e-10)

    def theirs(a):
        y, _ = fla.naive_recurrent_linear_attn(*features(torch, a), scale=1.0, normalize=True)
        return torch.einsum("bthk,hkd->btd", y, a["w_o"])

    assert_parity(ours, theirs, arguments, forms=("sequential", "chunked"))


def test_two_sided():
    torch = load("torch")
    ours, arguments = mixer("hedgehog", causal=False, eps=0.1)

    def theirs(a):
        q, k, v = features(torch, a)
        similarity = torch.einsum("bthk,bshk->bhts", q, k)
        y = torch.einsum("bhts,bshk->bthk", similarity / (similarity.sum(-1, keepdim=True) + 0.1), v)
        return torch.einsum("bthk,hkd->btd", y, a["w_o"])

    assert_parity(ours, theirs, arguments, dtype="float64")

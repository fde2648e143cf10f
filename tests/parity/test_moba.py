"""MoBA against its equations in float64; no implementation of others runs here without a GPU and without packages of its own."""

import pytest

from tests.parity.oracles import LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity
AGAINST = "its equations in float64"


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_equations(kv_heads):
    """A last block that is incomplete; queries with fewer blocks behind them than they may choose, and with more."""
    torch = load("torch")
    block, top_k = 8, 3
    ours, arguments = mixer("moba", kv_heads=kv_heads, block=block, top_k=top_k, rotary_base=100.0)

    def theirs(a):
        q, k, v = (torch.einsum("btd,dhk->bthk", a["x"], a[f"w_{n}"]) for n in "qkv")
        angles = torch.arange(LENGTH, dtype=torch.float64)[:, None] * 100.0 ** (-torch.arange(0, 8, 2) / 8)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        turn = lambda z: torch.cat([z[..., :4] * cos - z[..., 4:] * sin, z[..., 4:] * cos + z[..., :4] * sin], -1)
        k, v = (z.repeat_interleave(4 // kv_heads, 2) for z in (turn(k), v))
        q = turn(q)
        whole = LENGTH // block
        means = k[:, : whole * block].unflatten(1, (whole, block)).mean(2)
        gate = torch.einsum("bthk,bnhk->bhtn", q, means)
        own = torch.arange(LENGTH) // block
        ahead = torch.arange(whole) >= own[:, None]
        gate = gate.masked_fill(ahead, -torch.inf)
        order = gate.argsort(-1, descending=True)[..., : top_k - 1]
        chosen = torch.zeros_like(gate, dtype=torch.bool).scatter(-1, order, True) & ~ahead
        # Of blocks to tokens: those of the chosen blocks, and those of the own.
        seen = torch.cat([chosen, torch.zeros_like(chosen[..., :1])], -1)[..., own] | (own[:, None] == own)
        seen &= torch.ones(LENGTH, LENGTH).tril().bool()
        s = torch.einsum("bthk,bshk->bhts", q, k) / 8**0.5
        y = torch.einsum("bhts,bshk->bthk", torch.softmax(s.masked_fill(~seen, -torch.inf), -1), v)
        return torch.einsum("bthk,hkd->btd", y, a["w_o"])

    assert_parity(ours, theirs, arguments, forms=("auto", "gathered"), dtype="float64")

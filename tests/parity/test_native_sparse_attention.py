"""Native sparse attention: fla's naive choice, compression and selection; the window and the maps around them written out."""

import sys
import types

import pytest

from tests.parity.oracles import LENGTH, assert_parity, load, load_fla, mixer

pytestmark = pytest.mark.parity
AGAINST = "fla naive_nsa_topk, naive_nsa_compression and naive_nsa_selection; the window in the equations"


@pytest.mark.parametrize("kv_heads,count", [(2, 5), (1, 3)])
def test_fla(monkeypatch, kv_heads, count):
    """A last block that is incomplete; blocks chosen by weight (5), and only those that are always read (3)."""
    torch = load("torch")
    for module, name in (("fla.ops.utils", "prepare_chunk_offsets"), ("fla.ops.utils.pooling", "mean_pooling")):
        absent = types.ModuleType(
            module
        )  # needs Triton; it is imported for packed rows, and for what is not called here
        setattr(absent, name, None)
        monkeypatch.setitem(sys.modules, module, absent)
    fla = load_fla("nsa")
    block, window, scale = 8, 11, 8**-0.5
    ours, arguments = mixer(
        "native_sparse_attention", kv_heads=kv_heads, block=block, count=count, window=window, rotary_base=100.0
    )

    def theirs(a):
        q, k, v = (torch.einsum("btd,dhk->bthk", a["x"], a[f"w_{n}"]) for n in "qkv")
        angles = torch.arange(LENGTH)[:, None] * 100.0 ** (-torch.arange(0, 8, 2) / 8)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        turn = lambda z: torch.cat([z[..., :4] * cos - z[..., 4:] * sin, z[..., 4:] * cos + z[..., :4] * sin], -1)
        q, k = turn(q), turn(k)
        # The last, incomplete block is seen by no query of cmp; its mean is of no consequence.
        means = [torch.cat([b.mean(1, keepdim=True) for b in z.split(block, 1)], 1) for z in (k, v)]
        with torch.no_grad():
            chosen = fla.naive_nsa_topk(q, means[0], count, block, scale)
        branches = [
            fla.naive_nsa_compression(q, *means, block, scale)[0],
            fla.naive_nsa_selection(q, k, v, chosen, block, scale),
        ]
        k, v = (z.repeat_interleave(4 // kv_heads, 2) for z in (k, v))
        s = scale * torch.einsum("bthk,bshk->bhts", q, k)
        seen = torch.ones(LENGTH, LENGTH).tril().bool() & ~torch.ones(LENGTH, LENGTH).tril(-window).bool()
        branches.append(torch.einsum("bhts,bshk->bthk", torch.softmax(s.masked_fill(~seen, -torch.inf), -1), v))
        gates = torch.sigmoid(torch.einsum("btd,dhc->bthc", a["x"], a["w_g"]))
        y = sum(gates[..., c, None] * branch for c, branch in enumerate(branches))
        return torch.einsum("bthk,hkd->btd", y, a["w_o"])

    assert_parity(ours, theirs, arguments)

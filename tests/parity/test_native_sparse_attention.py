"""Native sparse attention: fla's naive choice, compression and selection, and the paper's equations in float64 for blocks of
compression that overlap; the window and the maps around them written out."""

import math
import sys
import types

import pytest

from tests.parity.oracles import LENGTH, assert_parity, load, load_fla, mixer

pytestmark = pytest.mark.parity
AGAINST = (
    "fla naive_nsa_topk, naive_nsa_compression and naive_nsa_selection; the window, and overlaps, in the equations"
)
WINDOW, SCALE = 11, 8**-0.5


def layer(torch, a, compressed_and_selected):
    """The maps, the window and the gates around two branches of (q, k, v)."""
    q, k, v = (torch.einsum("btd,dhk->bthk", a["x"], a[f"w_{n}"]) for n in "qkv")
    angles = torch.arange(LENGTH)[:, None] * 100.0 ** (-torch.arange(0, 8, 2, dtype=q.dtype) / 8)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    turn = lambda z: torch.cat([z[..., :4] * cos - z[..., 4:] * sin, z[..., 4:] * cos + z[..., :4] * sin], -1)
    q, k = turn(q), turn(k)
    branches = compressed_and_selected(q, k, v)
    seen = torch.ones(LENGTH, LENGTH).tril().bool() & ~torch.ones(LENGTH, LENGTH).tril(-WINDOW).bool()
    branches = [*branches, attended(torch, q, k, v, seen.expand(len(q), 4, -1, -1))[0]]
    gates = torch.sigmoid(torch.einsum("btd,dhc->bthc", a["x"], a["w_g"]))
    y = sum(gates[..., c, None] * branch for c, branch in enumerate(branches))
    return torch.einsum("bthk,hkd->btd", y, a["w_o"])


def attended(torch, q, k, v, seen):
    """Attention to the keys that are seen, [B, H, T, S], and its weights; 0 where there are none."""
    k, v = (z.repeat_interleave(4 // z.shape[2], 2) for z in (k, v))
    s = SCALE * torch.einsum("bthk,bshk->bhts", q, k)
    p = torch.softmax(s.masked_fill(~seen, -torch.inf), -1).masked_fill(~seen, 0)
    return torch.einsum("bhts,bshk->bthk", p, v), p


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
    fla, block = load_fla("nsa"), 8
    ours, arguments = mixer(
        "native_sparse_attention", kv_heads=kv_heads, block=block, count=count, window=WINDOW, rotary_base=100.0
    )

    def branches(q, k, v):
        # The last, incomplete block is seen by no query of cmp; its mean is of no consequence.
        means = [torch.cat([b.mean(1, keepdim=True) for b in z.split(block, 1)], 1) for z in (k, v)]
        with torch.no_grad():
            chosen = fla.naive_nsa_topk(q, means[0], count, block, SCALE)
        return [
            fla.naive_nsa_compression(q, *means, block, SCALE)[0],
            fla.naive_nsa_selection(q, k, v, chosen, block, SCALE),
        ]

    assert_parity(ours, lambda a: layer(torch, a, branches), arguments)


def test_overlaps():
    """Blocks of compression of 8 tokens every 4, of selection of 12: equations 7 to 10, block by block as they are printed."""
    torch = load("torch")
    length, stride, block, count, groups = 8, 4, 12, 4, 2
    ours, arguments = mixer(
        "native_sparse_attention", kv_heads=groups, block=block, count=count, window=WINDOW, summary=length,
        stride=stride, rotary_base=100.0,
    )  # fmt: skip

    def branches(q, k, v):
        begins = range(0, LENGTH - length + 1, stride)
        means = [torch.stack([z[:, b : b + length].mean(1) for b in begins], 1) for z in (k, v)]
        ends = torch.tensor([b + length - 1 for b in begins])
        cmp, p = attended(torch, q, *means, (ends <= torch.arange(LENGTH)[:, None]).expand(len(q), 4, -1, -1))
        p = p.detach().unflatten(1, (groups, -1)).sum(2)
        blocks = math.ceil(LENGTH / block)
        importance = torch.zeros(len(q), groups, LENGTH, blocks, dtype=q.dtype)
        for j in range(1, blocks + 1):  # equation 9, whose indices begin with 1
            for m in range(block // stride):
                for n in range(length // stride):
                    i = block // stride * j - m - n
                    if 1 <= i <= len(begins):
                        importance[..., j - 1] += p[..., i - 1]
        own = torch.arange(LENGTH)[:, None] // block
        here = torch.arange(blocks)
        importance = importance.masked_fill(here > own, -torch.inf)
        importance = importance.masked_fill((here == own) | (here == own - 1) | (here == 0) & (own > 0), torch.inf)
        chosen = importance.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        of_block = torch.zeros_like(importance, dtype=torch.bool).scatter(-1, chosen, True)
        seen = of_block[..., torch.arange(LENGTH) // block] & torch.ones(LENGTH, LENGTH).tril().bool()
        return [cmp, attended(torch, q, k, v, seen.repeat_interleave(4 // groups, 1))[0]]

    assert_parity(ours, lambda a: layer(torch, a, branches), arguments, forms=("auto", "gathered"), dtype="float64")

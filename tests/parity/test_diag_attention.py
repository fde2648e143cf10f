"""DiagAttention against the paper's equation: all scores under a block-diagonal mask, in float64."""

import pytest

from tests.parity.oracles import LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equation in float64"

BLOCK = 16


@pytest.mark.parametrize("causal,version", [(True, 2), (False, 2), (True, 1)])
def test_equation(causal, version):
    """Arxiv 2210.10340, section 4.2; blocks that do not divide the length."""
    torch = load("torch")
    ours, arguments = mixer("diag_attention", causal=causal, version=version, block=BLOCK)

    def theirs(a):
        q, k, v = torch.einsum("btd,dshk->sbhtk", a["x"], a["w_qkv"])
        u = a["u"] / a["u"].norm()
        reflection = torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(u, u)
        turn = torch.exp(1j * torch.arange(LENGTH)[:, None] * a["theta"])
        pairs = lambda z: torch.complex(z[..., 0::2], z[..., 1::2])
        q, k = (pairs(z @ reflection) * turn for z in (q, k))
        s = (q @ k.mH).real / v.shape[-1] ** 0.5
        block = torch.arange(LENGTH) // BLOCK
        mask = block[:, None] == block
        mask = mask.tril() if causal else mask
        if version == 2:
            o = (s.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(1, 2)
        else:
            o = (torch.relu(s).masked_fill(~mask, 0) @ v).transpose(1, 2)
            width = o.flatten(2)
            o = o / (width.norm(dim=-1) / width.shape[-1] ** 0.5 + 1e-8)[..., None, None]
        return torch.einsum("bthk,hkd->btd", o, a["w_o"])

    assert_parity(ours, theirs, arguments, dtype="float64", constant=("u",))

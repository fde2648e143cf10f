"""Efficient attention against its two softmaxes, written out: over all positions, or for each token over those up to it."""

import pytest

from tests.parity.oracles import LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64"


@pytest.mark.parametrize("causal", [True, False])
def test_softmaxes(causal):
    torch = load("torch")
    ours, arguments = mixer("efficient_attention", causal=causal)

    def theirs(a):
        q, k, v = torch.einsum("btd,dshk->sbhtk", a["x"], a["w_qkv"])
        # The share of key s in what token t reads by feature k: [B, H, T, S, K].
        later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) if causal else torch.zeros(LENGTH, LENGTH).bool()
        share = k[:, :, None].masked_fill(later[..., None], -torch.inf).softmax(-2)
        y = torch.einsum("bhtk,bhtsk,bhsv->bthv", q.softmax(-1), share, v)
        return torch.einsum("bthk,hkd->btd", y, a["w_o"])

    forms = ("chunked",) if causal else ("auto",)
    assert_parity(ours, theirs, arguments, forms=forms, dtype="float64")

"""Based's linear attention against flash-linear-attention's matrix of similarities, and two-sided against the paper's."""

import pytest

from tests.parity.oracles import assert_parity, load, load_fla, mixer

pytestmark = pytest.mark.parity

AGAINST = "flash-linear-attention's plain form; the paper's equation in float64"


@pytest.mark.parametrize("causal", [True, False])
def test_similarities(causal):
    torch, fla = load("torch"), load_fla("based")
    ours, arguments = mixer("based", causal=causal, feature_size=6)

    def two_sided(q, k, v):
        a = q @ k.mT / q.shape[-1] ** 0.5
        similarity = 1 + a + a**2 / 2
        return similarity @ v / similarity.sum(-1, keepdim=True)

    def theirs(a):
        q, k = torch.einsum("btd,dshk->sbhtk", a["x"], a["w_qk"])
        v = torch.einsum("btd,dhk->bhtk", a["x"], a["w_v"])
        y = fla.naive_parallel_based(q, k, v) if causal else two_sided(q, k, v)
        return torch.einsum("bhtk,hkd->btd", y, a["w_o"])

    forms = ("chunked",) if causal else ("auto",)
    assert_parity(ours, theirs, arguments, forms=forms, dtype="float64")

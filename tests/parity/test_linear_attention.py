"""Linear attention against flash-linear-attention's plain form, and against the paper's equation for all tokens."""

import pytest

from tests.parity.oracles import assert_parity, load, load_fla, mixer

pytestmark = pytest.mark.parity
AGAINST = "fla naive linear attention; equations in float64"


def test_causal():
    torch, fla = load("torch"), load_fla("linear_attn")
    # The library's epsilon is 1e-10, and fixed.
    ours, arguments = mixer("linear_attention", eps=1e-10)

    def theirs(a):
        q, k, v = torch.einsum("btd,dshk->sbthk", a["x"], a["w_qkv"])
        q, k = (torch.nn.functional.elu(z) + 1 for z in (q, k))
        y, _ = fla.naive_recurrent_linear_attn(q, k, v, scale=1.0, normalize=True)
        return torch.einsum("bthk,hkd->btd", y, a["w_o"])

    assert_parity(ours, theirs, arguments, forms=("sequential", "chunked"))


@pytest.mark.parametrize("causal", [True, False])
def test_similarities(causal):
    """Arxiv 2006.16236, equation 4 with phi = elu + 1: the matrix of similarities, its rows normalised."""
    torch = load("torch")
    ours, arguments = mixer("linear_attention", causal=causal, eps=0.1)

    def theirs(a):
        q, k, v = torch.einsum("btd,dshk->sbhtk", a["x"], a["w_qkv"])
        q, k = (torch.where(z > 0, z + 1, torch.exp(z)) for z in (q, k))
        similarity = q @ k.mT
        similarity = similarity.tril() if causal else similarity
        y = similarity @ v / (similarity.sum(-1, keepdim=True) + 0.1)
        return torch.einsum("bhtk,hkd->btd", y, a["w_o"])

    assert_parity(ours, theirs, arguments, dtype="float64")

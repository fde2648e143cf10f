"""Performer against the paper's features and the matrix of their products."""

import pytest

from tests.parity.oracles import assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64"


@pytest.mark.parametrize("causal,kernel", [(True, "softmax"), (False, "softmax"), (True, "relu")])
def test_similarities(causal, kernel):
    """Stabilisers cancel: the features of keys have none here, those of queries one for the sake of their epsilon."""
    torch = load("torch")
    ours, arguments = mixer("performer", causal=causal, features=12, kernel=kernel, eps=0.01)

    def theirs(a):
        q, k, v = torch.einsum("btd,dshk->sbhtk", a["x"], a["w_qkv"])
        q, k = (z / z.shape[-1] ** 0.25 for z in (q, k))
        if kernel == "relu":
            q, k = (torch.relu(z @ a["w"].T) + 0.01 for z in (q, k))
        else:
            q, k = (z @ a["w"].T - z.square().sum(-1, keepdim=True) / 2 for z in (q, k))
            q, k = torch.exp(q - q.amax(-1, keepdim=True)) + 0.01, torch.exp(k)
        similarity = q @ k.mT
        similarity = similarity.tril() if causal else similarity
        y = similarity @ v / similarity.sum(-1, keepdim=True)
        return torch.einsum("bhtk,hkd->btd", y, a["w_o"])

    forms = ("chunked",) if causal else ("auto",)
    assert_parity(ours, theirs, arguments, forms=forms, dtype="float64", constant=("w",))

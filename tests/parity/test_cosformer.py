"""cosFormer against the paper's equation: all scores, reweighted by the cosine of the distance, in float64."""

import math

import pytest

from tests.parity.oracles import LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equation in float64"


@pytest.mark.parametrize("causal", [True, False])
def test_equation(causal):
    """Arxiv 2202.08791, equations 9 and 10, with M = 80 for sequences of 70 tokens."""
    torch = load("torch")
    ours, arguments = mixer("cosformer", causal=causal, length=80)

    def theirs(a):
        q, k, v = torch.einsum("btd,dshk->sbhtk", a["x"], a["w_qkv"])
        i = torch.arange(LENGTH, dtype=q.dtype)
        s = torch.relu(q) @ torch.relu(k).mT * torch.cos(math.pi / 2 * (i[:, None] - i) / 80)
        s = s.tril() if causal else s
        y = s @ v / s.sum(-1, keepdim=True).clamp(min=1e-6)
        return torch.einsum("bhtk,hkd->btd", y, a["w_o"])

    assert_parity(ours, theirs, arguments, forms=("sequential", "chunked") if causal else ("auto",), dtype="float64")

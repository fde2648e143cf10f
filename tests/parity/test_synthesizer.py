"""The synthesizer's logits against the paper's equations for all pairs of tokens."""

import pytest

from tests.parity.oracles import LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64"


@pytest.mark.parametrize(
    "logits,causal",
    [
        ("dense", True),
        ("random", False),
        ("factorized_random", True),
        ("random+dense+dot_product", True),
        ("dense+factorized_random+dot_product", False),
    ],
)
def test_logits(logits, causal):
    torch = load("torch")
    # The tables are longer than the sequence, which uses their beginning.
    ours, arguments = mixer("synthesizer", causal=causal, logits=logits, length=LENGTH + 3, rank=4)

    def theirs(a):
        scores, terms = 0, logits.split("+")
        if "dense" in terms:
            hidden = torch.relu(torch.einsum("btd,dhk->bhtk", a["x"], a["w_1"]) + a["b_1"][:, None])
            scores = scores + (hidden @ a["w_2"].mT + a["b_2"][:, None])[..., :LENGTH]
        if "random" in terms:
            scores = scores + a["r"][None, :, :LENGTH, :LENGTH]
        if "factorized_random" in terms:
            scores = scores + (a["r_1"] @ a["r_2"].mT)[None, :, :LENGTH, :LENGTH]
        if "dot_product" in terms:
            q, k = (torch.einsum("btd,dhk->bhtk", a["x"], a[name]) for name in ("w_q", "w_k"))
            scores = scores + q @ k.mT / q.shape[-1] ** 0.5
        if causal:
            scores = scores + torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
        v = torch.einsum("btd,dhk->bhtk", a["x"], a["w_v"])
        return torch.einsum("bhtk,hkd->btd", scores.softmax(-1) @ v, a["w_o"])

    assert_parity(ours, theirs, arguments, dtype="float64")

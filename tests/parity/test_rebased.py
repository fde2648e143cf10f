"""ReBased against flash-linear-attention's matrix of similarities, and two-sided against the paper's."""

import pytest

from tests.parity.oracles import assert_parity, load, load_fla, mixer

pytestmark = pytest.mark.parity

AGAINST = "flash-linear-attention's plain form; the paper's equation in float64"


@pytest.mark.parametrize("causal", [True, False])
def test_similarities(causal):
    torch, fla = load("torch"), load_fla("rebased")
    # The library's epsilon is 1e-6, and fixed.
    ours, arguments = mixer("rebased", causal=causal, feature_size=6, eps=1e-6)

    def two_sided(q, k, v):
        similarity = (q @ k.mT) ** 2 / q.shape[-1]
        return similarity @ v / (similarity.sum(-1, keepdim=True) + 1e-6)

    def theirs(a):
        q, k = torch.einsum("btd,dsf->sbtf", a["x"], a["w_qk"])
        norm = lambda z, name: torch.nn.functional.layer_norm(
            z, z.shape[-1:], a[f"{name}.weight"], a[f"{name}.bias"], eps=1e-6
        )
        q, k = (norm(z, name).unflatten(-1, (-1, 6)).transpose(1, 2) for z, name in ((q, "norm_q"), (k, "norm_k")))
        v = torch.einsum("btd,dhk->bhtk", a["x"], a["w_v"])
        y = fla.naive_parallel_rebased(q, k, v, scale=6**-0.5) if causal else two_sided(q, k, v)
        return torch.einsum("bhtk,hkd->btd", y, a["w_o"])

    forms = ("chunked",) if causal else ("auto",)
    assert_parity(ours, theirs, arguments, forms=forms, dtype="float64")

"""Random feature attention against the paper's equations: the matrix of similarities, and the gate token by token."""

import pytest

from tests.parity.oracles import assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64"


def features(torch, a, scale):
    """The features of queries and keys, and the values: [B, H, T, .]."""
    q, k, v = torch.einsum("btd,dshk->sbhtk", a["x"], a["w_qkv"])
    unit = lambda z: z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    angles = [torch.einsum("bhtk,hfk->bhtf", unit(z), a["sigma"][:, None] * a["directions"]) for z in (q, k)]
    return *(scale * torch.cat([z.sin(), z.cos()], -1) for z in angles), v


@pytest.mark.parametrize("causal", [True, False])
def test_similarities(causal):
    """With the authors' constants; the floor of the denominator binds for the first tokens."""
    torch = load("torch")
    ours, arguments = mixer("random_feature_attention", causal=causal, features=12)

    def theirs(a):
        q, k, v = features(torch, a, 0.1)
        similarity = q @ k.mT
        similarity = similarity.tril() if causal else similarity
        y = similarity @ v / similarity.sum(-1, keepdim=True).clamp(min=1.0)
        return torch.einsum("bhtk,hkd->btd", y, a["w_o"])

    forms = ("chunked",) if causal else ("auto",)
    assert_parity(ours, theirs, arguments, forms=forms, dtype="float64", constant=("directions",))


def test_gate():
    torch = load("torch")
    ours, arguments = mixer("random_feature_attention", features=12, gate=True)

    def theirs(a):
        q, k, v = features(torch, a, 12**-0.5)
        g = torch.sigmoid(torch.einsum("btd,dh->bht", a["x"], a["w_g"]) + a["b_g"][:, None])[..., None]
        S, z, y = 0, 0, []
        for t in range(q.shape[2]):
            S = g[:, :, t, :, None] * S + (1 - g[:, :, t, :, None]) * k[:, :, t, :, None] * v[:, :, t, None]
            z = g[:, :, t] * z + (1 - g[:, :, t]) * k[:, :, t]
            read = torch.einsum("bhk,bhkv->bhv", q[:, :, t], S)
            y.append(read / (q[:, :, t] * z).sum(-1, keepdim=True).clamp(min=0.1))
        return torch.einsum("bhtk,hkd->btd", torch.stack(y, 2), a["w_o"])

    assert_parity(ours, theirs, arguments, forms=("chunked",), dtype="float64", constant=("directions",))

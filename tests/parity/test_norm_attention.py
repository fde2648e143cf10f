"""NormAttention against the paper's equation: all scores, unnormalised, in float64."""

import pytest

from tests.parity.oracles import LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equation in float64"


@pytest.mark.parametrize("causal,version", [(True, 2), (False, 2), (True, 1)])
def test_equation(causal, version):
    """Arxiv 2210.10340, section 4.1, with the positions as matrices: M_t = rotation^t (I - 2 u u^T), q_i M_i^T M_j k_j."""
    torch = load("torch")
    ours, arguments = mixer("norm_attention", causal=causal, version=version)

    def theirs(a):
        q, k, v = torch.einsum("btd,dshk->sbhtk", a["x"], a["w_qkv"])
        f = lambda z: torch.where(z > 0, z, torch.expm1(z)) + (version - 1)
        u = a["u"] / a["u"].norm()
        reflection = torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(u, u)
        # exp(i t theta) on pairs (2i, 2i + 1) taken as complex numbers.
        turn = torch.exp(1j * torch.arange(LENGTH)[:, None] * a["theta"])
        pairs = lambda z: torch.complex(z[..., 0::2], z[..., 1::2])
        q, k = (pairs(f(z) @ reflection) * turn for z in (q, k))
        s = (q @ k.mH).real
        o = ((s.tril() if causal else s) @ v).transpose(1, 2)
        width = o.flatten(2)
        o = o / (width.norm(dim=-1) / width.shape[-1] ** 0.5 + 1e-8)[..., None, None]
        return torch.einsum("bthk,hkd->btd", o, a["w_o"])

    forms = ("sequential", "chunked") if causal else ("auto",)
    assert_parity(ours, theirs, arguments, forms=forms, dtype="float64", constant=("u",))

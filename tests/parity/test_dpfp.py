"""Fast weight programmers against flash-linear-attention's plain delta rule, and the sum update against its matrix."""

import pytest

from tests.parity.oracles import assert_parity, load, load_fla, mixer

pytestmark = pytest.mark.parity

AGAINST = "flash-linear-attention's plain delta rule; the paper's equations in float64"


def projection(torch, x, nu):
    """DPFP, component by component."""
    r = torch.cat([x.relu(), (-x).relu()], -1)
    size = r.shape[-1]
    phi = torch.stack([r[..., i] * r[..., (i - j) % size] for j in range(1, nu + 1) for i in range(size)], -1)
    return phi / (phi.sum(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("update,nu", [("delta", 2), ("sum", 3)])
def test_update(update, nu):
    torch, fla = load("torch"), load_fla("delta_rule")
    ours, arguments = mixer("dpfp", update=update, nu=nu)

    def theirs(a):
        q, k, v = torch.einsum("btd,dshk->sbhtk", a["x"], a["w_qkv"])
        q, k = projection(torch, q, nu), projection(torch, k, nu)
        if update == "delta":
            beta = torch.sigmoid(torch.einsum("btd,dh->bht", a["x"], a["w_b"]))
            # The library's own scale is that of the features.
            y, _ = fla.delta_rule_recurrence(q * q.shape[-1] ** 0.5, k, v, beta)
        else:
            similarity = (q @ k.mT).tril()
            y = similarity @ v / (similarity.sum(-1, keepdim=True) + 1e-5)
        return torch.einsum("bhtk,hkd->btd", y / v.shape[-1] ** 0.5, a["w_o"])

    assert_parity(
        ours,
        theirs,
        arguments,
        forms=("chunked",),
        dtype="float32" if update == "delta" else "float64",
    )

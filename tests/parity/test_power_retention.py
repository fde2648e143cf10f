"""Power retention against its definition, score by score, in float64."""

import pytest

from tests.parity.oracles import LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity
AGAINST = "the paper's equation in float64"


def test_definition():
    torch = load("torch")
    ours, arguments = mixer("power_retention", feature_size=6, eps=0.1, rotary_base=100.0)

    def theirs(a):
        q, k = torch.einsum("btd,dshk->sbthk", a["x"], a["w_qk"])
        v = torch.einsum("btd,dhv->bthv", a["x"], a["w_v"])
        angles = torch.arange(LENGTH, dtype=q.dtype)[:, None, None] * 100.0 ** (-torch.arange(0, 6, 2) / 6)
        pair = lambda z: torch.complex(z[..., :3], z[..., 3:]) * torch.polar(torch.ones_like(angles), angles)
        s = torch.einsum("bthk,bshk->bhts", pair(q), pair(k).conj()).real
        total = torch.cumsum(torch.nn.functional.logsigmoid(a["x"] @ a["w_g"] + a["b_g"]), 1).mT
        decay = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
        weights = s**2 / 6 * decay
        y = torch.einsum("bhts,bshv->bthv", weights, v) / (weights.sum(-1).mT[..., None] + 0.1)
        return torch.einsum("bthv,hvd->btd", y, a["w_o"])

    assert_parity(ours, theirs, arguments, forms=("auto", "chunked", "reference"), dtype="float64")

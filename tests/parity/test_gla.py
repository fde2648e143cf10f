"""Gated linear attention against flash-linear-attention's plain form."""

import numpy as np
import pytest

from ops.linear_attention import linear_attention
from tests.parity.oracles import BATCH, LENGTH, assert_parity, load, load_fla, mixer, normal

pytestmark = pytest.mark.parity
AGAINST = "fla naive_recurrent_gla"

FORMS = ("sequential", "chunked")


@pytest.mark.parametrize("strength", [0.05, 3.0])
def test_operation(strength):
    """Weak decays, and decays of which a chunk's product is far below the smallest float; states included."""
    load("torch")
    fla = load_fla("gla")
    arguments = {
        name: normal(BATCH, LENGTH, 3, size, seed=i) for i, (name, size) in enumerate(zip("qkvg", (8, 8, 12, 8)))
    }
    arguments["g"] = -strength * np.abs(arguments["g"])
    arguments["state"] = normal(BATCH, 3, 8, 12, seed=4)

    def ours(a):
        return linear_attention(a["q"], a["k"], a["v"], a["g"], scale=8**-0.5, initial_state=a["state"])

    def theirs(a):
        # The library adds to the initial state in place.
        state = a["state"].clone()
        return fla.naive_recurrent_gla(a["q"], a["k"], a["v"], a["g"], initial_state=state, output_final_state=True)

    assert_parity(ours, theirs, arguments, forms=FORMS)


def test_mixer():
    """Arxiv 2312.06635, section 4.4: gates sigmoid(.)^(1/16) of a low-rank map, head norm and output gate."""
    torch, fla = load("torch"), load_fla("gla")
    F = torch.nn.functional
    ours, arguments = mixer("gla")

    def theirs(a):
        q, k, v, g = (torch.einsum("btd,dhk->bthk", a["x"], a[f"w_{name}"]) for name in "qkvg")
        gate = torch.einsum("btr,rhk->bthk", a["x"] @ a["w_decay_in"], a["w_decay_out"]) + a["b_decay"]
        o, _ = fla.naive_recurrent_gla(q, k, v, F.logsigmoid(gate) / 16)
        o = F.rms_norm(o, o.shape[-1:], a["norm.weight"], eps=1e-6)
        return torch.einsum("bthk,hkd->btd", F.silu(g) * o, a["w_o"])

    assert_parity(ours, theirs, arguments, forms=FORMS)

"""Gated slot attention's two passes against flash-linear-attention, with the maps around them written out."""

import pytest

from tests.parity.oracles import assert_parity, load, load_fla, mixer

pytestmark = pytest.mark.parity

AGAINST = "fla naive_recurrent_gsa"


@pytest.mark.parametrize("form", ["sequential", "chunked"])
def test_layer(form):
    """Slots that forget slowly, as they do at first."""
    torch, fla = load("torch"), load_fla("gsa")
    F = torch.nn.functional
    ours, arguments = mixer("gated_slot_attention", heads=4, slots=6)

    def theirs(a):
        q, k, v = F.silu(torch.einsum("btd,dghk->gbthk", a["x"], a["w_qkv"]))
        g = F.logsigmoid(torch.einsum("btd,dhm->bthm", a["x"], a["w_f"])) / 8
        o, _ = fla.naive_recurrent_gsa(q, k, v, 1 - g.exp(), g, scale=1.0)
        o = F.silu(o).flatten(2)
        return F.rms_norm(o, o.shape[-1:], a["norm.weight"], eps=1e-5) @ a["w_o"]

    assert_parity(ours, theirs, arguments, forms=(form,))

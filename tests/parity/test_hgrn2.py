"""HGRN2 against flash-linear-attention's plain form."""

import pytest

from models.lower_bounds import lower_bounds
from models.mixer import Context
from tests.parity.oracles import assert_parity, load, load_fla, mixer

pytestmark = pytest.mark.parity

AGAINST = "fla naive_recurrent_gla"


@pytest.mark.parametrize("layer,forms", [(0, ("auto",)), (2, ("sequential", "chunked"))])
def test_mixer(layer, forms):
    """The first layer of a model, which may forget all, and one with a lower bound."""
    torch, fla = load("torch"), load_fla("gla")
    run, arguments = mixer("hgrn2", layers=3)
    ours = lambda a: run(a, context=Context(layer, None, lower_bounds(a["shared.gamma"])))

    def theirs(a):
        q, z, v = (torch.einsum("btd,dhk->bthk", a["x"], a[f"w_{name}"]) for name in "qfv")
        bound = torch.softmax(a["shared.gamma"], 0)[:layer].sum(0).reshape(z.shape[2:])
        f = bound + (1 - bound) * torch.sigmoid(z)
        q = torch.nn.functional.silu(q) * q.shape[-1] ** 0.5  # the library divides by it
        o, _ = fla.naive_recurrent_gla(q, 1 - f, v, torch.log(f))
        o = torch.nn.functional.rms_norm(o.flatten(2), a["x"].shape[-1:], a["norm.weight"], eps=1e-6)
        return o @ a["w_o"]

    assert_parity(ours, theirs, arguments, forms=forms)

"""HGRN against the paper's equations in float64, and its real form against flash-linear-attention's recurrence."""

import pytest

from models.lower_bounds import lower_bounds
from models.mixer import Context
from tests.parity.oracles import assert_parity, load, load_fla, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64; fla naive_recurrent_hgrn (real form)"


def pieces(a, layer):
    """lambda, g and c of arXiv 2311.04823, section 3, the latter two as lists of their parts."""
    torch = load("torch")
    bound = torch.softmax(a["shared.gamma"], 0)[:layer].sum(0)
    maps = torch.einsum("btd,dge->gbte", a["x"], a["w_in"]) + a["b_in"][:, None, None]
    parts = len(maps) // 2
    decay = bound + (1 - bound) * torch.sigmoid(maps[parts])
    return decay, torch.sigmoid(maps[parts + 1 :]), torch.nn.functional.silu(maps[:parts])


def output(a, g, h):
    torch = load("torch")
    o = torch.cat([part * gate for part, gate in zip(h, g)], -1)
    o = torch.nn.functional.layer_norm(o, o.shape[-1:], a["norm.weight"], a["norm.bias"], eps=1e-6)
    return o @ a["w_o"] + a["b_o"]


def test_complex():
    """A layer with a lower bound."""
    torch = load("torch")
    run, arguments = mixer("hgrn", layers=3)
    ours = lambda a: run(a, context=Context(2, None, lower_bounds(a["shared.gamma"])))

    def theirs(a):
        decay, g, (real, imag) = pieces(a, 2)
        turn = torch.exp(1j * a["theta"])
        h, states = 0.0, []
        for t in range(real.shape[1]):
            h = decay[:, t] * turn * h + (1 - decay[:, t]) * torch.complex(real[:, t], imag[:, t])
            states.append(h)
        h = torch.stack(states, 1)
        return output(a, g, (h.real, h.imag))

    assert_parity(ours, theirs, arguments, forms=("sequential", "associative"), dtype="float64")


@pytest.mark.parametrize("layer", [0, 1])
def test_real(layer):
    """A real state, in the first layer of a model, which may forget all, and in the second."""
    torch, fla = load("torch"), load_fla("hgrn")
    run, arguments = mixer("hgrn", layers=3, complex_state=False)
    ours = lambda a: run(a, context=Context(layer, None, lower_bounds(a["shared.gamma"])))

    def theirs(a):
        decay, g, (c,) = pieces(a, layer)
        h, _ = fla.naive_recurrent_hgrn((1 - decay) * c, torch.log(decay))
        return output(a, g, (h,))

    assert_parity(ours, theirs, arguments)

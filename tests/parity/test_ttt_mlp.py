"""TTT-MLP against its definition: an inner model trained token by token, gradients by autograd, in float64."""

import pytest

from tests.parity.oracles import assert_parity, load, mixer
from tests.parity.test_ttt_linear import layer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64, the inner gradient by autograd"


def test_layer():
    torch = load("torch")
    ours, arguments = mixer("ttt_mlp", base_rate=0.7)

    def network(x, W_1, b_1, W_2, b_2):
        hidden = torch.nn.functional.gelu(torch.einsum("bhk,bhkm->bhm", x, W_1) + b_1, approximate="tanh")
        return torch.einsum("bhm,bhmv->bhv", hidden, W_2) + b_2

    names = ("memory_in", "memory_in_bias", "memory_out", "memory_out_bias")
    assert_parity(ours, lambda a: layer(torch, a, 0.7, names, network), arguments, dtype="float64")

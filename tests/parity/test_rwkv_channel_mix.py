"""RWKV's channel mixing against transformers' layer, and without its gate against RWKV-7's equation in float64."""

import pytest

from tests.parity.oracles import WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity
AGAINST = "transformers RwkvFeedForward; equation in float64"


def test_gated():
    torch, rwkv = load("torch"), load("transformers.models.rwkv.modeling_rwkv")
    ours, arguments = mixer("rwkv_channel_mix")
    layer = rwkv.RwkvFeedForward(rwkv.RwkvConfig(hidden_size=WIDTH, num_hidden_layers=1), layer_id=0)

    def theirs(a):
        weights = {
            "time_mix_key": a["mu"][0][None, None],
            "time_mix_receptance": a["mu"][1][None, None],
            "key.weight": a["w_k"].T,
            "receptance.weight": a["w_r"].T,
            "value.weight": a["w_v"].T,
        }
        return torch.func.functional_call(layer, weights, (a["x"],), strict=True)[0]

    assert_parity(ours, theirs, arguments)


def test_plain():
    torch = load("torch")
    ours, arguments = mixer("rwkv_channel_mix", gate=False)

    def theirs(a):
        before = torch.cat([torch.zeros_like(a["x"][:, :1]), a["x"][:, :-1]], 1)
        k = a["mu"][0] * a["x"] + (1 - a["mu"][0]) * before
        return torch.relu(k @ a["w_k"]) ** 2 @ a["w_v"]

    assert_parity(ours, theirs, arguments, dtype="float64")

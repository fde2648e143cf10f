"""RWKV-4 against transformers' layer."""

import pytest

from tests.parity.oracles import WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "transformers RwkvSelfAttention"


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_layer(scale):
    """Keys of moderate size, and keys whose exponentials float32 cannot hold."""
    torch, rwkv = load("torch"), load("transformers.models.rwkv.modeling_rwkv")
    ours, arguments = mixer("rwkv4")
    arguments["w_k"] *= scale * 5
    config = rwkv.RwkvConfig(hidden_size=WIDTH, num_hidden_layers=1, context_length=8)
    layer = rwkv.RwkvSelfAttention(config, layer_id=0)

    def theirs(a):
        mu_k, mu_v, mu_r = a["mu"][:, None, None]
        weights = {
            "time_decay": a["log_w"],
            "time_first": a["u"],
            "time_mix_key": mu_k,
            "time_mix_value": mu_v,
            "time_mix_receptance": mu_r,
            "key.weight": a["w_k"].T,
            "value.weight": a["w_v"].T,
            "receptance.weight": a["w_r"].T,
            "output.weight": a["w_o"].T,
        }
        return torch.func.functional_call(layer, weights, (a["x"],), strict=True)[0]

    assert_parity(ours, theirs, arguments)

"""The gated short convolution against transformers' LFM2 layer."""

import pytest

from tests.parity.oracles import WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "transformers Lfm2ShortConv"


@pytest.mark.parametrize("bias,conv_size", [(False, 3), (True, 7)])
def test_layer(bias, conv_size):
    """The layer of LFM2, and one with LFM3's number of taps and with biases."""
    torch, lfm2 = load("torch"), load("transformers.models.lfm2.modeling_lfm2")
    ours, arguments = mixer("gated_short_conv", bias=bias, conv_size=conv_size)
    config = lfm2.Lfm2Config(
        hidden_size=WIDTH, num_hidden_layers=1, layer_types=["conv"], conv_L_cache=conv_size, conv_bias=bias
    )
    layer = lfm2.Lfm2ShortConv(config, layer_idx=0)

    def theirs(a):
        weights = {
            "in_proj.weight": a["w_in"].flatten(1).T,
            "conv.weight": a["taps"].T[:, None],
            "out_proj.weight": a["w_out"].T,
        }
        if bias:
            biases = {"in_proj.bias": a["b_in"].flatten(), "conv.bias": a["b_conv"], "out_proj.bias": a["b_out"]}
            weights |= biases
        return torch.func.functional_call(layer, weights, (a["x"],), strict=True)

    assert_parity(ours, theirs, arguments)

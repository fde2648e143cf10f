"""RG-LRU against transformers' RecurrentGemma block."""

import pytest

from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "transformers RecurrentGemmaRecurrentBlock"


def test_block():
    """The block: short convolution, gates, recurrence, output gate, biases."""
    torch, gemma = load("torch"), load("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    inner = WIDTH * 3 // 2
    ours, arguments = mixer("rglru", heads=4, expand=1.5, bias=True)
    config = gemma.RecurrentGemmaConfig(
        hidden_size=WIDTH, lru_width=inner, num_attention_heads=4, conv1d_width=4, num_hidden_layers=1
    )
    block = gemma.RecurrentGemmaRecurrentBlock(config, layer_idx=0)
    positions = torch.arange(LENGTH)[None].expand(BATCH, -1)

    def theirs(a):
        weights = {
            "linear_x.weight": a["w_x"].T,
            "linear_y.weight": a["w_y"].T,
            "linear_out.weight": a["w_o"].T,
            "linear_x.bias": a["b_x"],
            "linear_y.bias": a["b_y"],
            "linear_out.bias": a["b_o"],
            "conv_1d.weight": a["conv"].T[:, None],
            "conv_1d.bias": a["conv_bias"],
            "rg_lru.recurrent_param": a["lambda_"],
            "rg_lru.recurrent_gate_weight": a["w_r"],
            "rg_lru.recurrent_gate_bias": a["b_r"],
            "rg_lru.input_gate_weight": a["w_i"],
            "rg_lru.input_gate_bias": a["b_i"],
        }
        call = {"position_ids": positions, "attention_mask": None, "use_cache": False}
        return torch.func.functional_call(block, weights, (a["x"],), call, strict=True)[0]

    assert_parity(ours, theirs, arguments, forms=("sequential", "associative"))

"""Compressed convolutional attention against transformers' layer of ZAYA."""

import pytest

from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity
AGAINST = "transformers ZayaAttention"


def test_zaya():
    """Four query heads of two key heads, half of whose channels are rotated."""
    torch, module = load("torch"), load("transformers.models.zaya.modeling_zaya")
    ours, arguments = mixer("cca", kv_heads=2, head_channels=12, rotary_base=100.0)
    config = module.ZayaConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        layer_types=["hybrid"],
    )  # fmt: skip
    config._attn_implementation = "eager"
    layer = module.ZayaAttention(config, layer_idx=0)
    ahead = torch.ones(LENGTH, LENGTH).triu(1).bool()
    mask = torch.zeros(BATCH, 1, LENGTH, LENGTH).masked_fill(ahead, -torch.inf)
    angles = torch.arange(LENGTH)[:, None] * 100.0 ** (-torch.arange(0, 6, 2) / 6)
    angles = torch.cat([angles, angles], -1).expand(BATCH, -1, -1)

    def theirs(a):
        now, delayed = a["w_v"].unbind(1)
        weights = {
            "qkv_proj.q_proj.weight": a["w_q"].flatten(1).T,
            "qkv_proj.k_proj.weight": a["w_k"].flatten(1).T,
            "qkv_proj.v_proj_current.weight": now.T,
            "qkv_proj.v_proj_delayed.weight": delayed.T,
            "qkv_proj.conv_qk_depthwise.weight": a["taps"].T[:, None],
            "qkv_proj.conv_qk_depthwise.bias": a["taps_bias"],
            "qkv_proj.conv_qk_grouped.weight": a["matrices"].permute(2, 3, 1, 0).flatten(0, 1),
            "qkv_proj.conv_qk_grouped.bias": a["matrices_bias"].flatten(),
            "qk_norm.temp": a["temperature"],
            "o_proj.weight": a["w_o"].flatten(0, 1).T,
        }
        inputs = {"attention_mask": {"causal": mask}, "position_embeddings": (angles.cos(), angles.sin())}
        return torch.func.functional_call(layer, weights, (a["x"],), inputs, strict=True)[0]

    assert_parity(ours, theirs, arguments)

"""Compressed attention against transformers' DeepSeek-V4 layer, whose two output maps are made one."""

import pytest

from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity
AGAINST = "transformers DeepseekV4Attention (heavily compressed)"


def test_deepseek():
    """A last block that is incomplete, and more blocks than the window holds."""
    torch, module = load("torch"), load("transformers.models.deepseek_v4.modeling_deepseek_v4")
    options = {"q_rank": 12, "rate": 8, "window": 11, "head_channels": 6, "rotary_channels": 4, "rotary_base": 500.0}
    ours, arguments = mixer("compressed_attention", **options)
    config = module.DeepseekV4Config(
        hidden_size=WIDTH, num_attention_heads=4, head_dim=6, q_lora_rank=12, sliding_window=11, num_hidden_layers=1,
        layer_types=["heavily_compressed_attention"], compress_rates={"heavily_compressed_attention": 8},
        partial_rotary_factor=0.7, compress_rope_theta=500.0, o_groups=1, o_lora_rank=24,
    )  # fmt: skip
    config._attn_implementation = "eager"
    layer = module.DeepseekV4Attention(config, layer_idx=0)
    near = torch.ones(LENGTH, LENGTH).tril().bool() & ~torch.ones(LENGTH, LENGTH).tril(-11).bool()
    mask = torch.zeros(BATCH, 1, LENGTH, LENGTH).masked_fill(~near, -torch.inf)
    places = torch.arange(LENGTH)[None].expand(BATCH, -1)

    def theirs(a):
        weights = dict(layer.named_buffers()) | {
            "q_a_proj.weight": a["w_dq"].T,
            "q_a_norm.weight": a["q_norm.weight"],
            "q_b_proj.weight": a["w_q"].flatten(1).T,
            "kv_proj.weight": a["w_kv"].T,
            "kv_norm.weight": a["kv_norm.weight"],
            "o_a_proj.weight": torch.eye(24),
            "o_b_proj.weight": a["w_o"].flatten(0, 1).T,
            "sinks": a["sinks"],
            "compressor.kv_proj.weight": a["w_c"].T,
            "compressor.gate_proj.weight": a["w_z"].T,
            "compressor.position_bias": a["b_z"],
            "compressor.kv_norm.weight": a["c_norm.weight"],
        }
        angles = module.DeepseekV4RotaryEmbedding(config)(a["x"], places, layer_type="compress")
        inputs = {"position_embeddings": {"compress": angles}, "position_ids": places, "attention_mask": mask}
        return torch.func.functional_call(layer, weights, (a["x"],), inputs, strict=True)[0]

    assert_parity(ours, theirs, arguments)

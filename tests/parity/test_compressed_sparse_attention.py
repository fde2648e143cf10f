"""Compressed sparse attention against transformers' DeepSeek-V4 layer, whose two output maps are made one."""

import pytest

from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity
AGAINST = "transformers DeepseekV4Attention (compressed sparse)"
INDEXER = ("index.w_c", "index.w_z", "index.b_z", "index.norm.weight", "w_qi", "w_w")


def test_deepseek():
    """A last block that is incomplete, and more blocks than are chosen. Of so many index heads relu leaves some, so that no
    scores are equal, among which PyTorch chooses as it likes."""
    torch, module = load("torch"), load("transformers.models.deepseek_v4.modeling_deepseek_v4")
    options = {"q_rank": 12, "rate": 4, "top_k": 5, "window": 7, "head_channels": 6, "rotary_channels": 4}
    options |= {"rotary_base": 500.0, "index_heads": 12, "index_channels": 10}
    ours, arguments = mixer("compressed_sparse_attention", **options)
    config = module.DeepseekV4Config(
        hidden_size=WIDTH, num_attention_heads=4, head_dim=6, q_lora_rank=12, sliding_window=7, num_hidden_layers=1,
        layer_types=["compressed_sparse_attention"], compress_rates={"compressed_sparse_attention": 4},
        partial_rotary_factor=0.7, compress_rope_theta=500.0, o_groups=1, o_lora_rank=24, index_n_heads=12,
        index_head_dim=10, index_topk=5,
    )  # fmt: skip
    config._attn_implementation = "eager"
    layer = module.DeepseekV4Attention(config, layer_idx=0)
    near = torch.ones(LENGTH, LENGTH).tril().bool() & ~torch.ones(LENGTH, LENGTH).tril(-7).bool()
    mask = torch.zeros(BATCH, 1, LENGTH, LENGTH).masked_fill(~near, -torch.inf)
    places = torch.arange(LENGTH)[None].expand(BATCH, -1)

    def compressor(a, ours, theirs):
        """Their first half of the channels is that of the block before, and so is our first half of the tokens."""
        return {
            f"{theirs}.kv_proj.weight": a[f"{ours}.w_c"].flatten(1).T,
            f"{theirs}.gate_proj.weight": a[f"{ours}.w_z"].flatten(1).T,
            f"{theirs}.position_bias": torch.cat(a[f"{ours}.b_z"].chunk(2), 1),
            f"{theirs}.kv_norm.weight": a[f"{ours}.norm.weight"],
        }

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
            "compressor.indexer.q_b_proj.weight": a["w_qi"].flatten(1).T,
            "compressor.indexer.scorer.weights_proj.weight": a["w_w"].T,
            **compressor(a, "entry", "compressor"),
            **compressor(a, "index", "compressor.indexer"),
        }
        angles = module.DeepseekV4RotaryEmbedding(config)(a["x"], places, layer_type="compress")
        inputs = {"position_embeddings": {"compress": angles}, "position_ids": places, "attention_mask": mask}
        return torch.func.functional_call(layer, weights, (a["x"],), inputs, strict=True)[0]

    assert_parity(ours, theirs, arguments, forms=("auto", "gathered"), constant=INDEXER)

"""Multi-head latent attention against transformers' DeepSeek-V3 layer, in its expanded and its absorbed form."""

import pytest

from tests.parity.oracles import LENGTH, WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity
AGAINST = "transformers DeepseekV3Attention"


@pytest.mark.parametrize("q_rank,rule", [(None, "default"), (12, "yarn")])
def test_deepseek(q_rank, rule):
    """Queries with and without a latent; YaRN as DeepSeek has it, which also scales the scores."""
    torch, module = load("torch"), load("transformers.models.deepseek_v3.modeling_deepseek_v3")
    rope, options = {"rope_type": "default", "rope_theta": 500.0}, {}
    if rule == "yarn":
        rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
        rope |= {"mscale": 0.7, "mscale_all_dim": 1.4}
        of = lambda mscale: 0.1 * mscale * 1.3862943611198906 + 1
        options["rotary_scaling"] = f"yarn:factor=4,original_length=16,beta_fast=4,magnitude={of(0.7) / of(1.4)}"
        options["scale"] = 14**-0.5 * of(1.4) ** 2
    ours, arguments = mixer(
        "mla",
        q_rank=q_rank,
        kv_rank=20,
        nope_channels=6,
        rotary_channels=8,
        value_channels=10,
        rotary_base=500.0,
        **options,
    )
    config = module.DeepseekV3Config(
        hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=q_rank, kv_lora_rank=20,
        qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=10, rope_parameters=rope,
    )  # fmt: skip
    config._attn_implementation = "eager"
    layer = module.DeepseekV3Attention(config, layer_idx=0)
    mask = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)[None, None]

    def theirs(a):
        weights = {
            "kv_a_proj_with_mqa.weight": torch.cat([a["w_dkv"], a["w_kr"]], 1).T,
            "kv_a_layernorm.weight": a["kv_norm.weight"],
            "kv_b_proj.weight": torch.cat([a["w_uk"], a["w_uv"]], 2).flatten(1).T,
            "o_proj.weight": a["w_o"].flatten(0, 1).T,
            "q_proj.weight" if q_rank is None else "q_b_proj.weight": a["w_q"].flatten(1).T,
        }
        if q_rank is not None:
            weights |= {"q_a_proj.weight": a["w_dq"].T, "q_a_layernorm.weight": a["q_norm.weight"]}
        angles = module.DeepseekV3RotaryEmbedding(config)(a["x"], torch.arange(LENGTH)[None])
        inputs = {"position_embeddings": angles, "attention_mask": mask}
        return torch.func.functional_call(layer, weights, (a["x"],), inputs, strict=True)[0]

    assert_parity(ours, theirs, arguments)

"""Sliding-window attention against transformers: Mistral's layer and window, and the library's two-sided window."""

import pytest

from tests.parity.oracles import LENGTH, WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity
AGAINST = "transformers MistralAttention"

WINDOW = 10


@pytest.mark.parametrize("causal", [True, False])
def test_mistral(causal):
    """The window counts the token itself when causal, and reaches half of its size to each side otherwise."""
    torch, mistral = load("torch"), load("transformers.models.mistral.modeling_mistral")
    masks = load("transformers.masking_utils")
    ours, arguments = mixer("local_attention", causal=causal, kv_heads=2, window=WINDOW)
    config = mistral.MistralConfig(
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=WIDTH // 4,
        sliding_window=WINDOW if causal else WINDOW // 2,
    )
    config._attn_implementation = "eager"
    layer = mistral.MistralAttention(config, layer_idx=0)
    make = masks.create_sliding_window_causal_mask if causal else masks.create_bidirectional_sliding_window_mask
    mask = make(config, torch.tensor(arguments["x"]), attention_mask=None, past_key_values=None)
    assert mask.shape[-2:] == (LENGTH, LENGTH)

    def theirs(a):
        angles = mistral.MistralRotaryEmbedding(config)(a["x"], torch.arange(LENGTH)[None])
        weights = {f"{name}_proj.weight": a[f"w_{name}"].flatten(1).T for name in "qkv"}
        weights["o_proj.weight"] = a["w_o"].flatten(0, 1).T
        inputs = {"position_embeddings": angles, "attention_mask": mask}
        return torch.func.functional_call(layer, weights, (a["x"],), inputs, strict=True)[0]

    assert_parity(ours, theirs, arguments)

"""Longformer against transformers' self-attention, window, global tokens and both sets of projections."""

import pytest

from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "transformers LongformerSelfAttention"
WINDOW, GLOBAL = 10, 3  # the library wants a window that divides the length


def test_layer():
    torch, longformer = load("torch"), load("transformers.models.longformer.modeling_longformer")
    ours, arguments = mixer("longformer", causal=False, window=WINDOW, global_tokens=GLOBAL)
    config = longformer.LongformerConfig(
        hidden_size=WIDTH, num_attention_heads=4, attention_window=[WINDOW], attention_probs_dropout_prob=0.0
    )
    layer = longformer.LongformerSelfAttention(config, layer_id=0).eval()
    is_global = (torch.arange(LENGTH) < GLOBAL).expand(BATCH, -1)
    masks = {
        "attention_mask": 10000.0 * is_global,
        "is_index_masked": torch.zeros_like(is_global),
        "is_index_global_attn": is_global,
        "is_global_attn": True,
    }

    def theirs(a):
        weights = {}
        for name, short in (("query", "q"), ("key", "k"), ("value", "v")):
            for suffix in ("", "_global"):
                weights[f"{name}{suffix}.weight"] = a[f"w_{short}{suffix}"].flatten(1).T
                weights[f"{name}{suffix}.bias"] = torch.zeros(WIDTH)
        y = torch.func.functional_call(layer, weights, (a["x"],), masks, strict=True)[0]
        return y @ a["w_o"].flatten(0, 1)

    assert_parity(ours, theirs, arguments)

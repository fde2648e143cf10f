"""Parameters of the released sizes in configs/hybrids.py, counted in transformers' classes built without values.

The sizes are those of the released configurations, written once more: what a class has by default is left out. See PAPER in
configs/hybrids.py for those that were not read from a released configuration.
"""

import pytest

from tests.configs.test_hybrids import RELEASED
from tests.parity.oracles import load

pytestmark = pytest.mark.parity

AGAINST = "transformers' classes on the meta device"


def layers(depth, linear="linear_attention", full=()):
    return ["full_attention" if i in full else linear for i in range(depth)]


def given(**options):
    """Options of a configuration, by the names that most of them share."""
    names = {
        "vocab": "vocab_size",
        "width": "hidden_size",
        "hidden": "intermediate_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "experts": "num_local_experts",
    }
    return {names.get(key, key): value for key, value in options.items()}


SIZES = {
    "qwen3_next": ("Qwen3NextConfig", {}),
    "kimi_linear": ("KimiLinearConfig", {"layer_types": layers(27, full=(3, 7, 11, 15, 19, 23, 26))}),
    "lfm2": ("Lfm2Config", given(width=2048, depth=16, full_attn_idxs=[2, 5, 8, 10, 12, 14])),
    "gemma3": (
        "Gemma3TextConfig",
        given(vocab=262144, width=1152, hidden=6912, depth=26, heads=4, kv_heads=1, head_dim=256),
    ),
    "gpt_oss": ("GptOssConfig", given(depth=24, experts=32)),
    "olmo_hybrid": ("OlmoHybridConfig", {}),
    "minimax01": (
        "MiniMaxConfig",
        given(vocab=200064, width=6144, hidden=9216, depth=80, heads=64, kv_heads=8, head_dim=128, experts=32)
        | {"layer_types": layers(80, full=range(7, 80, 8))},
    ),
    "granite4h": (
        "GraniteMoeHybridConfig",
        given(vocab=100352, width=1536, hidden=512, depth=40, heads=12, kv_heads=4, experts=64, mamba_n_heads=48)
        | {"layer_types": layers(40, full=range(5, 40, 10)), "mamba_d_state": 128, "tie_word_embeddings": True},
    ),
    "bamba": ("BambaConfig", given(vocab=128256, attn_layer_indices=[9, 18, 27], mamba_d_state=128)),
}


@pytest.mark.parametrize("name", SIZES)
def test_counts(name):
    torch, transformers = load("torch"), load("transformers")
    config, options = SIZES[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**options))
    assert (model.config.vocab_size, sum(p.numel() for p in model.parameters())) == RELEASED[name]

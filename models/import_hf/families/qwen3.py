"""Qwen 3: queries and keys are normalised."""

from typing import Any

from models.config import ModelConfig
from models.import_hf import transformer
from models.import_hf.architecture import Architecture, Options


def _config(get: Options) -> ModelConfig:
    get.expect(hidden_act="silu", use_sliding_window=False)
    transformer.expect_full_attention(get)
    bias = get("attention_bias")
    attention = {"qk_norm": True, "qk_norm_eps": get("rms_norm_eps"), "qkv_bias": bias, "bias": bias}
    return transformer.decoder(get, attention=attention)


def _options(config: ModelConfig) -> dict[str, Any]:
    return transformer.options(config) | {"attention_bias": config.mixer["attention"]["qkv_bias"]}


ARCHITECTURE = Architecture(
    "Qwen3ForCausalLM",
    _config,
    _options,
    transformer.tensors,
    frozenset({"attention"}),
    transformer.without(
        "mlp_bias",
        vocab_size=151936,
        intermediate_size=22016,
        num_key_value_heads=32,
        head_dim=128,
        use_sliding_window=False,
        layer_types=None,
    ),
    frozenset({"max_window_layers", "sliding_window"}),
)

"""Qwen 2 and 2.5: biases of queries, keys and values."""

from typing import Any

from models.config import ModelConfig
from models.import_hf import transformer
from models.import_hf.architecture import Architecture, Options


def _config(get: Options) -> ModelConfig:
    get.expect(hidden_act="silu", use_sliding_window=False)
    transformer.expect_full_attention(get)
    return transformer.decoder(get, attention={"qkv_bias": True})


def _options(config: ModelConfig) -> dict[str, Any]:
    return {key: value for key, value in transformer.options(config).items() if key != "head_dim"}


ARCHITECTURE = Architecture(
    "Qwen2ForCausalLM",
    _config,
    _options,
    transformer.tensors,
    frozenset({"attention"}),
    transformer.without(
        "mlp_bias",
        "attention_bias",
        "head_dim",
        vocab_size=151936,
        intermediate_size=22016,
        num_key_value_heads=32,
        use_sliding_window=False,
        layer_types=None,
    ),
    frozenset({"max_window_layers", "sliding_window"}),
)

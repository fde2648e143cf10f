"""Mistral: all layers see a window, or all see everything."""

from typing import Any

from models.config import ModelConfig
from models.import_hf import transformer
from models.import_hf.architecture import Architecture, Options


def _config(get: Options) -> ModelConfig:
    get.expect(hidden_act="silu")
    return transformer.decoder(get, kinds=transformer.sliding_if_given(get))


def _options(config: ModelConfig) -> dict[str, Any]:
    window = config.mixer.get("local_attention", {}).get("window")
    return transformer.options(config) | {"sliding_window": window}


ARCHITECTURE = Architecture(
    "MistralForCausalLM",
    _config,
    _options,
    transformer.tensors,
    frozenset({"attention", "local_attention"}),
    transformer.without(
        "mlp_bias", "attention_bias", intermediate_size=14336, num_key_value_heads=8, sliding_window=4096
    ),
)

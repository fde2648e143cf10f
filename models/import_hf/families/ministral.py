"""Ministral: some layers see a window."""

from typing import Any

from models.config import ModelConfig
from models.import_hf import transformer
from models.import_hf.architecture import Architecture, Options


def _config(get: Options) -> ModelConfig:
    get.expect(hidden_act="silu")
    return transformer.decoder(get, kinds=list(get.or_else("layer_types", transformer.sliding_if_given(get))))


def _options(config: ModelConfig) -> dict[str, Any]:
    window = config.mixer.get("local_attention", {}).get("window", 4096)  # its class makes the mask of one in any case
    return transformer.options(config) | {"sliding_window": window, "layer_types": transformer.kinds(config)}


ARCHITECTURE = Architecture(
    "MinistralForCausalLM",
    _config,
    _options,
    transformer.tensors,
    frozenset({"attention", "local_attention"}),
    transformer.without(
        "mlp_bias",
        "attention_bias",
        intermediate_size=14336,
        num_key_value_heads=8,
        sliding_window=4096,
        layer_types=None,
    ),
)

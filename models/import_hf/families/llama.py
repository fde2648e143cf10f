"""Llama 1 to 3, and what calls itself so."""

from typing import Any

from models.config import ModelConfig
from models.import_hf import transformer
from models.import_hf.architecture import Architecture, Options


def _config(get: Options) -> ModelConfig:
    get.expect(hidden_act="silu")
    transformer.expect_whole_heads(get)
    biases = {"qkv_bias": get("attention_bias"), "bias": get("attention_bias")}
    return transformer.decoder(get, attention=biases, channel_bias=get("mlp_bias"))


def _options(config: ModelConfig) -> dict[str, Any]:
    biases = {"attention_bias": config.mixer["attention"]["qkv_bias"], "mlp_bias": config.channel_bias}
    return transformer.options(config) | biases


ARCHITECTURE = Architecture(
    "LlamaForCausalLM",
    _config,
    _options,
    transformer.tensors,
    frozenset({"attention"}),
    transformer.DEFAULTS,
    frozenset({"pretraining_tp"}),
)

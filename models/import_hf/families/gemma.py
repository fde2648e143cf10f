"""Gemma 1: GeGLU, scaled embeddings, and norms that store their weights' difference from 1."""

from typing import Any

from models.config import ModelConfig
from models.import_hf import transformer
from models.import_hf.architecture import Architecture, Options


def _config(get: Options) -> ModelConfig:
    if get("hidden_act") not in ("gelu", "gelu_pytorch_tanh"):  # the same to the library's class
        get.refuse("hidden_act", "gelu_pytorch_tanh")
    if get("use_bidirectional_attention"):
        get.refuse("use_bidirectional_attention", None)
    return transformer.decoder(
        get,
        attention={"qkv_bias": get("attention_bias"), "bias": get("attention_bias")},
        channel_mixer="geglu",
        norm="rmsnorm1p",
        embedding_scale=get("hidden_size") ** 0.5,
    )


def _options(config: ModelConfig) -> dict[str, Any]:
    return transformer.options(config) | {"attention_bias": config.mixer["attention"]["qkv_bias"]}


ARCHITECTURE = Architecture(
    "GemmaForCausalLM",
    _config,
    _options,
    transformer.tensors,
    frozenset({"attention"}),
    transformer.without(
        "mlp_bias",
        vocab_size=256000,
        hidden_size=3072,
        intermediate_size=24576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=256,
        hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=True,
        use_bidirectional_attention=None,
    ),
    frozenset({"hidden_activation"}),
)

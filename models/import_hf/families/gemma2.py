"""Gemma 2: a window in every other layer, caps of scores and logits, and norms before and behind each branch."""

from typing import Any

from models.config import ModelConfig
from models.import_hf import transformer
from models.import_hf.architecture import Architecture, Options, number, preimage

DEFAULTS = transformer.without(
    "mlp_bias",
    "hidden_act",
    vocab_size=256000,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    tie_word_embeddings=True,
    use_bidirectional_attention=None,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    layer_types=None,
    final_logit_softcapping=30.0,
    attn_logit_softcapping=50.0,
)
NEUTRAL = frozenset({"hidden_act", "sliding_window_size"})


def gemma(get: Options, every: int, attention: dict[str, Any], **more) -> ModelConfig:
    """What the later Gemmas have in common.

    Args:
      every: one layer of so many sees everything, where the options do not say which.
      attention: further hyperparameters.
      **more: further arguments of `transformer.decoder`.
    """
    get.expect(hidden_activation="gelu_pytorch_tanh")
    transformer.expect_whole_heads(get)
    if get("use_bidirectional_attention"):
        get.refuse("use_bidirectional_attention", False)
    kind = lambda i: "sliding_attention" if (i + 1) % every else "full_attention"
    kinds = get.or_else("layer_types", [kind(i) for i in range(get("num_hidden_layers"))])
    biases = {"qkv_bias": get("attention_bias"), "bias": get("attention_bias")}
    return transformer.decoder(
        get,
        attention={"scale": get("query_pre_attn_scalar") ** -0.5, **biases, **attention},
        kinds=list(kinds),
        channel_mixer="geglu",
        norm="rmsnorm1p",
        norm_position="sandwich",
        embedding_scale=get("hidden_size") ** 0.5,
        logit_cap=float(get.or_else("final_logit_softcapping", 0.0)),
        **more,
    )


def options(config: ModelConfig) -> dict[str, Any]:
    """The library's options of the later Gemmas."""
    mixer = next(iter(config.mixer.values()))
    return transformer.options(config) | {
        "attention_bias": mixer["qkv_bias"],
        "query_pre_attn_scalar": number(preimage(lambda scalar: scalar**-0.5, mixer["scale"], mixer["scale"] ** -2)),
        "sliding_window": config.mixer.get("local_attention", {}).get("window", DEFAULTS["sliding_window"]),
        "layer_types": transformer.kinds(config),
        "final_logit_softcapping": config.logit_cap or None,
    }


def _config(get: Options) -> ModelConfig:
    return gemma(get, 2, {"score_cap": float(get.or_else("attn_logit_softcapping", 0.0))})


def _options(config: ModelConfig) -> dict[str, Any]:
    mixer = next(iter(config.mixer.values()))
    return options(config) | {"attn_logit_softcapping": mixer["score_cap"] or None}


ARCHITECTURE = Architecture(
    "Gemma2ForCausalLM",
    _config,
    _options,
    transformer.tensors,
    frozenset({"attention", "local_attention"}),
    DEFAULTS,
    NEUTRAL,
)

"""Bamba: Mamba-2, and attention of half-rotated heads in some layers."""

from typing import Any

from models.config import ModelConfig
from models.import_hf import state_space, transformer
from models.import_hf.architecture import (
    VECTOR,
    Architecture,
    Block,
    Options,
    Tensors,
    arranged,
    config_of,
    gated_mlp,
    outside,
)
from models.import_hf.families import mamba2

DEFAULTS = state_space.DEFAULTS | {
    "vocab_size": 128000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "attn_layer_indices": None,
}


def _config(get: Options) -> ModelConfig:
    get.expect(hidden_act="silu", partial_rotary_factor=0.5)  # which its class has whatever the option says
    full, bias = get.or_else("attn_layer_indices", ()), get("attention_bias")
    names = ["attention" if i in full else "mamba2" for i in range(get("num_hidden_layers"))]
    mixer = {
        "mamba2": state_space.hyperparameters(get),
        "attention": transformer.hyperparameters(get, get.rotary(partial=True), qkv_bias=bias, bias=bias),
    }
    return config_of(
        get,
        **arranged(names),
        mixer={name: mixer[name] for name in dict.fromkeys(names)},
        channel_mixer="swiglu",
        channel_size=get("intermediate_size"),
        channel_bias=get("mlp_bias"),
        norm_eps=get("rms_norm_eps"),
    )


def _options(config: ModelConfig) -> dict[str, Any]:
    found = {
        "attn_layer_indices": [i for i, item in enumerate(config.items) if item.mixers == ("attention",)],
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.length,
    }
    ssm = config.mixer.get("mamba2")
    found |= state_space.options(ssm, config.width) if ssm else state_space.no_options(config.width)
    if "attention" in config.mixer:
        attention = config.mixer["attention"]
        found |= transformer.options(config, attention) | {"attention_bias": attention["bias"]}
        del found["head_dim"]
    return found | {"intermediate_size": config.channel_size or 1, "mlp_bias": config.channel_bias}


def _tensors(config: ModelConfig) -> Tensors:
    yield from outside(config, "model.embed_tokens.weight", "model.final_layernorm.weight")
    for i, item in enumerate(config.items):
        block = Block(f"model.layers.{i}", i)
        yield block("input_layernorm.weight", "mixer_norm.weight", VECTOR)
        yield block("pre_ff_layernorm.weight", "channel_norm.weight", VECTOR)
        yield from gated_mlp(block, "feed_forward", bias=config.channel_bias)
        if item.mixers == ("attention",):
            yield from transformer.attention(block, config.mixer["attention"])
        else:
            yield from mamba2.mixer_rows(block, "mamba")


ARCHITECTURE = Architecture(
    "BambaForCausalLM",
    _config,
    _options,
    _tensors,
    frozenset({"mamba2", "attention"}),
    DEFAULTS,
    state_space.NEUTRAL | {"z_loss_coefficient"},
)

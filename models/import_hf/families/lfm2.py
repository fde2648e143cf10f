"""LFM2: gated short convolutions, and attention in some layers."""

from typing import Any

from models.config import ModelConfig
from models.import_hf import transformer
from models.import_hf.architecture import (
    LINEAR,
    VECTOR,
    Architecture,
    Block,
    Options,
    Tensors,
    arranged,
    choose,
    config_of,
    outside,
    rope_options,
)

DEFAULTS = {
    "vocab_size": 65536,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
    "full_attn_idxs": None,
    "layer_types": None,
    "block_ff_dim": None,  # older names, which come first
    "tie_embedding": None,
}
# What published files have and the library's class does not read.
NEUTRAL = frozenset(
    """
    block_dim block_mlp_init_scale block_norm_eps block_out_init_scale block_use_swiglu block_use_xavier_init conv_dim
    conv_dim_out conv_use_xavier_init num_heads theta use_pos_enc
    """.split()
)
KINDS = {"conv": "gated_short_conv", "full_attention": "attention"}


def _hidden(get: Options) -> int:
    """The size of the channel mixer, which may be said as that of an MLP with as many parameters."""
    hidden = get.or_else("block_ff_dim", get("intermediate_size"))
    if get("block_auto_adjust_ff_dim"):
        hidden = int(2 * hidden / 3)
        if get.or_else("block_ffn_dim_multiplier", None) is not None:
            multiple = get("block_multiple_of")
            hidden = -(-int(get("block_ffn_dim_multiplier") * hidden) // multiple) * multiple
    return hidden


def _config(get: Options) -> ModelConfig:
    depth, heads = get("num_hidden_layers"), get("num_attention_heads")
    full = get.or_else("full_attn_idxs", range(depth))
    kinds = get.or_else("layer_types", ["full_attention" if i in full else "conv" for i in range(depth)])
    names = [choose("layer_types", kind, KINDS, get.where) for kind in kinds]
    base, _, scaling = get.rotary()
    mixer = {
        "gated_short_conv": {"conv_size": get("conv_L_cache"), "bias": get("conv_bias")},
        "attention": {
            "heads": heads,
            "kv_heads": get.or_else("num_key_value_heads", heads),
            "head_channels": get("hidden_size") // heads,
            "rotary_base": base,
            "rotary_scaling": scaling,
            "qk_norm": True,
            "qk_norm_eps": get("norm_eps"),
        },
    }
    return config_of(
        get,
        **arranged(names),
        mixer={name: mixer[name] for name in dict.fromkeys(names)},
        channel_mixer="swiglu",
        channel_size=_hidden(get),
        norm_eps=get("norm_eps"),
        tie_embeddings=get.or_else("tie_embedding", get("tie_word_embeddings")),
    )


def _options(config: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in KINDS.items()}
    attention, conv = (config.mixer.get(name, {}) for name in ("attention", "gated_short_conv"))
    return {
        "intermediate_size": config.channel_size or 1,
        "block_auto_adjust_ff_dim": False,
        "num_attention_heads": attention.get("heads", 1),
        "num_key_value_heads": attention.get("kv_heads", 1),
        "norm_eps": config.norm_eps,
        "conv_L_cache": conv.get("conv_size", 3),
        "conv_bias": conv.get("bias", False),
        "layer_types": [names[name] for item in config.items for name in item.mixers],
        "max_position_embeddings": config.length,
        **(rope_options(attention) if attention else {}),
    }


def _tensors(config: ModelConfig) -> Tensors:
    yield from outside(config, "model.embed_tokens.weight", "model.embedding_norm.weight")
    for i in range(config.depth):
        block = Block(f"model.layers.{i}", i)
        yield block("operator_norm.weight", "mixer_norm.weight", VECTOR)
        yield block("ffn_norm.weight", "channel_norm.weight", VECTOR)
        for j, name in enumerate(("w1", "w3")):
            yield block(f"feed_forward.{name}.weight", "channel_mixer.w_in", "d f -> f d", (slice(None), j))
        yield block("feed_forward.w2.weight", "channel_mixer.w_out", LINEAR)
        if config.items[i].mixers == ("attention",):
            for name in "qkv":
                yield block(f"self_attn.{name}_proj.weight", f"mixer.w_{name}", "d h k -> (h k) d")
            yield block("self_attn.out_proj.weight", "mixer.w_o", "h k d -> d (h k)")
            yield from transformer.qk_norms(block, "self_attn", "layernorm")
        else:
            yield block("conv.in_proj.weight", "mixer.w_in", "d m c -> (m c) d")
            yield block("conv.conv.weight", "mixer.taps", "w i -> i 1 w")
            yield block("conv.out_proj.weight", "mixer.w_out", LINEAR)
            if config.mixer["gated_short_conv"]["bias"]:
                yield block("conv.in_proj.bias", "mixer.b_in", "m c -> (m c)")
                yield block("conv.conv.bias", "mixer.b_conv", VECTOR)
                yield block("conv.out_proj.bias", "mixer.b_out", VECTOR)


ARCHITECTURE = Architecture(
    "Lfm2ForCausalLM",
    _config,
    _options,
    _tensors,
    frozenset({"gated_short_conv", "attention"}),
    DEFAULTS,
    NEUTRAL,
)

"""RecurrentGemma (Griffin)."""

from typing import Any

import jax.numpy as jnp

from common.errors import UserError
from models.checks import whole
from models.config import ModelConfig
from models.import_hf import transformer
from models.import_hf.architecture import (
    LINEAR,
    VECTOR,
    Architecture,
    Block,
    Options,
    Tensors,
    attention_rows,
    choose,
    config_of,
    gated_mlp,
    outside,
)

DEFAULTS = {
    "num_hidden_layers": 26,
    "vocab_size": 256000,
    "hidden_size": 2560,
    "intermediate_size": 3 * 2560,
    "num_attention_heads": 10,
    "lru_width": None,
    "attention_window_size": 2048,
    "conv1d_width": 4,
    "logits_soft_cap": 30.0,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "block_types": ("recurrent", "recurrent", "attention"),
    "attention_dropout": 0.0,
    "num_key_value_heads": None,
    "attention_bias": False,
    "head_dim": None,
    "embeddings_scale_by_sqrt_dim": True,  # of older files
    "tie_word_embeddings": True,
}
_GEMMA_KINDS = {"recurrent": "rglru", "attention": "local_attention"}


def _config(get: Options) -> ModelConfig:
    width, depth, heads = get("hidden_size"), get("num_hidden_layers"), get("num_attention_heads")
    get.expect(attention_bias=False, attention_dropout=0.0, hidden_activation="gelu_pytorch_tanh")
    get.expect(embeddings_scale_by_sqrt_dim=True)
    if get.or_else("head_dim", width // heads) * heads != width:
        get.refuse("head_dim", width / heads)
    if get("intermediate_size") % 2:
        raise UserError(
            f"{get.where}: intermediate_size={get('intermediate_size')} must be even: half of it is the hidden size"
        )
    base, share, scaling = get.rotary(partial=True)
    transformer.expect_pairs(get, width // heads, share)
    cycle = [choose("block_types", kind, _GEMMA_KINDS, get.where) for kind in get("block_types")]
    layers = tuple((cycle * depth)[:depth])
    mixer = {
        "rglru": {
            "heads": heads,
            "expand": get.or_else("lru_width", width) / width,
            "conv_size": get("conv1d_width"),
            "bias": True,
        },
        "local_attention": {
            "heads": heads,
            "kv_heads": get.or_else("num_key_value_heads", heads),
            "window": get("attention_window_size"),
            "rotary_base": base,
            "rotary_fraction": share,
            "rotary_scaling": scaling,
            "bias": True,
        },
    }
    return config_of(
        get,
        pattern=tuple(cycle) if depth >= len(cycle) else layers,
        suffix=layers[depth - depth % len(cycle) :] if depth >= len(cycle) else (),
        mixer={name: mixer[name] for name in dict.fromkeys(layers)},
        channel_mixer="geglu",
        channel_size=get("intermediate_size") // 2,
        channel_bias=True,
        norm="rmsnorm1p",
        norm_eps=get("rms_norm_eps"),
        embedding_scale=float(jnp.bfloat16(width**0.5)),  # rounded by the authors, in every dtype
        logit_cap=float(get("logits_soft_cap")),
    )


def _options(config: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in _GEMMA_KINDS.items()}
    kinds = [names[name] for item in config.items for name in item.mixers]
    cycle = kinds[: len(config.pattern)]
    recurrent, attention = (config.mixer.get(name, {}) for name in ("rglru", "local_attention"))
    heads = (attention or recurrent)["heads"]
    return {
        "intermediate_size": 2 * (config.channel_size or 1),
        "num_attention_heads": heads,
        "num_key_value_heads": attention.get("kv_heads", heads),
        "lru_width": whole(recurrent.get("expand", 1.0) * config.width),
        "attention_window_size": attention.get("window", 2048),
        "conv1d_width": recurrent.get("conv_size", 4),
        "logits_soft_cap": config.logit_cap,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": attention.get("rotary_base", 10000.0),
        "partial_rotary_factor": attention.get("rotary_fraction", 0.5),
        "block_types": cycle if (cycle * config.depth)[: config.depth] == kinds else kinds,
    }


def _tensors(config: ModelConfig) -> Tensors:
    yield from outside(config, "model.embed_tokens.weight", "model.final_norm.weight")
    for i in range(config.depth):
        block = Block(f"model.layers.{i}", i)
        yield block("temporal_pre_norm.weight", "mixer_norm.weight", VECTOR)
        yield block("channel_pre_norm.weight", "channel_norm.weight", VECTOR)
        yield from gated_mlp(block, "mlp_block", bias=True)
        if config.items[i].mixers == ("rglru",):
            for ours, theirs in {"x": "linear_x", "y": "linear_y", "o": "linear_out"}.items():
                yield block(f"temporal_block.{theirs}.weight", f"mixer.w_{ours}", LINEAR)
                yield block(f"temporal_block.{theirs}.bias", f"mixer.b_{ours}", VECTOR)
            yield block("temporal_block.conv_1d.weight", "mixer.conv", "w i -> i 1 w")
            yield block("temporal_block.conv_1d.bias", "mixer.conv_bias", VECTOR)
            yield block("temporal_block.rg_lru.recurrent_param", "mixer.lambda_", VECTOR)
            for ours, theirs in {"r": "recurrent", "i": "input"}.items():
                yield block(f"temporal_block.rg_lru.{theirs}_gate_weight", f"mixer.w_{ours}", "h i o -> h i o")
                yield block(f"temporal_block.rg_lru.{theirs}_gate_bias", f"mixer.b_{ours}", "h i -> h i")
        else:
            yield from attention_rows(block, "temporal_block")
            yield block("temporal_block.o_proj.bias", "mixer.b_o", VECTOR)


ARCHITECTURE = Architecture(
    "RecurrentGemmaForCausalLM",
    _config,
    _options,
    _tensors,
    frozenset({"rglru", "local_attention"}),
    DEFAULTS,
    frozenset({"final_w_init_variance_scale", "w_init_variance_scale"}),
    buffers=(".rotary_emb.inv_freq", "model.normalizer"),
)

"""Jamba: Mamba with inner norms, attention without positions in one layer of eight, experts in every other."""

import math
from typing import Any

from models.checks import whole
from models.config import ModelConfig
from models.import_hf import experts, transformer
from models.import_hf.architecture import (
    LINEAR,
    VECTOR,
    Architecture,
    Block,
    Options,
    Tensors,
    arranged,
    config_of,
    gated_mlp,
    number,
    outside,
)
from models.import_hf.families import mamba

DEFAULTS = {
    "vocab_size": 65536,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "num_experts": 16,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "router_aux_loss_coef": 0.001,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": "auto",
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "mamba_inner_layernorms": True,  # of older files, as the next one
    "sliding_window": None,
}
NEUTRAL = frozenset(
    """
    calc_logits_for_entire_prompt num_logits_to_keep output_router_logits use_associative_scan use_mamba_kernels use_mambapy
    """.split()
)


def _config(get: Options) -> ModelConfig:
    get.expect(hidden_act="silu", mamba_conv_bias=True, mamba_proj_bias=False, mamba_inner_layernorms=True)
    get.expect(rms_norm_eps=1e-6)  # of Mamba's inner norms, too
    get.expect(sliding_window=None)
    width, depth, rank = get("hidden_size"), get("num_hidden_layers"), get("mamba_dt_rank")
    at = lambda i, what: i % get(f"{what}_layer_period") == get(f"{what}_layer_offset")
    names = ["attention" if at(i, "attn") else "mamba" for i in range(depth)]
    channels = ["moe" if get("num_experts") > 1 and at(i, "expert") else "swiglu" for i in range(depth)]
    mixer = {
        "mamba": {
            "state": get("mamba_d_state"),
            "expand": get("mamba_expand"),
            "conv_size": get("mamba_d_conv"),
            "dt_rank": math.ceil(width / 16) if rank == "auto" else rank,
            "norm": "rms",
        },
        "attention": transformer.hyperparameters(get, None),
    }
    top_k = get("num_experts_per_tok")
    moe = {
        "experts": get("num_experts"),
        "top_k": top_k,
        "hidden": get("intermediate_size"),
        "renormalize": False,
        "balance": experts.balance(get, top_k),
    }
    return config_of(
        get,
        **arranged([f"{name}/{channel}" for name, channel in zip(names, channels, strict=True)]),
        mixer={name: mixer[name] for name in dict.fromkeys(names)},
        **({"moe": moe} if "moe" in channels else {}),
        channel_size=get("intermediate_size"),
        norm_eps=get("rms_norm_eps"),
    )


def _options(config: ModelConfig) -> dict[str, Any]:
    items = list(enumerate(config.items))
    attention, ssm = (config.mixer.get(name) for name in ("attention", "mamba"))
    sparse = [i for i, item in items if config.channel_mixer_of(item) == "moe"]
    found = {
        **dict(zip(("attn_layer_period", "attn_layer_offset"), _places(config, "attention"), strict=True)),
        "intermediate_size": config.channel_size or config.moe["hidden"] or 1,
        "rms_norm_eps": config.norm_eps,
        "num_experts": config.moe["experts"] if sparse else 1,
        "num_experts_per_tok": config.moe["top_k"],
        "router_aux_loss_coef": config.moe["balance"] / config.moe["top_k"],
        "max_position_embeddings": config.length,
    }
    if sparse:
        names = ("expert_layer_period", "expert_layer_offset")
        found |= dict(zip(names, experts.period(sparse, config.depth), strict=True))
    if attention:
        found |= {"num_attention_heads": attention["heads"], "num_key_value_heads": attention["kv_heads"]}
    if ssm:
        found |= {
            "mamba_d_state": ssm["state"],
            "mamba_d_conv": ssm["conv_size"],
            "mamba_expand": number(whole(ssm["expand"] * config.width) / config.width),
            "mamba_dt_rank": ssm["dt_rank"],
        }
    return found


def _places(config: ModelConfig, name: str) -> tuple[int, int]:
    return experts.period([i for i, item in enumerate(config.items) if name in item.mixers], config.depth)


def _tensors(config: ModelConfig) -> Tensors:
    yield from outside(config, "model.embed_tokens.weight", "model.final_layernorm.weight")
    for i, item in enumerate(config.items):
        block = Block(f"model.layers.{i}", i)
        yield block("input_layernorm.weight", "mixer_norm.weight", VECTOR)
        yield block("pre_ff_layernorm.weight", "channel_norm.weight", VECTOR)
        if item.mixers == ("attention",):
            yield from transformer.attention(block, config.mixer["attention"])
        else:
            yield from mamba.mixer_rows(block, "mamba")
            for ours, theirs in {"r_norm": "dt", "b_norm": "b", "c_norm": "c"}.items():
                yield block(f"mamba.{theirs}_layernorm.weight", f"mixer.{ours}.weight", VECTOR)
        if config.channel_mixer_of(item) == "moe":
            yield block("feed_forward.router.weight", "channel_mixer.w_router", LINEAR)
            yield from experts.rows(block, "feed_forward.experts", config)
        else:
            yield from gated_mlp(block, "feed_forward")


ARCHITECTURE = Architecture(
    "JambaForCausalLM", _config, _options, _tensors, frozenset({"mamba", "attention"}), DEFAULTS, NEUTRAL
)

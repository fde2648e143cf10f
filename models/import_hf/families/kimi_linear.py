"""Kimi Linear: Kimi Delta Attention, MLA without positions in some layers, and experts behind all layers but the first."""

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
    choose,
    config_of,
    gated_mlp,
    outside,
)

DEFAULTS = {
    "vocab_size": 163840,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "linear_head_dim": 128,
    "linear_num_heads": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_shared_experts": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "moe_renormalize": True,
    "routed_scaling_factor": 2.446,
    "layer_types": None,
    "mlp_layer_types": None,
    "linear_attn_config": None,  # of published files, as the next ones
    "first_k_dense_replace": 1,
    "mla_use_nope": True,
    "moe_layer_freq": 1,
    "moe_router_activation_func": "sigmoid",
    "num_nextn_predict_layers": 0,
}
NEUTRAL = frozenset(
    """
    head_dim model_max_length output_router_logits pretraining_tp qk_head_dim rope_scaling rope_theta use_grouped_topk
    """.split()
)
KINDS = {"linear_attention": "kimi_delta_attention", "full_attention": "mla"}
CHANNELS = {"dense": "swiglu", "sparse": "moe"}


def _linear(get: Options) -> dict[str, Any]:
    """What published files have in a section of its own, whose layers are counted from 1."""
    section = dict(get.or_else("linear_attn_config", {}))
    full, other = section.pop("full_attn_layers", None), section.pop("kda_layers", None)
    found = {
        "heads": section.pop("num_heads", get("linear_num_heads")),
        "size": section.pop("head_dim", get("linear_head_dim")),
        "conv_size": section.pop("short_conv_kernel_size", get("linear_conv_kernel_dim")),
    }
    if section:
        get.refuse("linear_attn_config", "full_attn_layers, kda_layers, num_heads, head_dim and short_conv_kernel_size")
    depth = get("num_hidden_layers")
    at = [i + 1 for i in range(depth)]
    is_full = {i: i in full if full is not None and other is not None else i > 1 and (i - 1) % 4 == 0 for i in at}
    kinds = get.or_else("layer_types", ["full_attention" if is_full[i] else "linear_attention" for i in at])
    return found | {"kinds": kinds}


def _config(get: Options) -> ModelConfig:
    get.expect(hidden_act="silu", attention_bias=False, attention_dropout=0.0, mla_use_nope=True, moe_layer_freq=1)
    get.expect(moe_router_activation_func="sigmoid", num_nextn_predict_layers=0)
    width, depth, heads = get("hidden_size"), get("num_hidden_layers"), get("num_attention_heads")
    if get.or_else("num_key_value_heads", heads) != heads:
        get.refuse("num_key_value_heads", heads)
    linear = _linear(get)
    names = [choose("layer_types", kind, KINDS, get.where) for kind in linear["kinds"]]
    default = ["dense" if i < get("first_k_dense_replace") else "sparse" for i in range(depth)]
    kinds = get.or_else("mlp_layer_types", default)
    channels = [choose("mlp_layer_types", kind, CHANNELS, get.where) for kind in kinds]
    mixer = {
        "kimi_delta_attention": {
            "heads": linear["heads"],
            "expand": linear["heads"] * linear["size"] / width,
            "conv_size": linear["conv_size"],
            "eps": get("rms_norm_eps"),
        },
        "mla": {
            "heads": heads,
            "q_rank": get("q_lora_rank"),
            "kv_rank": get("kv_lora_rank"),
            "nope_channels": get("qk_nope_head_dim"),
            "rotary_channels": get("qk_rope_head_dim"),
            "value_channels": get("v_head_dim"),
            "positions": "nope",
        },
    }
    moe = {
        "experts": get("num_experts"),
        "top_k": get("num_experts_per_token"),
        "hidden": get("moe_intermediate_size"),
        "router": "sigmoid",
        "groups": get("num_expert_group"),
        "top_groups": get("topk_group"),
        "scale": float(get("routed_scaling_factor")),
        "renormalize": get("moe_renormalize"),
        "shared": get("num_shared_experts"),
        "balance": 0.0,
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
    names, channels = ({ours: theirs for theirs, ours in of.items()} for of in (KINDS, CHANNELS))
    moe, found = config.moe, {}
    if "mla" in config.mixer:
        mla = config.mixer["mla"]
        found |= {
            "num_attention_heads": mla["heads"],
            "num_key_value_heads": mla["heads"],
            "q_lora_rank": mla["q_rank"],
            "kv_lora_rank": mla["kv_rank"],
            "qk_nope_head_dim": mla["nope_channels"],
            "qk_rope_head_dim": mla["rotary_channels"],
            "v_head_dim": mla["value_channels"],
        }
    if "kimi_delta_attention" in config.mixer:
        linear = config.mixer["kimi_delta_attention"]
        found |= {
            "linear_num_heads": linear["heads"],
            "linear_head_dim": whole(linear["expand"] * config.width) // linear["heads"],
            "linear_conv_kernel_dim": linear["conv_size"],
        }
    kinds = map(config.channel_mixer_of, config.items)
    return found | {
        "pad_token_id": None,
        "layer_types": [names[name] for item in config.items for name in item.mixers],
        "mlp_layer_types": [channels.get(kind, "dense") for kind in kinds],
        "intermediate_size": config.channel_size or 1,
        "rms_norm_eps": config.norm_eps,
        "model_max_length": config.length,
        "num_experts": moe["experts"],
        "num_experts_per_token": moe["top_k"],
        "moe_intermediate_size": moe["hidden"] or 1,
        "num_shared_experts": moe["shared"],
        "num_expert_group": moe["groups"],
        "topk_group": moe["top_groups"],
        "moe_renormalize": moe["renormalize"],
        "routed_scaling_factor": moe["scale"],
    }


def _tensors(config: ModelConfig) -> Tensors:
    yield from outside(config, "model.embed_tokens.weight", "model.norm.weight", ties=False)
    for i, item in enumerate(config.items):
        block = Block(f"model.layers.{i}", i)
        yield from transformer.norms(block)
        if item.mixers == ("mla",):
            yield from _mla(block, config.mixer["mla"])
        else:
            yield from _delta_attention(block)
        if config.channel_mixer_of(item) == "moe":
            yield block("block_sparse_moe.gate.weight", "channel_mixer.w_router", LINEAR)
            yield block("block_sparse_moe.gate.e_score_correction_bias", "channel_mixer.bias", VECTOR)
            yield from experts.rows(block, "block_sparse_moe.experts", config, ("w1", "w3", "w2"))
            if config.moe["shared"]:
                yield from gated_mlp(block, "block_sparse_moe.shared_experts", ours="channel_mixer.shared")
        else:
            yield from gated_mlp(block, "mlp")


def _mla(block: Block, mixer: dict[str, Any]) -> Tensors:
    if mixer["q_rank"] is None:
        yield block("self_attn.q_proj.weight", "mixer.w_q", "d h k -> (h k) d")
    else:
        yield block("self_attn.q_a_proj.weight", "mixer.w_dq", LINEAR)
        yield block("self_attn.q_a_layernorm.weight", "mixer.q_norm.weight", VECTOR)
        yield block("self_attn.q_b_proj.weight", "mixer.w_q", "d h k -> (h k) d")
    latent = tuple(block.part(f"mixer.{name}", LINEAR) for name in ("w_dkv", "w_kr"))
    yield f"{block.prefix}.self_attn.kv_a_proj_with_mqa.weight", latent
    yield block("self_attn.kv_a_layernorm.weight", "mixer.kv_norm.weight", VECTOR)
    of_head = lambda h: [block.part(f"mixer.{name}", LINEAR, (slice(None), h)) for name in ("w_uk", "w_uv")]
    yield (
        f"{block.prefix}.self_attn.kv_b_proj.weight",
        tuple(part for h in range(mixer["heads"]) for part in of_head(h)),
    )
    yield block("self_attn.o_proj.weight", "mixer.w_o", "h v d -> d (h v)")


def _delta_attention(block: Block) -> Tensors:
    for name in "qkv":
        yield block(f"self_attn.{name}_proj.weight", f"mixer.{name}.weight", LINEAR)
        yield block(f"self_attn.{name}_conv1d.weight", f"mixer.{name}.taps", "w i -> i 1 w")
    for name in "fg":
        yield block(f"self_attn.{name}_a_proj.weight", f"mixer.w_{name}1", LINEAR)
        yield block(f"self_attn.{name}_b_proj.weight", f"mixer.w_{name}2", "r h k -> (h k) r")
    yield block("self_attn.b_proj.weight", "mixer.w_b", LINEAR)
    yield block("self_attn.dt_bias", "mixer.dt_bias", "h k -> (h k)")
    yield block("self_attn.A_log", "mixer.a_log", "h -> 1 1 h 1")
    yield block("self_attn.o_norm.weight", "mixer.norm.weight", VECTOR)
    yield block("self_attn.o_proj.weight", "mixer.w_o", "h k d -> d (h k)")


ARCHITECTURE = Architecture(
    "KimiLinearForCausalLM",
    _config,
    _options,
    _tensors,
    frozenset({"kimi_delta_attention", "mla"}),
    DEFAULTS,
    NEUTRAL,
    unused=("mtp.",),
    ties=False,
    spellings={".mlp.": ".block_sparse_moe."},  # as the library writes them
)

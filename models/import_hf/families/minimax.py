"""MiniMax-01: Lightning Attention, attention in some layers, and experts; what a branch is added to is normalised.

The library rotates whole heads, whatever `rotary_dim` a release has: it is refused.
"""

from typing import Any

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
    number,
    outside,
)

FACTORS = {f"{part}_{name}_factor": 1 for part in ("full_attn", "linear_attn", "mlp") for name in ("alpha", "beta")}
DEFAULTS = (
    transformer.without(
        "mlp_bias",
        "attention_bias",
        "partial_rotary_factor",
        intermediate_size=14336,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=None,
        layer_types=None,
        num_experts_per_tok=2,
        num_local_experts=8,
        router_aux_loss_coef=0.001,
    )
    | FACTORS
)
KINDS = {"linear_attention": "lightning_attention", "full_attention": "attention"}


def _factor(get: Options, name: str) -> float:
    """The factor of all branches, or of what they are added to, which must be one number."""
    factor = get(f"full_attn_{name}_factor")
    get.expect(**{f"{part}_{name}_factor": factor for part in ("linear_attn", "mlp")})
    return float(factor)


def _config(get: Options) -> ModelConfig:
    get.expect(hidden_act="silu", sliding_window=None)
    heads, depth = get("num_attention_heads"), get("num_hidden_layers")
    size = get.or_else("head_dim", get("hidden_size") // heads)
    default = ["linear_attention" if i % 2 else "full_attention" for i in range(depth)]
    names = [choose("layer_types", kind, KINDS, get.where) for kind in get.or_else("layer_types", default)]
    mixer = {
        "lightning_attention": {"heads": heads, "head_channels": size, "counted": "all"},
        "attention": transformer.hyperparameters(get, get.rotary()),
    }
    top_k = get("num_experts_per_tok")
    return config_of(
        get,
        **arranged(names),
        mixer={name: mixer[name] for name in dict.fromkeys(names)},
        channel_mixer="moe",
        moe={
            "experts": get("num_local_experts"),
            "top_k": top_k,
            "hidden": get("intermediate_size"),
            "balance": experts.balance(get, top_k),
        },
        norm_position="input",
        norm_eps=get("rms_norm_eps"),
        residual_scale=_factor(get, "alpha"),
        branch_scale=_factor(get, "beta"),
    )


def _options(config: ModelConfig) -> dict[str, Any]:
    names, moe, found = {ours: theirs for theirs, ours in KINDS.items()}, config.moe, {}
    if "lightning_attention" in config.mixer:
        linear = config.mixer["lightning_attention"]
        found |= {"num_attention_heads": linear["heads"], "head_dim": linear["head_channels"]}
    if "attention" in config.mixer:
        found |= transformer.options(config, config.mixer["attention"])
    scales = {"alpha": config.residual_scale, "beta": config.branch_scale}
    return found | {
        **{key: number(scales[key.split("_")[-2]]) for key in FACTORS},
        "layer_types": [names[name] for item in config.items for name in item.mixers],
        "rms_norm_eps": config.norm_eps,
        "intermediate_size": moe["hidden"] or 1,
        "num_local_experts": moe["experts"],
        "num_experts_per_tok": moe["top_k"],
        "router_aux_loss_coef": moe["balance"] / moe["top_k"],
        "max_position_embeddings": config.length,
    }


def _tensors(config: ModelConfig) -> Tensors:
    yield from outside(config, "model.embed_tokens.weight", "model.norm.weight")
    for i, item in enumerate(config.items):
        block = Block(f"model.layers.{i}", i)
        yield from transformer.norms(block)
        if item.mixers == ("attention",):
            yield from transformer.attention(block, config.mixer["attention"])
        else:
            yield block("self_attn.qkv_proj.weight", "mixer.w_qkv", "d m h k -> (h m k) d")
            yield block("self_attn.output_gate.weight", "mixer.w_g", LINEAR)
            yield block("self_attn.norm.weight", "mixer.norm.weight", VECTOR)
            yield block("self_attn.out_proj.weight", "mixer.w_o", LINEAR)
        yield block("block_sparse_moe.gate.weight", "channel_mixer.w_router", LINEAR)
        yield from experts.rows(block, "block_sparse_moe.experts", config, ("w1", "w3", "w2"))


ARCHITECTURE = Architecture(
    "MiniMaxForCausalLM",
    _config,
    _options,
    _tensors,
    frozenset({"lightning_attention", "attention"}),
    DEFAULTS,
    frozenset({"block_size", "output_router_logits", "router_jitter_noise"}),
    buffers=(".rotary_emb.inv_freq", ".slope_rate", ".query_decay", ".key_decay", ".diagonal_decay"),
)

"""Granite 4: Mamba-2, and attention in some layers, with or without experts; factors of embeddings, branches and logits."""

from typing import Any

from models.config import ModelConfig
from models.import_hf import experts, state_space, transformer
from models.import_hf.architecture import (
    LINEAR,
    Architecture,
    Block,
    Options,
    Tensors,
    arranged,
    choose,
    config_of,
    number,
    outside,
    preimage,
)
from models.import_hf.families import mamba2

DEFAULTS = state_space.DEFAULTS | {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
    "shared_intermediate_size": 1024,
    "position_embedding_type": None,
    "layer_types": None,
    "normalization_function": "rmsnorm",  # of published files
}


def _config(get: Options) -> ModelConfig:
    get.expect(hidden_act="silu", normalization_function="rmsnorm")
    position, bias = get.or_else("position_embedding_type", "nope"), get("attention_bias")
    if position not in ("rope", "nope"):
        get.refuse("position_embedding_type", "rope' or 'nope")
    kinds = get.or_else("layer_types", ["linear_attention"] * get("num_hidden_layers"))
    names = [choose("layer_types", kind, state_space.KINDS, get.where) for kind in kinds]
    rotary, scale = get.rotary() if position == "rope" else None, float(get("attention_multiplier"))
    mixer = {
        "mamba2": state_space.hyperparameters(get),
        "attention": transformer.hyperparameters(get, rotary, qkv_bias=bias, bias=bias, scale=scale),
    }
    sparse, top_k, hidden = get("num_local_experts") > 0, get("num_experts_per_tok"), get("intermediate_size")
    if sparse:
        moe = {
            "experts": get("num_local_experts"),
            "top_k": top_k,
            "hidden": hidden,
            **experts.shared(get("shared_intermediate_size"), hidden),
            "balance": experts.balance(get, top_k),
        }
        channel = {"channel_mixer": "moe", "moe": moe}
    else:
        channel = {"channel_mixer": "swiglu", "channel_size": get("shared_intermediate_size")}
    return config_of(
        get,
        **arranged(names),
        mixer={name: mixer[name] for name in dict.fromkeys(names)},
        **channel,
        norm_eps=get("rms_norm_eps"),
        embedding_scale=float(get("embedding_multiplier")),
        branch_scale=float(get("residual_multiplier")),
        logit_scale=1 / get("logits_scaling"),
    )


def _options(config: ModelConfig) -> dict[str, Any]:
    names, moe = {ours: theirs for theirs, ours in reversed(state_space.KINDS.items())}, config.moe
    sparse = config.channel_mixer == "moe"
    found = {
        "layer_types": [names[name] for item in config.items for name in item.mixers],
        "rms_norm_eps": config.norm_eps,
        "embedding_multiplier": number(config.embedding_scale),
        "residual_multiplier": config.branch_scale,
        "logits_scaling": number(preimage(lambda scaling: 1 / scaling, config.logit_scale, 1 / config.logit_scale)),
        "num_local_experts": moe["experts"] if sparse else 0,
        "num_experts_per_tok": moe["top_k"],
        "router_aux_loss_coef": moe["balance"] / moe["top_k"],
        "shared_intermediate_size": experts.shared_size(moe) if sparse else config.channel_size or 1,
        "max_position_embeddings": config.length,
    }
    ssm = config.mixer.get("mamba2")
    found |= state_space.options(ssm, config.width) if ssm else state_space.no_options(config.width)
    if "attention" in config.mixer:
        attention = config.mixer["attention"]
        found |= transformer.options(config, attention) | {
            "attention_bias": attention["bias"],
            "attention_multiplier": attention["scale"],
            "position_embedding_type": "rope" if attention["positions"] == "rotary" else "nope",
        }
        del found["head_dim"]
    return found | {"intermediate_size": moe["hidden"] or 1}


def _tensors(config: ModelConfig) -> Tensors:
    yield from outside(config, "model.embed_tokens.weight", "model.norm.weight")
    for i, item in enumerate(config.items):
        block = Block(f"model.layers.{i}", i)
        yield from transformer.norms(block)
        if item.mixers == ("attention",):
            yield from transformer.attention(block, config.mixer["attention"])
        else:
            yield from mamba2.mixer_rows(block, "mamba")
        if sparse := config.channel_mixer == "moe":
            yield block("block_sparse_moe.router.layer.weight", "channel_mixer.w_router", LINEAR)
            yield block("block_sparse_moe.input_linear.weight", "channel_mixer.w_in", "e d m f -> e (m f) d")
            yield block("block_sparse_moe.output_linear.weight", "channel_mixer.w_out", "e f d -> e d f")
        if not sparse or config.moe["shared"]:
            shared = "channel_mixer.shared" if sparse else "channel_mixer"
            yield block("shared_mlp.input_linear.weight", f"{shared}.w_in", "d m f -> (m f) d")
            yield block("shared_mlp.output_linear.weight", f"{shared}.w_out", LINEAR)


ARCHITECTURE = Architecture(
    "GraniteMoeHybridForCausalLM",
    _config,
    _options,
    _tensors,
    frozenset({"mamba2", "attention"}),
    DEFAULTS,
    state_space.NEUTRAL | {"init_method"},
)

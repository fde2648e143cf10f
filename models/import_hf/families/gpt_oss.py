"""gpt-oss: attention with sinks, a window in every other layer, and experts with biases and a clamped gate.

The release stores the experts in four bits (MXFP4). They are read, and written back, in bfloat16, which holds the same numbers.
"""

from typing import Any

from models.config import ModelConfig
from models.import_hf import experts, mxfp4, transformer
from models.import_hf.architecture import LINEAR, VECTOR, Architecture, Block, Options, Tensors, outside

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
DEFAULTS = transformer.without(
    "mlp_bias",
    "partial_rotary_factor",
    vocab_size=201088,
    hidden_size=2880,
    intermediate_size=2880,
    num_hidden_layers=36,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=150000.0,
    attention_bias=True,
    sliding_window=128,
    layer_types=None,
    num_local_experts=128,
    num_experts_per_tok=4,
    swiglu_alpha=1.702,
    swiglu_limit=7.0,
    router_aux_loss_coef=0.001,
)


def _config(get: Options) -> ModelConfig:
    get.expect(hidden_act="silu", swiglu_alpha=1.702, swiglu_limit=7.0)
    kind = lambda i: "full_attention" if i % 2 else "sliding_attention"
    kinds = get.or_else("layer_types", [kind(i) for i in range(get("num_hidden_layers"))])
    top_k = get("num_experts_per_tok")
    moe = {
        "experts": get("num_local_experts"),
        "top_k": top_k,
        "hidden": get("intermediate_size"),
        "router": "softmax_topk",
        "activation": "clamped_swiglu",
        "bias": True,
        "balance": experts.balance(get, top_k),
    }
    bias = get("attention_bias")
    return transformer.decoder(
        get,
        attention={"qkv_bias": bias, "bias": bias, "sinks": True},
        kinds=list(kinds),
        rotary=dict.fromkeys(transformer.KINDS, get.rotary(default=YARN)),
        channel_mixer="moe",
        channel_size=None,
        moe=moe,
    )


def _options(config: ModelConfig) -> dict[str, Any]:
    mixer, found = next(iter(config.mixer.values())), transformer.options(config)
    if "rope_scaling" not in found:  # the class would have its own rule
        found["rope_parameters"] = {"rope_type": "default", "rope_theta": found.pop("rope_theta")}
    return found | {
        "attention_bias": mixer["bias"],
        "sliding_window": config.mixer.get("local_attention", {}).get("window", DEFAULTS["sliding_window"]),
        "layer_types": transformer.kinds(config),
        "intermediate_size": config.moe["hidden"] or 1,
        "num_local_experts": config.moe["experts"],
        "num_experts_per_tok": config.moe["top_k"],
        "router_aux_loss_coef": config.moe["balance"] / config.moe["top_k"],
    }


def _tensors(config: ModelConfig) -> Tensors:
    mixer = next(iter(config.mixer.values()))
    yield from outside(config, "model.embed_tokens.weight", "model.norm.weight")
    for i in range(config.depth):
        block = Block(f"model.layers.{i}", i)
        yield from transformer.norms(block)
        yield from transformer.attention(block, mixer)
        yield block("self_attn.sinks", "mixer.sinks", VECTOR)
        yield block("mlp.router.weight", "channel_mixer.w_router", LINEAR)
        yield block("mlp.router.bias", "channel_mixer.bias", VECTOR)
        # Gates and what they are of stand one beside the other.
        yield block("mlp.experts.gate_up_proj", "channel_mixer.w_in", "e d m f -> e d (f m)")
        yield block("mlp.experts.gate_up_proj_bias", "channel_mixer.b_in", "e m f -> e (f m)")
        yield block("mlp.experts.down_proj", "channel_mixer.w_out", "e f d -> e f d")
        yield block("mlp.experts.down_proj_bias", "channel_mixer.b_out", "e d -> e d")


ARCHITECTURE = Architecture(
    "GptOssForCausalLM",
    _config,
    _options,
    _tensors,
    frozenset({"attention", "local_attention"}),
    DEFAULTS,
    frozenset({"output_router_logits", "experts_per_token", "initial_context_length"}),
    quantised=(mxfp4.METHOD,),
)

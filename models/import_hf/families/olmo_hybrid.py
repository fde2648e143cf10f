"""OLMo Hybrid: Gated DeltaNet behind norms, and the attention of OLMo 3 before them in one layer of four."""

from typing import Any

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
    arranged,
    choose,
    config_of,
    gated_mlp,
    outside,
)

DEFAULTS = transformer.without(
    "mlp_bias",
    "head_dim",
    "partial_rotary_factor",
    vocab_size=100352,
    hidden_size=3840,
    num_attention_heads=30,
    layer_types=None,
    linear_num_key_heads=None,
    linear_num_value_heads=None,
    linear_key_head_dim=None,
    linear_value_head_dim=None,
    linear_conv_kernel_dim=4,
    linear_allow_neg_eigval=True,
)
INITIAL = frozenset({"linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor"})
KINDS = {"linear_attention": "gated_delta_net/pre", "full_attention": "attention/output"}


def _config(get: Options) -> ModelConfig:
    get.expect(hidden_act="silu")
    width, depth, heads, bias = (
        get("hidden_size"),
        get("num_hidden_layers"),
        get("num_attention_heads"),
        get("attention_bias"),
    )
    default = [
        "full_attention" if i % 4 == 3 or (depth < 4 and i == depth - 1) else "linear_attention" for i in range(depth)
    ]
    items = [choose("layer_types", kind, KINDS, get.where) for kind in get.or_else("layer_types", default)]
    keys, values = get.or_else("linear_num_key_heads", heads), get.or_else("linear_num_value_heads", heads)
    key = get.or_else("linear_key_head_dim", int(0.75 * width / keys))
    value = get.or_else("linear_value_head_dim", 2 * key)
    norms = {"qk_norm": True, "qk_norm_span": "all", "qk_norm_eps": get("rms_norm_eps")}
    mixer = {
        "gated_delta_net": {
            "heads": keys,
            "value_heads": values,
            "expand_key": keys * key / width,
            "expand_value": values * value / width,
            "conv_size": get("linear_conv_kernel_dim"),
            "negative_eigenvalues": get("linear_allow_neg_eigval"),
            "eps": 1e-5,  # whatever the options say
        },
        "attention": transformer.hyperparameters(get, get.rotary(optional=True), qkv_bias=bias, bias=bias, **norms),
    }
    names = dict.fromkeys(item.partition("/")[0] for item in items)
    return config_of(
        get,
        **arranged(items),
        mixer={name: mixer[name] for name in names},
        channel_mixer="swiglu",
        channel_size=get("intermediate_size"),
        norm_eps=get("rms_norm_eps"),
    )


def _options(config: ModelConfig) -> dict[str, Any]:
    names = {ours.partition("/")[0]: theirs for theirs, ours in KINDS.items()}
    # Its class has special tokens that a small vocabulary does not have.
    found = {"pad_token_id": None, "eos_token_id": None, "rms_norm_eps": config.norm_eps}
    if "attention" in config.mixer:
        attention = config.mixer["attention"]
        found |= transformer.options(config, attention) | {"attention_bias": attention["bias"]}
        del found["head_dim"]
        if attention["positions"] == "nope":
            found["rope_parameters"] = {"rope_type": "default", "rope_theta": None}
    if "gated_delta_net" in config.mixer:
        linear = config.mixer["gated_delta_net"]
        found |= {
            "linear_num_key_heads": linear["heads"],
            "linear_num_value_heads": linear["value_heads"],
            "linear_key_head_dim": whole(linear["expand_key"] * config.width) // linear["heads"],
            "linear_value_head_dim": whole(linear["expand_value"] * config.width) // linear["value_heads"],
            "linear_conv_kernel_dim": linear["conv_size"],
            "linear_allow_neg_eigval": linear["negative_eigenvalues"],
        }
    return found | {
        "intermediate_size": config.channel_size or 1,
        "layer_types": [names[name] for item in config.items for name in item.mixers],
        "max_position_embeddings": config.length,
    }


def _tensors(config: ModelConfig) -> Tensors:
    yield from outside(config, "model.embed_tokens.weight", "model.norm.weight")
    for i, item in enumerate(config.items):
        block = Block(f"model.layers.{i}", i)
        yield from gated_mlp(block, "mlp")
        if item.mixers == ("attention",):
            yield from transformer.norms(block, "output")
            yield from transformer.attention(block, config.mixer["attention"])
        else:
            yield block("attention_layer_norm.weight", "mixer_norm.weight", VECTOR)
            yield block("feedforward_layer_norm.weight", "channel_norm.weight", VECTOR)
            yield from _gated_delta_net(block)


def _gated_delta_net(block: Block) -> Tensors:
    for name in "qkv":
        yield block(f"linear_attn.{name}_proj.weight", f"mixer.{name}.weight", LINEAR)
        yield block(f"linear_attn.{name}_conv1d.weight", f"mixer.{name}.taps", "w i -> i 1 w")
    for name in "ab":
        yield block(f"linear_attn.{name}_proj.weight", f"mixer.w_{name}", LINEAR)
    yield block("linear_attn.g_proj.weight", "mixer.w_g", "d h v -> (h v) d")
    yield block("linear_attn.dt_bias", "mixer.dt_bias", VECTOR)
    yield block("linear_attn.A_log", "mixer.a_log", VECTOR)
    yield block("linear_attn.o_norm.weight", "mixer.norm.weight", VECTOR)
    yield block("linear_attn.o_proj.weight", "mixer.w_o", "h v d -> d (h v)")


ARCHITECTURE = Architecture(
    "OlmoHybridForCausalLM",
    _config,
    _options,
    _tensors,
    frozenset({"gated_delta_net", "attention"}),
    DEFAULTS,
    INITIAL,
    all_mixers=True,
    spellings={".post_attention_layernorm.": ".feedforward_layer_norm."},  # as the library writes them
)

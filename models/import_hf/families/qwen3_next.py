"""Qwen3-Next: Gated DeltaNet, gated attention in one layer of four, and mixtures of experts.

The layer that predicts the token after the next ("mtp") is not read, as in the library.
"""

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

DEFAULTS = transformer.without(
    "mlp_bias",
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=48,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=256,
    partial_rotary_factor=0.25,
    linear_conv_kernel_dim=4,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    decoder_sparse_step=1,
    moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
    num_experts_per_tok=10,
    num_experts=512,
    norm_topk_prob=True,
    router_aux_loss_coef=0.001,
    mlp_only_layers=None,
    layer_types=None,
    full_attention_interval=4,  # of older files, as the next one
    use_sliding_window=False,
)
KINDS = {"linear_attention": "gated_delta_net", "full_attention": "attention"}


def _config(get: Options) -> ModelConfig:
    get.expect(hidden_act="silu", attention_bias=False, use_sliding_window=False)
    width, depth, eps = get("hidden_size"), get("num_hidden_layers"), get("rms_norm_eps")
    full = lambda i: (i + 1) % get("full_attention_interval") == 0
    kinds = get.or_else("layer_types", ["full_attention" if full(i) else "linear_attention" for i in range(depth)])
    names = [choose("layer_types", kind, KINDS, get.where) for kind in kinds]
    dense = get.or_else("mlp_only_layers", [])
    sparse = lambda i: i not in dense and get("num_experts") > 0 and (i + 1) % get("decoder_sparse_step") == 0
    channels = ["moe" if sparse(i) else "swiglu" for i in range(depth)]
    keys, values = get("linear_num_key_heads"), get("linear_num_value_heads")
    norms = {"qk_norm": True, "qk_norm_eps": eps, "qk_norm_offset": 1.0}
    mixer = {
        "gated_delta_net": {
            "heads": keys,
            "value_heads": values,
            "expand_key": keys * get("linear_key_head_dim") / width,
            "expand_value": values * get("linear_value_head_dim") / width,
            "conv_size": get("linear_conv_kernel_dim"),
            "eps": eps,
        },
        "attention": transformer.hyperparameters(get, get.rotary(partial=True), output_gate="full", **norms),
    }
    top_k, hidden = get("num_experts_per_tok"), get("moe_intermediate_size")
    moe = {
        "experts": get("num_experts"),
        "top_k": top_k,
        "hidden": hidden,
        "renormalize": get("norm_topk_prob"),
        **experts.shared(get("shared_expert_intermediate_size"), hidden),
        "shared_gate": True,
        "balance": experts.balance(get, top_k),
    }
    return config_of(
        get,
        **arranged([f"{name}/{channel}" for name, channel in zip(names, channels, strict=True)]),
        mixer={name: mixer[name] for name in dict.fromkeys(names)},
        **({"moe": moe} if "moe" in channels else {}),
        channel_size=get("intermediate_size"),
        norm="rmsnorm1p",
        norm_eps=eps,
    )


def _options(config: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in KINDS.items()}
    moe, found = config.moe, {}
    if "attention" in config.mixer:
        attention = config.mixer["attention"]
        found |= transformer.options(config, attention) | {"partial_rotary_factor": attention["rotary_fraction"]}
    if "gated_delta_net" in config.mixer:
        linear = config.mixer["gated_delta_net"]
        keys, values = linear["heads"], linear["value_heads"]
        found |= {
            "linear_num_key_heads": keys,
            "linear_num_value_heads": values,
            "linear_key_head_dim": whole(linear["expand_key"] * config.width) // keys,
            "linear_value_head_dim": whole(linear["expand_value"] * config.width) // values,
            "linear_conv_kernel_dim": linear["conv_size"],
        }
    return found | {
        "rms_norm_eps": config.norm_eps,
        "layer_types": [names[name] for item in config.items for name in item.mixers],
        "mlp_only_layers": [i for i, item in enumerate(config.items) if config.channel_mixer_of(item) != "moe"],
        "num_experts": moe["experts"],
        "num_experts_per_tok": moe["top_k"],
        "moe_intermediate_size": moe["hidden"] or 1,
        "shared_expert_intermediate_size": experts.shared_size(moe),
        "norm_topk_prob": moe["renormalize"],
        "router_aux_loss_coef": moe["balance"] / moe["top_k"],
        "max_position_embeddings": config.length,
        "intermediate_size": config.channel_size or 1,
    }


def _tensors(config: ModelConfig) -> Tensors:
    yield from outside(config, "model.embed_tokens.weight", "model.norm.weight")
    for i, item in enumerate(config.items):
        block = Block(f"model.layers.{i}", i)
        yield from transformer.norms(block)
        if item.mixers == ("attention",):
            yield from attention(block, config.mixer["attention"])
        else:
            yield from _gated_delta_net(block, config)
        if config.channel_mixer_of(item) == "moe":
            yield from sparse(block, config)
        else:
            yield from gated_mlp(block, "mlp")


def attention(block: Block, mixer: dict[str, Any]) -> Tensors:
    """The tensors of a gated attention: the map of the queries holds the gate, head by head."""
    of_head = lambda h: [block.part(f"mixer.{name}", "d k -> k d", (slice(None), h)) for name in ("w_q", "w_g")]
    parts = tuple(part for h in range(mixer["heads"]) for part in of_head(h))
    for name, part in transformer.attention(block, mixer):
        yield name, parts if name.endswith("q_proj.weight") else part


def sparse(block: Block, config: ModelConfig) -> Tensors:
    """The tensors of a mixture of experts with a gated shared expert."""
    yield block("mlp.gate.weight", "channel_mixer.w_router", LINEAR)
    yield from experts.rows(block, "mlp.experts", config)
    yield from gated_mlp(block, "mlp.shared_expert", ours="channel_mixer.shared")
    yield block("mlp.shared_expert_gate.weight", "channel_mixer.w_shared_gate", "d -> 1 d")


def _gated_delta_net(block: Block, config: ModelConfig) -> Tensors:
    """The maps of a head of keys and of the heads of values that share it stand together."""
    mixer = config.mixer["gated_delta_net"]
    keys = mixer["heads"]
    group = mixer["value_heads"] // keys
    key = whole(mixer["expand_key"] * config.width) // keys
    value = whole(mixer["expand_value"] * config.width) // mixer["value_heads"]

    def joined(name, *parts):
        """Of each head, each part's share: (parameter, axes, size of the share)."""
        of = lambda h, size: (slice(None), slice(h * size, (h + 1) * size))
        pieces = (block.part(f"mixer.{path}", axes, of(h, n)) for h in range(keys) for path, axes, n in parts)
        return f"{block.prefix}.linear_attn.{name}", tuple(pieces)

    yield joined(
        "in_proj_qkvz.weight",
        ("q.weight", LINEAR, key),
        ("k.weight", LINEAR, key),
        ("v.weight", LINEAR, group * value),
        ("w_g", "d h v -> (h v) d", group),
    )
    yield joined("in_proj_ba.weight", ("w_b", LINEAR, group), ("w_a", LINEAR, group))
    taps = tuple(block.part(f"mixer.{name}.taps", "w i -> i 1 w") for name in "qkv")
    yield f"{block.prefix}.linear_attn.conv1d.weight", taps
    yield from rest_of_delta_net(block)


def rest_of_delta_net(block: Block) -> Tensors:
    """What no variant of the layer has in a form of its own."""
    yield block("linear_attn.dt_bias", "mixer.dt_bias", VECTOR)
    yield block("linear_attn.A_log", "mixer.a_log", VECTOR)
    yield block("linear_attn.norm.weight", "mixer.norm.weight", VECTOR)
    yield block("linear_attn.out_proj.weight", "mixer.w_o", "h v d -> d (h v)")


ARCHITECTURE = Architecture(
    "Qwen3NextForCausalLM",
    _config,
    _options,
    _tensors,
    frozenset({"gated_delta_net", "attention"}),
    DEFAULTS,
    frozenset({"output_router_logits"}),
    unused=("mtp.",),
)

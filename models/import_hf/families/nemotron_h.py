"""Nemotron-H and Nemotron 3: Mamba-2, attention without positions, and MLPs or experts, each a layer with a norm of its own.

A block of ours is a mixer and the MLP behind it, if there is one.
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
    attention_rows,
    choose,
    config_of,
    outside,
)
from models.import_hf.families import mamba2

DEFAULTS = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "layers_block_type": ("linear_attention", "moe", "full_attention", "mlp"),
    "hybrid_override_pattern": None,  # of older files
    "tie_word_embeddings": False,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "sliding_window": None,
    "intermediate_size": 21504,
    "mlp_hidden_act": "relu2",
    "mlp_bias": False,
    "ssm_state_size": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "n_groups": 8,
    "conv_kernel": 4,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_limit": (0.0, float("inf")),
    "use_conv_bias": True,
    "mamba_proj_bias": False,
    "use_bias": False,
    "layer_norm_epsilon": 1e-5,
    "hidden_dropout": 0.0,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "moe_latent_size": None,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
}
NO_LIMIT = 1e-30  # a least step size that is none, and has a logarithm
NEUTRAL = frozenset(
    """
    chunk_size expand mamba_ssm_cache_dtype moe_shared_expert_overlap mtp_hybrid_override_pattern mtp_layers_block_type
    num_hidden_layers num_logits_to_keep num_nextn_predict_layers output_router_logits rescale_prenorm_residual
    residual_in_fp32 time_step_floor use_mamba_kernels
    """.split()
)
KINDS = {"linear_attention": "mamba2", "full_attention": "attention", "mamba": "mamba2", "attention": "attention"}
CHANNELS = {"mlp": "relu2", "moe": "moe"}
LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


def _items(get: Options) -> list[str]:
    """The blocks.

    Raises:
      UserError: for an MLP that is not behind a mixer.
    """
    kinds = get("layers_block_type")
    if "layers_block_type" not in get.options and get.or_else("hybrid_override_pattern", None) is not None:
        text = get("hybrid_override_pattern")
        kinds = [choose("hybrid_override_pattern", letter, LETTERS, get.where) for letter in text]
    items = []
    for kind in kinds:
        if kind in CHANNELS and items and items[-1].endswith("/none"):
            items[-1] = items[-1].removesuffix("none") + CHANNELS[kind]
        elif kind in CHANNELS:
            get.refuse("layers_block_type", "an MLP or experts behind each mixer, once at most")
        else:
            items.append(choose("layers_block_type", kind, KINDS, get.where) + "/none")
    return items


def _config(get: Options) -> ModelConfig:
    get.expect(
        mlp_hidden_act="relu2", mamba_hidden_act="silu", attention_bias=False, sliding_window=None, use_bias=False
    )
    get.expect(use_conv_bias=True, mamba_proj_bias=False, hidden_dropout=0.0)
    if mamba2.limit(get):
        get.refuse("time_step_limit", [0.0, float("inf")])
    items, width, eps = _items(get), get("hidden_size"), get("layer_norm_epsilon")
    mixer = {
        "mamba2": {
            "state": get("ssm_state_size"),
            "expand": get("mamba_num_heads") * get("mamba_head_dim") / width,
            "heads": get("mamba_num_heads"),
            "groups": get("n_groups"),
            "conv_size": get("conv_kernel"),
            "dt_min": get("time_step_min"),
            "dt_max": get("time_step_max"),
            # Its class draws no smaller step at first, and lets none become smaller.
            "dt_limit": (get("time_step_min"),) if get("time_step_min") > NO_LIMIT else (),
            "eps": eps,
        },
        "attention": transformer.hyperparameters(get, None),
    }
    sparse = any(item.endswith("/moe") for item in items)
    if sparse:
        get.expect(moe_latent_size=None, n_shared_experts=1, mlp_bias=False)
    hidden = get("moe_intermediate_size")
    moe = {
        "experts": get("n_routed_experts"),
        "top_k": get("num_experts_per_tok"),
        "hidden": hidden,
        "activation": "relu2",
        "router": "sigmoid",
        "groups": get("n_group"),
        "top_groups": get("topk_group"),
        "scale": float(get("routed_scaling_factor")),
        "renormalize": get("norm_topk_prob"),
        **experts.shared(get("moe_shared_expert_intermediate_size"), hidden),
        "balance": 0.0,
    }
    names = [item.partition("/")[0] for item in items]
    return config_of(
        get,
        depth=len(items),
        **arranged(items),
        mixer={name: mixer[name] for name in dict.fromkeys(names)},
        **({"moe": moe} if sparse else {}),
        channel_size=get("intermediate_size"),
        channel_bias=get("mlp_bias"),
        norm_eps=eps,
    )


def _layers(config: ModelConfig) -> list[tuple[str, int]]:
    """The library's layers: the kind of each, and the number of our block that it is of."""
    names, channels = ({ours: theirs for theirs, ours in reversed(of.items())} for of in (KINDS, CHANNELS))
    found = []
    for i, item in enumerate(config.items):
        found.append((names[item.mixers[0]], i))
        if (channel := config.channel_mixer_of(item)) != "none":
            found.append((channels.get(channel, channel), i))
    return found


def _options(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    kinds = [kind for kind, _ in _layers(config)]
    found = {
        "layers_block_type": kinds,
        "num_hidden_layers": len(kinds),
        "intermediate_size": config.channel_size or 1,
        "mlp_bias": config.channel_bias,
        "layer_norm_epsilon": config.norm_eps,
        "n_routed_experts": moe["experts"],
        "num_experts_per_tok": moe["top_k"],
        "moe_intermediate_size": moe["hidden"] or 1,
        "moe_shared_expert_intermediate_size": experts.shared_size(moe),
        "n_group": moe["groups"],
        "topk_group": moe["top_groups"],
        "routed_scaling_factor": moe["scale"],
        "norm_topk_prob": moe["renormalize"],
        "max_position_embeddings": config.length,
    }
    if "mamba2" in config.mixer:
        mixer = mamba2.options(config)
        found |= {
            "ssm_state_size": mixer["state_size"],
            "mamba_num_heads": mixer["num_heads"],
            "mamba_head_dim": mixer["head_dim"],
            **{key: mixer[key] for key in ("n_groups", "conv_kernel", "time_step_max")},
            "time_step_min": (*config.mixer["mamba2"]["dt_limit"], NO_LIMIT)[0],
        }
    if "attention" in config.mixer:
        attention = config.mixer["attention"]
        found |= {
            "num_attention_heads": attention["heads"],
            "num_key_value_heads": attention["kv_heads"],
            "head_dim": attention["head_channels"],
        }
    return found


def _tensors(config: ModelConfig) -> Tensors:
    yield from outside(config, "backbone.embeddings.weight", "backbone.norm_f.weight", ties=False)
    for n, (kind, i) in enumerate(_layers(config)):
        block = Block(f"backbone.layers.{n}", i)
        norm = "channel_norm" if kind in CHANNELS else "mixer_norm"
        yield block("norm.weight", f"{norm}.weight", VECTOR)
        if kind == "linear_attention":
            yield from mamba2.mixer_rows(block, "mixer")
        elif kind == "full_attention":
            yield from attention_rows(block, "mixer")
        elif kind == "mlp":
            yield from _mlp(block, "mixer", "channel_mixer", config.channel_bias)
        else:
            yield block("mixer.gate.weight", "channel_mixer.w_router", LINEAR)
            yield block("mixer.gate.e_score_correction_bias", "channel_mixer.bias", VECTOR)
            for e in range(config.moe["experts"]):
                yield block(
                    f"mixer.experts.{e}.up_proj.weight", "channel_mixer.w_in", "d f -> f d", (e, slice(None), 0)
                )
                yield block(f"mixer.experts.{e}.down_proj.weight", "channel_mixer.w_out", LINEAR, (e,))
            yield from _mlp(block, "mixer.shared_experts", "channel_mixer.shared", False)


def _mlp(block: Block, prefix: str, ours: str, bias: bool) -> Tensors:
    for theirs, way in {"up_proj": "in", "down_proj": "out"}.items():
        yield block(f"{prefix}.{theirs}.weight", f"{ours}.w_{way}", LINEAR)
        if bias:
            yield block(f"{prefix}.{theirs}.bias", f"{ours}.b_{way}", VECTOR)


ARCHITECTURE = Architecture(
    "NemotronHForCausalLM",
    _config,
    _options,
    _tensors,
    frozenset({"mamba2", "attention"}),
    DEFAULTS,
    NEUTRAL,
    unused=("mtp.",),
    ties=False,
)

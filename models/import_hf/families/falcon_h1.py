"""Falcon-H1: attention and Mamba-2 side by side in every block, with factors of most maps."""

from typing import Any

from models.checks import whole
from models.config import ModelConfig
from models.import_hf import state_space, transformer
from models.import_hf.architecture import (
    VECTOR,
    Architecture,
    Block,
    Options,
    Tensors,
    config_of,
    gated_mlp,
    outside,
    preimage,
)
from models.import_hf.families import mamba2

DEFAULTS = state_space.DEFAULTS | {
    "vocab_size": 128000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,  # of published files
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "projectors_bias": False,
    "tie_word_embeddings": False,
    "mamba_d_ssm": 1024,
    "mamba_norm_before_gate": True,
    "mamba_rms_norm": False,
    "lm_head_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "mlp_multipliers": None,
    "key_multiplier": 1.0,
    "attention_out_multiplier": 1.0,
    "attention_in_multiplier": 1.0,
    "ssm_multipliers": None,
    "ssm_in_multiplier": 1.0,
    "ssm_out_multiplier": 1.0,
}
NAMES = ("attention", "mamba2")


def _factors(*factors: float) -> tuple[float, ...]:
    """() where all are 1."""
    return () if set(factors) == {1} else tuple(map(float, factors))


def _config(get: Options) -> ModelConfig:
    get.expect(hidden_act="silu", projectors_bias=False)
    width, bias = get("hidden_size"), get("attention_bias")
    if not get("mamba_rms_norm"):
        norm = "none"
    else:
        norm = "ungated" if get("mamba_norm_before_gate") else "gated"
    size = get.or_else("head_dim", max(1, width // get("num_attention_heads")))
    inner = get("mamba_d_ssm") if get.options.get("mamba_d_ssm", 0) is not None else None
    mixer = {
        "attention": transformer.hyperparameters(
            get, get.rotary(), qkv_bias=bias, bias=bias, scale=size**-0.5 * get("key_multiplier")
        ),
        "mamba2": state_space.hyperparameters(
            get, inner, output_norm=norm, scales=_factors(*get.or_else("ssm_multipliers", (1,) * 5))
        ),
    }
    parallel = {
        "input_scale": _factors(get("attention_in_multiplier"), get("ssm_in_multiplier")),
        "output_scale": _factors(get("attention_out_multiplier"), get("ssm_out_multiplier")),
    }
    return config_of(
        get,
        pattern=("|".join(NAMES),),
        mixer=mixer,
        parallel=parallel,
        channel_mixer="swiglu",
        channel_size=get("intermediate_size"),
        channel_bias=get("mlp_bias"),
        channel_scales=_factors(*get.or_else("mlp_multipliers", (1, 1))),
        norm_eps=get("rms_norm_eps"),
        embedding_scale=float(get("embedding_multiplier")),
        logit_scale=float(get("lm_head_multiplier")),
    )


def _options(config: ModelConfig) -> dict[str, Any]:
    attention, ssm = (config.mixer[name] for name in NAMES)
    found = transformer.options(config, attention) | state_space.options(ssm, config.width)
    del found["mamba_expand"]
    root = attention["head_channels"] ** -0.5
    inputs, outputs = (config.parallel[f"{side}_scale"] or (1.0, 1.0) for side in ("input", "output"))
    return found | {
        "attention_bias": attention["bias"],
        "mlp_bias": config.channel_bias,
        "mamba_d_ssm": whole(ssm["expand"] * config.width),
        "mamba_rms_norm": ssm["output_norm"] != "none",
        "mamba_norm_before_gate": ssm["output_norm"] != "gated",
        "ssm_multipliers": list(ssm["scales"]) or [1.0] * 5,
        "mlp_multipliers": list(config.channel_scales) or [1.0] * 2,
        "key_multiplier": preimage(lambda factor: root * factor, attention["scale"], attention["scale"] / root),
        **dict(zip(("attention_in_multiplier", "ssm_in_multiplier"), inputs, strict=True)),
        **dict(zip(("attention_out_multiplier", "ssm_out_multiplier"), outputs, strict=True)),
        "embedding_multiplier": config.embedding_scale,
        "lm_head_multiplier": config.logit_scale,
    }


def _tensors(config: ModelConfig) -> Tensors:
    yield from outside(config, "model.embed_tokens.weight", "model.final_layernorm.weight")
    for i in range(config.depth):
        attention, ssm = (Block(f"model.layers.{i}", i, f"mixer.parts.{name}") for name in NAMES)
        yield attention("input_layernorm.weight", "mixer_norm.weight", VECTOR)
        yield attention("pre_ff_layernorm.weight", "channel_norm.weight", VECTOR)
        yield from gated_mlp(attention, "feed_forward", bias=config.channel_bias)
        yield from transformer.attention(attention, config.mixer["attention"])
        yield from mamba2.mixer_rows(ssm, "mamba", norm=config.mixer["mamba2"]["output_norm"] != "none")


ARCHITECTURE = Architecture(
    "FalconH1ForCausalLM",
    _config,
    _options,
    _tensors,
    frozenset(NAMES),
    DEFAULTS,
    state_space.NEUTRAL | {"attn_layer_indices", "mamba_use_mlp", "mlp_expansion_factor"},
    all_mixers=True,
)

"""Mamba 1."""

import math
from typing import Any

from models.checks import whole
from models.config import ModelConfig
from models.import_hf.architecture import (
    LINEAR,
    VECTOR,
    Architecture,
    Block,
    Options,
    Tensors,
    config_of,
    number,
    outside,
)

DEFAULTS = {
    "vocab_size": 50280,
    "hidden_size": 768,
    "num_hidden_layers": 32,
    "state_size": 16,
    "layer_norm_epsilon": 1e-5,
    "expand": 2,
    "intermediate_size": None,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "time_step_rank": "auto",
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "tie_word_embeddings": True,
    "rms_norm": True,  # of older files, as the next one
    "ssm_cfg": {},
}
NEUTRAL = frozenset(
    """
    d_inner d_model fused_add_norm n_layer norm_before_gate pad_vocab_size_multiple rescale_prenorm_residual residual_in_fp32
    time_step_floor time_step_init_scheme time_step_scale use_associative_scan use_mambapy
    """.split()
)


def _config(get: Options) -> ModelConfig:
    get.expect(hidden_act="silu", use_bias=False, use_conv_bias=True, rms_norm=True, ssm_cfg={})
    width, rank = get("hidden_size"), get("time_step_rank")
    inner = get.or_else("intermediate_size", int(get("expand") * width))
    mixer = {
        "state": get("state_size"),
        "expand": inner / width,
        "conv_size": get("conv_kernel"),
        "dt_rank": math.ceil(width / 16) if rank == "auto" else rank,
        "dt_min": get("time_step_min"),
        "dt_max": get("time_step_max"),
    }
    return config_of(get, pattern=("mamba",), mixer={"mamba": mixer}, norm_eps=get("layer_norm_epsilon"))


def _options(config: ModelConfig) -> dict[str, Any]:
    mixer = config.mixer["mamba"]
    inner = whole(mixer["expand"] * config.width)
    return {
        "state_size": mixer["state"],
        "expand": number(mixer["expand"]),
        "intermediate_size": inner,
        "conv_kernel": mixer["conv_size"],
        "time_step_rank": mixer["dt_rank"],
        "time_step_min": mixer["dt_min"],
        "time_step_max": mixer["dt_max"],
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": True,
    }


def _tensors(config: ModelConfig) -> Tensors:
    yield from outside(config, "backbone.embeddings.weight", "backbone.norm_f.weight")
    for i in range(config.depth):
        block = Block(f"backbone.layers.{i}", i)
        yield block("norm.weight", "mixer_norm.weight", VECTOR)
        yield from mixer_rows(block, "mixer")


def mixer_rows(block: Block, prefix: str) -> Tensors:
    """The tensors of the mixer of a block."""
    yield block(f"{prefix}.in_proj.weight", "mixer.w_in", "d g i -> (g i) d")
    yield block(f"{prefix}.conv1d.weight", "mixer.conv", "w i -> i 1 w")
    yield block(f"{prefix}.conv1d.bias", "mixer.conv_bias", VECTOR)
    yield block(f"{prefix}.x_proj.weight", "mixer.w_x", LINEAR)
    yield block(f"{prefix}.dt_proj.weight", "mixer.w_dt", LINEAR)
    yield block(f"{prefix}.dt_proj.bias", "mixer.dt_bias", VECTOR)
    yield block(f"{prefix}.A_log", "mixer.a_log", "i n -> i n")
    yield block(f"{prefix}.D", "mixer.d", VECTOR)
    yield block(f"{prefix}.out_proj.weight", "mixer.w_out", LINEAR)


ARCHITECTURE = Architecture("MambaForCausalLM", _config, _options, _tensors, frozenset({"mamba"}), DEFAULTS, NEUTRAL)

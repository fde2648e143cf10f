"""Mamba-2."""

import math
from collections.abc import Mapping
from typing import Any

from common.errors import UserError
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
from models.import_hf.families import mamba

DEFAULTS = mamba.DEFAULTS | {
    "vocab_size": 32768,
    "hidden_size": 4096,
    "num_hidden_layers": 64,
    "state_size": 128,
    "num_heads": 128,
    "head_dim": 64,
    "n_groups": 8,
    "time_step_limit": (0.0, math.inf),
    "tie_word_embeddings": False,
}


def _config(get: Options) -> ModelConfig:
    get.expect(hidden_act="silu", use_bias=False, use_conv_bias=True, rms_norm=True, ssm_cfg={})
    width, heads = get("hidden_size"), get("num_heads")
    inner = int(get("expand") * width)
    if inner != heads * get("head_dim"):
        raise UserError(
            f"{get.where}: num_heads={heads} times head_dim={get('head_dim')} must be expand times hidden_size, {inner}"
        )
    mixer = {
        "state": get("state_size"),
        "expand": inner / width,
        "heads": heads,
        "groups": get("n_groups"),
        "conv_size": get("conv_kernel"),
        "dt_min": get("time_step_min"),
        "dt_max": get("time_step_max"),
        "dt_limit": limit(get),
        "eps": get("layer_norm_epsilon"),
    }
    return config_of(get, pattern=("mamba2",), mixer={"mamba2": mixer}, norm_eps=mixer["eps"])


def limit(get: Options) -> tuple[float, ...]:
    """The limit of step sizes, as our mixer has it.

    Raises:
      UserError: for what is no range.
    """
    given = [math.inf if bound == {"__float__": "Infinity"} else bound for bound in get("time_step_limit")]
    if len(given) != 2 or not all(isinstance(bound, int | float) for bound in given) or not 0 <= given[0] <= given[1]:
        raise UserError(f"{get.where}: time_step_limit={given} must be the least step size and the largest")
    low, high = map(float, given)
    return (low, high) if high < math.inf else (low,) if low else ()


def limit_option(mixer: Mapping[str, Any]) -> dict[str, Any]:
    """The library's option of the limit, where there is one."""
    if not mixer["dt_limit"]:
        return {}
    low, high = (*mixer["dt_limit"], math.inf)[:2]
    return {"time_step_limit": [low, high]}


def options(config: ModelConfig) -> dict[str, Any]:
    """The library's options."""
    mixer = config.mixer["mamba2"]
    inner = whole(mixer["expand"] * config.width)
    return {
        "state_size": mixer["state"],
        "expand": number(mixer["expand"]),
        "num_heads": mixer["heads"],
        "head_dim": inner // mixer["heads"],
        "n_groups": mixer["groups"],
        "conv_kernel": mixer["conv_size"],
        "time_step_min": mixer["dt_min"],
        "time_step_max": mixer["dt_max"],
        **limit_option(mixer),
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": True,
    }


def _tensors(config: ModelConfig) -> Tensors:
    yield from outside(config, "backbone.embeddings.weight", "backbone.norm_f.weight")
    for i in range(config.depth):
        block = Block(f"backbone.layers.{i}", i)
        yield block("norm.weight", "mixer_norm.weight", VECTOR)
        yield from mixer_rows(block, "mixer")


def mixer_rows(block: Block, prefix: str, norm: bool = True) -> Tensors:
    """The tensors of the mixer of a block."""
    joined = lambda name, axes, *paths: (
        f"{block.prefix}.{prefix}.{name}",
        tuple(block.part(f"mixer.{path}", axes) for path in paths),
    )
    yield joined("in_proj.weight", LINEAR, "w_z", "w_u", "w_bc", "w_dt")
    yield joined("conv1d.weight", "w i -> i 1 w", "conv_u", "conv_bc")
    yield joined("conv1d.bias", VECTOR, "conv_u_bias", "conv_bc_bias")
    yield block(f"{prefix}.dt_bias", "mixer.dt_bias", VECTOR)
    yield block(f"{prefix}.A_log", "mixer.a_log", VECTOR)
    yield block(f"{prefix}.D", "mixer.d", VECTOR)
    if norm:
        yield block(f"{prefix}.norm.weight", "mixer.norm", VECTOR)
    yield block(f"{prefix}.out_proj.weight", "mixer.w_out", LINEAR)


ARCHITECTURE = Architecture(
    "Mamba2ForCausalLM",
    _config,
    options,
    _tensors,
    frozenset({"mamba2"}),
    {key: value for key, value in DEFAULTS.items() if key not in ("intermediate_size", "time_step_rank")},
    mamba.NEUTRAL | {"chunk_size", "intermediate_size", "time_step_rank"},
)

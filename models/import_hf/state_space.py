"""What the families with Mamba-2 beside attention have in common: Bamba, Granite 4 and Falcon-H1."""

import math
from collections.abc import Mapping
from typing import Any

from common.errors import UserError
from models.checks import whole
from models.import_hf.architecture import Options, number
from models.import_hf.families import mamba2

DEFAULTS = {
    "mamba_n_heads": 128,
    "mamba_d_head": "auto",
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "time_step_limit": (0.0, math.inf),
}
NEUTRAL = frozenset({"mamba_chunk_size", "num_logits_to_keep", "output_router_logits"})
KINDS = {  # the library's names, and those of older files
    "linear_attention": "mamba2",
    "full_attention": "attention",
    "mamba": "mamba2",
    "attention": "attention",
}


def hyperparameters(get: Options, inner: int | None = None, **more) -> dict[str, Any]:
    """The hyperparameters of Mamba-2.

    Args:
      get: the options.
      inner: number of channels, where `mamba_expand` does not say it.
      **more: what the architecture fixes or has read.

    Raises:
      UserError: for an option that our mixer does not have.
    """
    get.expect(mamba_conv_bias=True, mamba_proj_bias=False)
    width, heads, size = get("hidden_size"), get("mamba_n_heads"), get("mamba_d_head")
    inner = int(get("mamba_expand") * width) if inner is None else inner
    if size != "auto" and heads * size != inner:
        raise UserError(f"{get.where}: mamba_n_heads={heads} times mamba_d_head={size} must be the {inner} channels")
    return {
        "state": get("mamba_d_state"),
        "expand": inner / width,
        "heads": heads,
        "groups": get("mamba_n_groups"),
        "conv_size": get("mamba_d_conv"),
        "dt_limit": mamba2.limit(get),
        "eps": get("rms_norm_eps"),
        **more,
    }


def options(mixer: Mapping[str, Any], width: int) -> dict[str, Any]:
    """The library's options of Mamba-2."""
    inner = whole(mixer["expand"] * width)
    return {
        "mamba_n_heads": mixer["heads"],
        "mamba_d_head": inner // mixer["heads"],
        "mamba_n_groups": mixer["groups"],
        "mamba_d_state": mixer["state"],
        "mamba_d_conv": mixer["conv_size"],
        "mamba_expand": number(inner / width),
        **mamba2.limit_option(mixer),
    }


def no_options(width: int) -> dict[str, Any]:
    """The options of Mamba-2 of a model that has none, which the library's classes check all the same."""
    return {"mamba_n_heads": 1, "mamba_d_head": 2 * width, "mamba_expand": 2}

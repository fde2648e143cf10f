"""Gemma 3, the models of text: most layers see a window, and queries and keys are normalised.

The larger releases are models of images as well ("gemma3"), which are not read.
"""

from typing import Any

from models.config import ModelConfig
from models.import_hf import transformer
from models.import_hf.architecture import Architecture, Options, rope_options_by_kind
from models.import_hf.families import gemma2

DEFAULTS = {key: value for key, value in gemma2.DEFAULTS.items() if key != "partial_rotary_factor"} | {
    "vocab_size": 262208,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0,
    "sliding_window_pattern": 6,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
}


def _config(get: Options) -> ModelConfig:
    get.expect(attn_logit_softcapping=None)  # which the library's class does not apply
    norms = {"qk_norm": True, "qk_norm_eps": get("rms_norm_eps"), "qk_norm_offset": 1.0}
    rotary = {
        "full_attention": get.rotary("full_attention"),
        "sliding_attention": get.rotary("sliding_attention", base="rope_local_base_freq", scaled=False),
    }
    return gemma2.gemma(get, get("sliding_window_pattern"), norms, rotary=rotary)


def _options(config: ModelConfig) -> dict[str, Any]:
    mixers = {theirs: config.mixer[ours] for theirs, ours in transformer.KINDS.items() if ours in config.mixer}
    found = {key: v for key, v in gemma2.options(config).items() if key not in ("rope_theta", "rope_scaling")}
    return found | rope_options_by_kind(mixers)


ARCHITECTURE = Architecture(
    "Gemma3ForCausalLM",
    _config,
    _options,
    transformer.tensors,
    frozenset({"attention", "local_attention"}),
    DEFAULTS,
    gemma2.NEUTRAL | {"_sliding_window_pattern"},
)

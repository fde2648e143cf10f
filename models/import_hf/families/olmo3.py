"""OLMo 3: as OLMo 2, with a window in three layers of four."""

from typing import Any

from models.config import ModelConfig
from models.import_hf import transformer
from models.import_hf.architecture import Architecture, Options, rope_options_by_kind
from models.import_hf.families import olmo2

DEFAULTS = {key: value for key, value in olmo2.DEFAULTS.items() if key != "partial_rotary_factor"} | {
    "rope_theta": 500000.0,
    "sliding_window": 4096,
    "layer_types": None,
}


def _config(get: Options) -> ModelConfig:
    kind = lambda i: "full_attention" if i % 4 == 3 else "sliding_attention"
    kinds = get.or_else("layer_types", [kind(i) for i in range(get("num_hidden_layers"))])
    # Rules for longer sequences are for the layers that see them.
    rotary = {
        "full_attention": get.rotary("full_attention"),
        "sliding_attention": get.rotary("sliding_attention", scaled=False),
    }
    return olmo2.olmo(get, kinds=list(kinds), rotary=rotary)


def _options(config: ModelConfig) -> dict[str, Any]:
    mixers = {theirs: config.mixer[ours] for theirs, ours in transformer.KINDS.items() if ours in config.mixer}
    found = {key: value for key, value in olmo2.options(config).items() if key not in ("rope_theta", "rope_scaling")}
    return found | {
        "sliding_window": config.mixer.get("local_attention", {}).get("window", DEFAULTS["sliding_window"]),
        "layer_types": transformer.kinds(config),
        **rope_options_by_kind(mixers),
    }


ARCHITECTURE = Architecture(
    "Olmo3ForCausalLM",
    _config,
    _options,
    transformer.tensors,
    frozenset({"attention", "local_attention"}),
    DEFAULTS,
)

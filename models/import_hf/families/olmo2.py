"""OLMo 2: norms behind each branch, and of the queries and keys of all heads together."""

from typing import Any

from models.config import ModelConfig
from models.import_hf import transformer
from models.import_hf.architecture import Architecture, Options

DEFAULTS = transformer.without("mlp_bias", "head_dim", vocab_size=50304, rms_norm_eps=1e-5)


def olmo(get: Options, **more) -> ModelConfig:
    """What OLMo 2 and 3 have in common; further arguments are those of `transformer.decoder`."""
    get.expect(hidden_act="silu")
    biases = {"qkv_bias": get("attention_bias"), "bias": get("attention_bias")}
    norms = {"qk_norm": True, "qk_norm_span": "all", "qk_norm_eps": get("rms_norm_eps")}
    return transformer.decoder(get, attention=biases | norms, norm_position="output", **more)


def options(config: ModelConfig) -> dict[str, Any]:
    """The library's options of OLMo 2 and 3."""
    found = {key: value for key, value in transformer.options(config).items() if key != "head_dim"}
    # Its class has special tokens that a small vocabulary does not have.
    found |= {"pad_token_id": None, "eos_token_id": None}
    return found | {"attention_bias": next(iter(config.mixer.values()))["qkv_bias"]}


ARCHITECTURE = Architecture("Olmo2ForCausalLM", olmo, options, transformer.tensors, frozenset({"attention"}), DEFAULTS)

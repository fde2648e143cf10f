"""What the families of Llama have in common: blocks of one attention and one gated channel mixer behind pre-norms."""

from collections.abc import Mapping
from typing import Any

from common.errors import UserError
from models.config import ModelConfig
from models.import_hf.architecture import (
    VECTOR,
    Block,
    Options,
    Tensors,
    arranged,
    attention_rows,
    choose,
    config_of,
    gated_mlp,
    outside,
    rope_options,
)

# The options of Llama, and their defaults.
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
KINDS = {"full_attention": "attention", "sliding_attention": "local_attention"}


def without(*keys: str, **changed) -> dict[str, Any]:
    """The defaults without some keys, and with others changed or added."""
    return {key: value for key, value in DEFAULTS.items() if key not in keys} | changed


def sliding_if_given(get: Options) -> list[str]:
    """The kinds of all layers: they see a window where there is one."""
    kind = "full_attention" if get.or_else("sliding_window", None) is None else "sliding_attention"
    return [kind] * get("num_hidden_layers")


def expect_full_attention(get: Options) -> None:
    """Raises a UserError where some layer does not see everything."""
    everything = ["full_attention"] * get("num_hidden_layers")
    if list(get.or_else("layer_types", everything)) != everything:
        get.refuse("layer_types", "full_attention")


def decoder(
    get: Options,
    *,
    attention: Mapping[str, Any] | None = None,
    kinds: list[str] | None = None,
    rotary: Mapping[str, tuple[float, float, str]] | None = None,
    **fields,
) -> ModelConfig:
    """Our configuration.

    Args:
      get: the options.
      attention: hyperparameters of the attention that the architecture fixes or has read.
      kinds: of each layer, the library's name of its attention; by default all are full.
      rotary: what `Options.rotary` says of each kind of attention, where they differ or parts of heads are rotated.
      **fields: of the configuration, where they are not Llama's.
    """
    rotary = dict.fromkeys(KINDS, get.rotary()) if rotary is None else rotary
    depth = get("num_hidden_layers")
    names = [choose("layer_types", kind, KINDS, get.where) for kind in kinds or ["full_attention"] * depth]
    window = {"window": get.or_else("sliding_window", None)} if "local_attention" in names else {}
    of = {ours: hyperparameters(get, rotary[theirs], **(attention or {})) for theirs, ours in KINDS.items()}
    of["local_attention"] |= window
    common = {
        **arranged(names),
        "mixer": {name: of[name] for name in dict.fromkeys(names)},
        "channel_mixer": "swiglu",
        "channel_size": get("intermediate_size"),
        "norm_eps": get("rms_norm_eps"),
    }
    return config_of(get, **common | fields)


def hyperparameters(get: Options, rotary: tuple[float, float, str] | None, **more) -> dict[str, Any]:
    """The hyperparameters of an attention.

    Args:
      get: the options.
      rotary: what `Options.rotary` says; None where nothing is rotated.
      **more: what the architecture fixes or has read.
    """
    get.expect(attention_dropout=0.0)
    heads, width = get("num_attention_heads"), get("hidden_size")
    names = ("rotary_base", "rotary_fraction", "rotary_scaling")
    size = get.or_else("head_dim", width // heads) if "head_dim" in get.defaults else width // heads
    if rotary is not None:
        expect_pairs(get, size, rotary[1])
    return {
        "heads": heads,
        "kv_heads": get.or_else("num_key_value_heads", heads),
        "head_channels": size,
        **({"positions": "nope"} if rotary is None else dict(zip(names, rotary, strict=True))),
        "qk_norm": False,
        "qkv_bias": False,
        "bias": False,
        **more,
    }


def expect_pairs(get: Options, size: int, share: float) -> None:
    """Raises a UserError where the rotated share of a head is an odd number of channels, to which the library adds one."""
    if not 0 < share <= 1 or int(size * share) % 2 or int(size * share) < 2:
        raise UserError(
            f"{get.where}: partial_rotary_factor={share} must leave a head's {size} channels pairs to rotate"
        )


def expect_whole_heads(get: Options) -> None:
    """Raises a UserError where the width is no multiple of the heads, which some classes refuse whatever a head's size is."""
    width, heads = get("hidden_size"), get("num_attention_heads")
    if width % heads:
        raise UserError(f"{get.where}: hidden_size={width} must be a multiple of num_attention_heads={heads}")


def options(config: ModelConfig, mixer: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The library's options, those of Llama; `mixer` is the attention, by default the first mixer."""
    mixer = next(iter(config.mixer.values())) if mixer is None else mixer
    return {
        "intermediate_size": config.channel_size or 1,
        "num_attention_heads": mixer["heads"],
        "num_key_value_heads": mixer["kv_heads"],
        "head_dim": mixer["head_channels"],
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.length,
        **rope_options(mixer),
    }


def kinds(config: ModelConfig) -> list[str]:
    """The library's names of the attentions of all layers."""
    names = {ours: theirs for theirs, ours in KINDS.items()}
    return [names[name] for item in config.items for name in item.mixers]


def tensors(config: ModelConfig) -> Tensors:
    """The tensors of Llama and of those that add biases or norms of queries and keys."""
    mixer = next(iter(config.mixer.values()))
    yield from outside(config, "model.embed_tokens.weight", "model.norm.weight")
    for i in range(config.depth):
        block = Block(f"model.layers.{i}", i)
        yield from norms(block, config.norm_position)
        yield from attention(block, mixer)
        yield from gated_mlp(block, "mlp", bias=config.channel_bias)


def attention(block: Block, mixer: Mapping[str, Any]) -> Tensors:
    """The tensors of an attention: its maps, and the norms and biases that it has."""
    yield from attention_rows(block, "self_attn")
    if mixer["qk_norm"]:
        yield from qk_norms(block, "self_attn")
    if mixer["qkv_bias"]:
        for name in "qkv":
            yield block(f"self_attn.{name}_proj.bias", f"mixer.b_{name}", "h k -> (h k)")
    if mixer["bias"]:
        yield block("self_attn.o_proj.bias", "mixer.b_o", VECTOR)


def qk_norms(block: Block, prefix: str, name: str = "norm") -> Tensors:
    """The norms of queries and keys."""
    for letter in "qk":
        yield block(f"{prefix}.{letter}_{name}.weight", f"mixer.{letter}_norm.weight", VECTOR)


# The library's names of a block's norms, by where they are.
NORMS = {
    "pre": {"input_layernorm": "mixer_norm", "post_attention_layernorm": "channel_norm"},
    "output": {"post_attention_layernorm": "mixer_norm", "post_feedforward_layernorm": "channel_norm"},
    "sandwich": {
        "input_layernorm": "mixer_norm",
        "post_attention_layernorm": "mixer_output_norm",
        "pre_feedforward_layernorm": "channel_norm",
        "post_feedforward_layernorm": "channel_output_norm",
    },
}


def norms(block: Block, position: str = "pre") -> Tensors:
    """The norms of a block."""
    for theirs, ours in NORMS[position].items():
        yield block(f"{theirs}.weight", f"{ours}.weight", VECTOR)

"""RWKV-4."""

from typing import Any

from models.checks import whole
from models.config import ModelConfig
from models.import_hf.architecture import (
    LINEAR,
    VECTOR,
    Architecture,
    Block,
    Options,
    Part,
    Tensors,
    config_of,
    outside,
)

DEFAULTS = {
    "vocab_size": 50277,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "attention_hidden_size": None,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
}


def _config(get: Options) -> ModelConfig:
    """`rescale_every` keeps half-precision numbers in range: it halves the residual stream again and again, and the weights that
    add to it, which the last norm takes back."""
    width = get("hidden_size")
    if get.or_else("attention_hidden_size", width) != width:
        get.refuse("attention_hidden_size", width)
    return config_of(
        get,
        pattern=("rwkv4", "rwkv_channel_mix"),
        depth=2 * get("num_hidden_layers"),
        mixer={"rwkv_channel_mix": {"expansion": get.or_else("intermediate_size", 4 * width) / width}},
        channel_mixer="none",
        norm="layernorm",
        norm_eps=get("layer_norm_epsilon"),
        final_norm_eps=1e-5,  # PyTorch's, whatever the option says
        embedding_norm=True,
    )


def _options(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": config.depth // 2,
        "attention_hidden_size": config.width,
        "intermediate_size": whole(config.mixer["rwkv_channel_mix"]["expansion"] * config.width),
        "layer_norm_epsilon": config.norm_eps,
        "rescale_every": 0,
    }


def _tensors(config: ModelConfig) -> Tensors:
    yield "rwkv.blocks.0.pre_ln.weight", (Part("embedding_norm.weight", VECTOR),)
    yield "rwkv.blocks.0.pre_ln.bias", (Part("embedding_norm.bias", VECTOR),)
    yield "rwkv.ln_out.bias", (Part("norm.bias", VECTOR),)
    yield from outside(config, "rwkv.embeddings.weight", "rwkv.ln_out.weight", head="head.weight")
    for i in range(config.depth // 2):
        for number, (ln, part, names) in enumerate(
            (
                ("ln1", "attention", {"w_k": "key", "w_v": "value", "w_r": "receptance", "w_o": "output"}),
                ("ln2", "feed_forward", {"w_k": "key", "w_r": "receptance", "w_v": "value"}),
            )
        ):
            block = Block(f"rwkv.blocks.{i}", 2 * i + number)
            for kind in ("weight", "bias"):
                yield block(f"{ln}.{kind}", f"mixer_norm.{kind}", VECTOR)
            for ours, theirs in names.items():
                yield block(f"{part}.{theirs}.weight", f"mixer.{ours}", LINEAR)
            shifts = ("key", "value", "receptance") if part == "attention" else ("key", "receptance")
            for j, theirs in enumerate(shifts):
                yield block(f"{part}.time_mix_{theirs}", "mixer.mu", "d -> 1 1 d", (j,))
            if part == "attention":
                yield block("attention.time_decay", "mixer.log_w", VECTOR)
                yield block("attention.time_first", "mixer.u", VECTOR)


ARCHITECTURE = Architecture(
    "RwkvForCausalLM",
    _config,
    _options,
    _tensors,
    frozenset({"rwkv4", "rwkv_channel_mix"}),
    DEFAULTS,
    frozenset({"context_length", "rescale_every"}),
    head="head.weight",
)

"""The architectures that we share with Hugging Face's library: their options as our configuration, their tensors as our
parameters.

A table says for each tensor which slice of which of our parameters it is and how its axes are arranged.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from common.errors import UserError
from models.checks import whole
from models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a tensor: `einops.rearrange(parameter[index], axes)`.

    Attributes:
      path: of the parameter in our model, or in block number `block`.
      axes: our axes -> the tensor's.
      index: which slice of the parameter; all of it by default.
      block: None for parameters outside the stack.
    """

    path: str
    axes: str
    index: tuple = ()
    block: int | None = None


Tensors = Iterator[tuple[str, tuple[Part, ...]]]  # name of a tensor and the parts that its first axis concatenates

VECTOR = "d -> d"
LINEAR = "i o -> o i"


# What may stand in a config.json and says nothing about what a model computes: where it comes from, how it was initialised and
# is to be sampled from, what other programs are to do with it.
NEUTRAL = frozenset(
    """
    _attn_implementation_autoset _name_or_path add_cross_attention architectures attn_implementation auto_map bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range
    label2id length_penalty max_length max_position_embeddings min_length model_type no_repeat_ngram_size num_beam_groups
    num_beams num_labels num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache
    """.split()
)


class Options:
    """The options in a config.json; what it leaves out has the value that the library's class gives it.

    Args:
      options: the content of the file.
      where: the file, for messages.
      architecture: says which options there are.

    Raises:
      UserError: for an option that nobody reads.
    """

    def __init__(self, options: Mapping[str, Any], where: pathlib.Path, architecture: "Architecture"):
        self.options, self.where, self.defaults = options, where, architecture.defaults
        known = {*self.defaults, *NEUTRAL, *architecture.neutral, "pruned_heads", "is_decoder", "is_encoder_decoder"}
        if "rope_theta" in known:
            known |= {"rope_scaling", "rope_parameters"}
        if unread := sorted(set(options) - known):
            raise UserError(
                f"{where}: nobody reads {', '.join(unread)}; take out what has no effect on this model's outputs (its class in "
                f"transformers reads {', '.join(sorted(self.defaults))})"
            )
        for key, value in (("pruned_heads", {}), ("is_decoder", False), ("is_encoder_decoder", False)):
            if options.get(key, value) != value:
                self.refuse(key, value)

    def __call__(self, key: str):
        """The value of an option. Raises a UserError where it is null and its class has no null."""
        value = self.options.get(key, self.defaults[key])
        if value is None and self.defaults[key] is not None:
            raise UserError(f"{self.where}: {key} is null; give its value, or leave it out for {self.defaults[key]!r}")
        return value

    def or_else(self, key: str, value):
        """The value of an option that may be null, which stands for `value`."""
        found = self.options.get(key, self.defaults[key])
        return value if found is None else found

    def expect(self, **supported) -> None:
        """Raises a UserError for an option with another value than the one that our model has."""
        for key, value in supported.items():
            if self(key) != value:
                self.refuse(key, value)

    def refuse(self, key: str, supported) -> None:
        """Raises a UserError that names an option."""
        raise UserError(f"{self.where}: {key}={self.options.get(key)!r} is not supported, only {supported!r}")

    def rotary(self) -> tuple[float, float]:
        """The base of the rotary frequencies and the rotated share of a head, in any of the library's spellings.

        Raises:
          UserError: for another kind of rotary embedding, by its option's name.
        """
        name = next((key for key in ("rope_scaling", "rope_parameters") if self.options.get(key)), "rope_parameters")
        rope = dict(self.options.get(name) or {})
        kind = next((key for key in ("rope_type", "type") if key in rope), "rope_type")
        if rope.pop(kind, "default") != "default":
            raise UserError(
                f"{self.where}: {name}.{kind}={self.options[name][kind]!r} is not supported, only 'default'"
            )
        base = rope.pop("rope_theta", self("rope_theta"))
        share = rope.pop("partial_rotary_factor", self("partial_rotary_factor"))
        rope.pop("type", None)
        if rope:
            raise UserError(f"{self.where}: nobody reads {', '.join(f'{name}.{key}' for key in sorted(rope))}")
        return float(base), 1.0 if share is None else float(share)


_OF_TOKENS = {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 32}
_MAMBA = _OF_TOKENS | {
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
_MAMBA_NEUTRAL = frozenset(
    """
    d_inner d_model fused_add_norm n_layer norm_before_gate pad_vocab_size_multiple rescale_prenorm_residual residual_in_fp32
    time_step_floor time_step_init_scheme time_step_scale use_associative_scan use_mambapy
    """.split()
)


def _mamba_config(get: Options) -> ModelConfig:
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
    return _config(get, pattern=("mamba",), mixer={"mamba": mixer}, norm_eps=get("layer_norm_epsilon"))


def _mamba_options(config: ModelConfig) -> dict[str, Any]:
    mixer = config.mixer["mamba"]
    inner = whole(mixer["expand"] * config.width)
    return {
        "state_size": mixer["state"],
        "expand": _number(mixer["expand"]),
        "intermediate_size": inner,
        "conv_kernel": mixer["conv_size"],
        "time_step_rank": mixer["dt_rank"],
        "time_step_min": mixer["dt_min"],
        "time_step_max": mixer["dt_max"],
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": True,
    }


def _mamba_tensors(config: ModelConfig) -> Tensors:
    yield from _outside(config, "backbone.embeddings.weight", "backbone.norm_f.weight")
    for i in range(config.depth):
        block = _Block(f"backbone.layers.{i}", i)
        yield block("norm.weight", "mixer_norm.weight", VECTOR)
        yield block("mixer.in_proj.weight", "mixer.w_in", "d g i -> (g i) d")
        yield block("mixer.conv1d.weight", "mixer.conv", "w i -> i 1 w")
        yield block("mixer.conv1d.bias", "mixer.conv_bias", VECTOR)
        yield block("mixer.x_proj.weight", "mixer.w_x", LINEAR)
        yield block("mixer.dt_proj.weight", "mixer.w_dt", LINEAR)
        yield block("mixer.dt_proj.bias", "mixer.dt_bias", VECTOR)
        yield block("mixer.A_log", "mixer.a_log", "i n -> i n")
        yield block("mixer.D", "mixer.d", VECTOR)
        yield block("mixer.out_proj.weight", "mixer.w_out", LINEAR)


_MAMBA2 = _MAMBA | {
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


def _mamba2_config(get: Options) -> ModelConfig:
    get.expect(hidden_act="silu", use_bias=False, use_conv_bias=True, rms_norm=True, ssm_cfg={})
    low, high = get("time_step_limit")
    if low != 0 or high not in (math.inf, {"__float__": "Infinity"}):
        raise UserError(f"{get.where}: time_step_limit={[low, high]} is not supported, only (0, inf)")
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
        "eps": get("layer_norm_epsilon"),
    }
    return _config(get, pattern=("mamba2",), mixer={"mamba2": mixer}, norm_eps=mixer["eps"])


def _mamba2_options(config: ModelConfig) -> dict[str, Any]:
    mixer = config.mixer["mamba2"]
    inner = whole(mixer["expand"] * config.width)
    return {
        "state_size": mixer["state"],
        "expand": _number(mixer["expand"]),
        "num_heads": mixer["heads"],
        "head_dim": inner // mixer["heads"],
        "n_groups": mixer["groups"],
        "conv_kernel": mixer["conv_size"],
        "time_step_min": mixer["dt_min"],
        "time_step_max": mixer["dt_max"],
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": True,
    }


def _mamba2_tensors(config: ModelConfig) -> Tensors:
    yield from _outside(config, "backbone.embeddings.weight", "backbone.norm_f.weight")
    for i in range(config.depth):
        block = _Block(f"backbone.layers.{i}", i)
        joined = lambda name, axes, *paths, block=block, i=i: (
            f"{block.prefix}.{name}",
            tuple(Part(f"mixer.{path}", axes, (), i) for path in paths),
        )
        yield block("norm.weight", "mixer_norm.weight", VECTOR)
        yield joined("mixer.in_proj.weight", LINEAR, "w_z", "w_u", "w_bc", "w_dt")
        yield joined("mixer.conv1d.weight", "w i -> i 1 w", "conv_u", "conv_bc")
        yield joined("mixer.conv1d.bias", VECTOR, "conv_u_bias", "conv_bc_bias")
        yield block("mixer.dt_bias", "mixer.dt_bias", VECTOR)
        yield block("mixer.A_log", "mixer.a_log", VECTOR)
        yield block("mixer.D", "mixer.d", VECTOR)
        yield block("mixer.norm.weight", "mixer.norm", VECTOR)
        yield block("mixer.out_proj.weight", "mixer.w_out", LINEAR)


_RWKV4 = {
    "vocab_size": 50277,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "attention_hidden_size": None,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
}


def _rwkv4_config(get: Options) -> ModelConfig:
    """`rescale_every` keeps half-precision numbers in range: it halves the residual stream again and again, and the weights that
    add to it, which the last norm takes back."""
    width = get("hidden_size")
    if get.or_else("attention_hidden_size", width) != width:
        get.refuse("attention_hidden_size", width)
    return _config(
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


def _rwkv4_options(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": config.depth // 2,
        "attention_hidden_size": config.width,
        "intermediate_size": whole(config.mixer["rwkv_channel_mix"]["expansion"] * config.width),
        "layer_norm_epsilon": config.norm_eps,
        "rescale_every": 0,
    }


def _rwkv4_tensors(config: ModelConfig) -> Tensors:
    yield "rwkv.blocks.0.pre_ln.weight", (Part("embedding_norm.weight", VECTOR),)
    yield "rwkv.blocks.0.pre_ln.bias", (Part("embedding_norm.bias", VECTOR),)
    yield "rwkv.ln_out.bias", (Part("norm.bias", VECTOR),)
    yield from _outside(config, "rwkv.embeddings.weight", "rwkv.ln_out.weight", head="head.weight")
    for i in range(config.depth // 2):
        for number, (ln, part, names) in enumerate(
            (
                ("ln1", "attention", {"w_k": "key", "w_v": "value", "w_r": "receptance", "w_o": "output"}),
                ("ln2", "feed_forward", {"w_k": "key", "w_r": "receptance", "w_v": "value"}),
            )
        ):
            block = _Block(f"rwkv.blocks.{i}", 2 * i + number)
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


_RECURRENT_GEMMA = {
    "num_hidden_layers": 26,
    "vocab_size": 256000,
    "hidden_size": 2560,
    "intermediate_size": 3 * 2560,
    "num_attention_heads": 10,
    "lru_width": None,
    "attention_window_size": 2048,
    "conv1d_width": 4,
    "logits_soft_cap": 30.0,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "block_types": ("recurrent", "recurrent", "attention"),
    "attention_dropout": 0.0,
    "num_key_value_heads": None,
    "attention_bias": False,
    "head_dim": None,
    "embeddings_scale_by_sqrt_dim": True,  # of older files
    "tie_word_embeddings": True,
}
_GEMMA_KINDS = {"recurrent": "rglru", "attention": "local_attention"}


def _recurrent_gemma_config(get: Options) -> ModelConfig:
    width, depth, heads = get("hidden_size"), get("num_hidden_layers"), get("num_attention_heads")
    get.expect(attention_bias=False, attention_dropout=0.0, hidden_activation="gelu_pytorch_tanh")
    get.expect(embeddings_scale_by_sqrt_dim=True)
    if get.or_else("head_dim", width // heads) * heads != width:
        get.refuse("head_dim", width / heads)
    if get("intermediate_size") % 2:
        raise UserError(
            f"{get.where}: intermediate_size={get('intermediate_size')} must be even: half of it is the hidden size"
        )
    base, share = get.rotary()
    if not 0 < share <= 1 or int(width // heads * share) % 2:
        raise UserError(
            f"{get.where}: partial_rotary_factor={share} must leave a head's {width // heads} channels pairs to rotate"
        )
    cycle = [choose("block_types", kind, _GEMMA_KINDS, get.where) for kind in get("block_types")]
    layers = tuple((cycle * depth)[:depth])
    mixer = {
        "rglru": {
            "heads": heads,
            "expand": get.or_else("lru_width", width) / width,
            "conv_size": get("conv1d_width"),
            "bias": True,
        },
        "local_attention": {
            "heads": heads,
            "kv_heads": get.or_else("num_key_value_heads", heads),
            "window": get("attention_window_size"),
            "rotary_base": base,
            "rotary_fraction": share,
            "bias": True,
        },
    }
    return _config(
        get,
        pattern=tuple(cycle) if depth >= len(cycle) else layers,
        suffix=layers[depth - depth % len(cycle) :] if depth >= len(cycle) else (),
        mixer={name: mixer[name] for name in dict.fromkeys(layers)},
        channel_mixer="geglu",
        channel_size=get("intermediate_size") // 2,
        channel_bias=True,
        norm="rmsnorm1p",
        norm_eps=get("rms_norm_eps"),
        embedding_scale=float(jnp.bfloat16(width**0.5)),  # rounded by the authors, in every dtype
        logit_cap=float(get("logits_soft_cap")),
    )


def _recurrent_gemma_options(config: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in _GEMMA_KINDS.items()}
    kinds = [names[name] for item in config.items for name in item.mixers]
    cycle = kinds[: len(config.pattern)]
    recurrent, attention = (config.mixer.get(name, {}) for name in ("rglru", "local_attention"))
    heads = (attention or recurrent)["heads"]
    return {
        "intermediate_size": 2 * (config.channel_size or 1),
        "num_attention_heads": heads,
        "num_key_value_heads": attention.get("kv_heads", heads),
        "lru_width": whole(recurrent.get("expand", 1.0) * config.width),
        "attention_window_size": attention.get("window", 2048),
        "conv1d_width": recurrent.get("conv_size", 4),
        "logits_soft_cap": config.logit_cap,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": attention.get("rotary_base", 10000.0),
        "partial_rotary_factor": attention.get("rotary_fraction", 0.5),
        "block_types": cycle if (cycle * config.depth)[: config.depth] == kinds else kinds,
    }


def _recurrent_gemma_tensors(config: ModelConfig) -> Tensors:
    yield from _outside(config, "model.embed_tokens.weight", "model.final_norm.weight")
    for i in range(config.depth):
        block = _Block(f"model.layers.{i}", i)
        yield block("temporal_pre_norm.weight", "mixer_norm.weight", VECTOR)
        yield block("channel_pre_norm.weight", "channel_norm.weight", VECTOR)
        yield from _gated_mlp(block, "mlp_block", bias=True)
        if config.items[i].mixers == ("rglru",):
            for ours, theirs in {"x": "linear_x", "y": "linear_y", "o": "linear_out"}.items():
                yield block(f"temporal_block.{theirs}.weight", f"mixer.w_{ours}", LINEAR)
                yield block(f"temporal_block.{theirs}.bias", f"mixer.b_{ours}", VECTOR)
            yield block("temporal_block.conv_1d.weight", "mixer.conv", "w i -> i 1 w")
            yield block("temporal_block.conv_1d.bias", "mixer.conv_bias", VECTOR)
            yield block("temporal_block.rg_lru.recurrent_param", "mixer.lambda_", VECTOR)
            for ours, theirs in {"r": "recurrent", "i": "input"}.items():
                yield block(f"temporal_block.rg_lru.{theirs}_gate_weight", f"mixer.w_{ours}", "h i o -> h i o")
                yield block(f"temporal_block.rg_lru.{theirs}_gate_bias", f"mixer.b_{ours}", "h i -> h i")
        else:
            yield from _attention(block, "temporal_block")
            yield block("temporal_block.o_proj.bias", "mixer.b_o", VECTOR)


_LLAMA = {
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
_QWEN3 = {key: value for key, value in _LLAMA.items() if key != "mlp_bias"} | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "use_sliding_window": False,
    "layer_types": None,
}


def _llama_config(get: Options) -> ModelConfig:
    get.expect(mlp_bias=False)
    return _transformer(get, qk_norm=False)


def _qwen3_config(get: Options) -> ModelConfig:
    get.expect(use_sliding_window=False)
    whole_context = ["full_attention"] * get("num_hidden_layers")
    if list(get.or_else("layer_types", whole_context)) != whole_context:
        get.refuse("layer_types", "full_attention")
    if get("rms_norm_eps") != 1e-6:  # the norms of queries and keys have it, too
        get.refuse("rms_norm_eps", 1e-6)
    return _transformer(get, qk_norm=True)


def _transformer(get: Options, qk_norm: bool) -> ModelConfig:
    get.expect(attention_bias=False, attention_dropout=0.0, hidden_act="silu")
    heads = get("num_attention_heads")
    base, share = get.rotary()
    if share != 1:
        get.refuse("partial_rotary_factor", 1.0)
    mixer = {
        "heads": heads,
        "kv_heads": get.or_else("num_key_value_heads", heads),
        "head_channels": get.or_else("head_dim", get("hidden_size") // heads),
        "rotary_base": base,
        "qk_norm": qk_norm,
    }
    return _config(
        get,
        pattern=("attention",),
        mixer={"attention": mixer},
        channel_mixer="swiglu",
        channel_size=get("intermediate_size"),
        norm_eps=get("rms_norm_eps"),
    )


def _transformer_options(config: ModelConfig) -> dict[str, Any]:
    mixer = config.mixer["attention"]
    return {
        "intermediate_size": config.channel_size or 1,
        "num_attention_heads": mixer["heads"],
        "num_key_value_heads": mixer["kv_heads"],
        "head_dim": mixer["head_channels"],
        "rms_norm_eps": config.norm_eps,
        "rope_theta": mixer["rotary_base"],
        "max_position_embeddings": config.length,
    }


def _llama_tensors(config: ModelConfig) -> Tensors:
    yield from _outside(config, "model.embed_tokens.weight", "model.norm.weight")
    for i in range(config.depth):
        block = _Block(f"model.layers.{i}", i)
        yield block("input_layernorm.weight", "mixer_norm.weight", VECTOR)
        yield block("post_attention_layernorm.weight", "channel_norm.weight", VECTOR)
        yield from _attention(block, "self_attn")
        yield from _gated_mlp(block, "mlp")
        if config.mixer["attention"]["qk_norm"]:
            for name in ("q_norm", "k_norm"):
                yield block(f"self_attn.{name}.weight", f"mixer.{name}.weight", VECTOR)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture that we share with the library.

    Attributes:
      name: of its class for language models.
      config: its options as our configuration.
      options: our configuration as its options, but for those that all have; what `config` makes of them says whether it fits.
      tensors: what each of its tensors is of ours.
      mixers: those that its blocks are made of.
      defaults: of its class, for every option that `config` reads.
      neutral: options that have no effect on what it computes, beside `NEUTRAL`.
      head: the tensor of the head.
      buffers: ends of the names of tensors that some writers store and that follow from the options.
    """

    name: str
    config: Callable[[Options], ModelConfig]
    options: Callable[[ModelConfig], dict[str, Any]]
    tensors: Callable[[ModelConfig], Tensors]
    mixers: frozenset[str]
    defaults: Mapping[str, Any]
    neutral: frozenset[str] = frozenset()
    head: str = "lm_head.weight"
    buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)


ARCHITECTURES = {
    "mamba": Architecture(
        "MambaForCausalLM", _mamba_config, _mamba_options, _mamba_tensors, frozenset({"mamba"}), _MAMBA, _MAMBA_NEUTRAL
    ),
    "mamba2": Architecture(
        "Mamba2ForCausalLM",
        _mamba2_config,
        _mamba2_options,
        _mamba2_tensors,
        frozenset({"mamba2"}),
        {key: value for key, value in _MAMBA2.items() if key not in ("intermediate_size", "time_step_rank")},
        _MAMBA_NEUTRAL | {"chunk_size", "intermediate_size", "time_step_rank"},
    ),
    "rwkv": Architecture(
        "RwkvForCausalLM",
        _rwkv4_config,
        _rwkv4_options,
        _rwkv4_tensors,
        frozenset({"rwkv4", "rwkv_channel_mix"}),
        _RWKV4,
        frozenset({"context_length", "rescale_every"}),
        head="head.weight",
    ),
    "recurrent_gemma": Architecture(
        "RecurrentGemmaForCausalLM",
        _recurrent_gemma_config,
        _recurrent_gemma_options,
        _recurrent_gemma_tensors,
        frozenset({"rglru", "local_attention"}),
        _RECURRENT_GEMMA,
        frozenset({"final_w_init_variance_scale", "w_init_variance_scale"}),
        buffers=(".rotary_emb.inv_freq", "model.normalizer"),
    ),
    "llama": Architecture(
        "LlamaForCausalLM",
        _llama_config,
        _transformer_options,
        _llama_tensors,
        frozenset({"attention"}),
        _LLAMA,
        frozenset({"pretraining_tp"}),
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        _qwen3_config,
        _transformer_options,
        _llama_tensors,
        frozenset({"attention"}),
        _QWEN3,
        frozenset({"max_window_layers", "sliding_window"}),
    ),
}


@dataclasses.dataclass(frozen=True)
class _Block:
    """Makes table rows of one of our blocks."""

    prefix: str
    number: int

    def __call__(self, name: str, path: str, axes: str, index: tuple = ()):
        return f"{self.prefix}.{name}", (Part(path, axes, index, self.number),)


def choose(key: str, value: str, known: Mapping[str, str], where: pathlib.Path) -> str:
    """known[value]. Raises a UserError if there is none."""
    if value not in known:
        raise UserError(f"{where}: {key} has {value!r}, which is not supported; supported are {', '.join(known)}")
    return known[value]


def _config(get: Options, **fields) -> ModelConfig:
    common = {
        "vocab_size": get("vocab_size"),
        "targets": get("vocab_size"),
        "width": get("hidden_size"),
        "depth": get("num_hidden_layers"),
        "position_embedding": "none",
        "tie_embeddings": get("tie_word_embeddings"),
    }
    return ModelConfig(**common | fields)


def _number(value: float) -> int | float:
    """An integer where it is whole, as the library writes it."""
    return int(value) if value == int(value) else value


def _outside(config: ModelConfig, embedding: str, norm: str, head: str = "lm_head.weight") -> Tensors:
    yield embedding, (Part("embedding", "v d -> v d"),)
    yield norm, (Part("norm.weight", VECTOR),)
    if not config.tie_embeddings:
        yield head, (Part("head", LINEAR),)


def _attention(block: _Block, prefix: str) -> Tensors:
    for name in "qkv":
        yield block(f"{prefix}.{name}_proj.weight", f"mixer.w_{name}", "d h k -> (h k) d")
    yield block(f"{prefix}.o_proj.weight", "mixer.w_o", "h k d -> d (h k)")


def _gated_mlp(block: _Block, prefix: str, bias: bool = False) -> Tensors:
    for i, name in enumerate(("gate_proj", "up_proj")):
        yield block(f"{prefix}.{name}.weight", "channel_mixer.w_in", "d f -> f d", (slice(None), i))
        if bias:
            yield block(f"{prefix}.{name}.bias", "channel_mixer.b_in", VECTOR, (i,))
    yield block(f"{prefix}.down_proj.weight", "channel_mixer.w_out", LINEAR)
    if bias:
        yield block(f"{prefix}.down_proj.bias", "channel_mixer.b_out", VECTOR)

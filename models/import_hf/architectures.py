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


class Options:
    """The options in a config.json, each with its default; `expect` refuses what our model does not have."""

    def __init__(self, options: Mapping[str, Any], where: pathlib.Path):
        self.options, self.where = options, where

    def __call__(self, key: str, *default):
        value = self.options.get(key)
        if value is None and not default:
            raise UserError(f"{self.where} has no {key!r}")
        return default[0] if value is None else value

    def expect(self, **supported) -> None:
        for key, value in supported.items():
            if self(key, value) != value:
                raise UserError(f"{self.where}: {key}={self(key)!r} is not supported, only {value!r}")

    def rotary(self, **supported) -> float:
        """The base of the rotary frequencies, in either of the library's spellings."""
        scaling = self("rope_scaling", {}) or {}
        rope = self("rope_parameters", None) or {"rope_theta": self("rope_theta", 10000.0), **scaling}
        supported |= {"rope_type": "default"}
        for key, value in rope.items():
            if key != "rope_theta" and value != supported.get(key, value if key == "type" else None):
                raise UserError(f"{self.where}: rotary embedding with {key}={value!r} is not supported")
        return float(rope["rope_theta"])


def _mamba_config(get: Options) -> ModelConfig:
    get.expect(hidden_act="silu", use_bias=False, use_conv_bias=True)
    width, rank = get("hidden_size"), get("time_step_rank", "auto")
    mixer = {
        "state": get("state_size"),
        "expand": float(get("expand", 2)),
        "conv_size": get("conv_kernel", 4),
        "dt_rank": math.ceil(width / 16) if rank == "auto" else rank,
    }
    return _config(get, pattern=("mamba",), mixer={"mamba": mixer}, norm_eps=get("layer_norm_epsilon", 1e-5))


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


def _mamba2_config(get: Options) -> ModelConfig:
    get.expect(hidden_act="silu", use_bias=False, use_conv_bias=True)
    limit = get("time_step_limit", (0.0, math.inf))
    if limit[0] != 0 or limit[1] not in (math.inf, {"__float__": "Infinity"}):
        raise UserError(f"{get.where}: time_step_limit={limit} is not supported, only (0, inf)")
    mixer = {
        "state": get("state_size"),
        "expand": float(get("expand", 2)),
        "heads": get("num_heads"),
        "groups": get("n_groups", 1),
        "conv_size": get("conv_kernel", 4),
        "eps": get("layer_norm_epsilon", 1e-5),
    }
    return _config(get, pattern=("mamba2",), mixer={"mamba2": mixer}, norm_eps=mixer["eps"])


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


def _rwkv4_config(get: Options) -> ModelConfig:
    width = get("hidden_size")
    get.expect(attention_hidden_size=width)
    return _config(
        get,
        pattern=("rwkv4", "rwkv_channel_mix"),
        depth=2 * get("num_hidden_layers"),
        mixer={"rwkv_channel_mix": {"expansion": get("intermediate_size", 4 * width) / width}},
        channel_mixer="none",
        norm="layernorm",
        norm_eps=get("layer_norm_epsilon", 1e-5),
        embedding_norm=True,
    )


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


def _recurrent_gemma_config(get: Options) -> ModelConfig:
    width, depth, heads = get("hidden_size"), get("num_hidden_layers"), get("num_attention_heads")
    get.expect(attention_bias=False, hidden_activation="gelu_pytorch_tanh")
    kinds = {"recurrent": "rglru", "attention": "local_attention"}
    cycle = [kinds[kind] for kind in get("block_types", ("recurrent", "recurrent", "attention"))]
    layers = tuple((cycle * depth)[:depth])
    mixer = {
        "rglru": {
            "heads": heads,
            "expand": get("lru_width", width) / width,
            "conv_size": get("conv1d_width", 4),
            "bias": True,
        },
        "local_attention": {
            "heads": heads,
            "kv_heads": get("num_key_value_heads", heads),
            "window": get("attention_window_size", 2048),
            "rotary_base": get.rotary(partial_rotary_factor=0.5),
            "rotary_fraction": 0.5,
            "bias": True,
        },
    }
    return _config(
        get,
        pattern=tuple(cycle) if depth % len(cycle) == 0 else layers,
        mixer={name: mixer[name] for name in dict.fromkeys(layers)},
        channel_mixer="geglu",
        channel_size=get("intermediate_size", 3 * width) // 2,
        channel_bias=True,
        norm="rmsnorm1p",
        norm_eps=get("rms_norm_eps", 1e-6),
        embedding_scale=float(jnp.bfloat16(width**0.5)),  # rounded by the authors, in every dtype
        logit_cap=float(get("logits_soft_cap", 30.0)),
    )


def _recurrent_gemma_tensors(config: ModelConfig) -> Tensors:
    yield from _outside(config, "model.embed_tokens.weight", "model.final_norm.weight")
    for i in range(config.depth):
        block = _Block(f"model.layers.{i}", i)
        yield block("temporal_pre_norm.weight", "mixer_norm.weight", VECTOR)
        yield block("channel_pre_norm.weight", "channel_norm.weight", VECTOR)
        yield from _gated_mlp(block, "mlp_block", bias=True)
        if config.pattern[i % len(config.pattern)] == "rglru":
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


def _llama_config(get: Options) -> ModelConfig:
    qk_norm = get("model_type") == "qwen3"
    get.expect(attention_bias=False, mlp_bias=False, hidden_act="silu", use_sliding_window=False)
    heads = get("num_attention_heads")
    mixer = {
        "heads": heads,
        "kv_heads": get("num_key_value_heads", heads),
        "head_channels": get("head_dim", get("hidden_size") // heads),
        "rotary_base": get.rotary(),
        "qk_norm": qk_norm,
    }
    eps = get("rms_norm_eps", 1e-6)
    if qk_norm and eps != 1e-6:
        raise UserError(f"{get.where}: rms_norm_eps={eps} is not supported beside norms of queries and keys, only 1e-6")
    return _config(
        get,
        pattern=("attention",),
        mixer={"attention": mixer},
        channel_mixer="swiglu",
        channel_size=get("intermediate_size"),
        norm_eps=eps,
    )


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
    config: Callable[[Options], ModelConfig]
    tensors: Callable[[ModelConfig], Tensors]


ARCHITECTURES = {
    "mamba": Architecture(_mamba_config, _mamba_tensors),
    "mamba2": Architecture(_mamba2_config, _mamba2_tensors),
    "rwkv": Architecture(_rwkv4_config, _rwkv4_tensors),
    "recurrent_gemma": Architecture(_recurrent_gemma_config, _recurrent_gemma_tensors),
    "llama": Architecture(_llama_config, _llama_tensors),
    "qwen3": Architecture(_llama_config, _llama_tensors),
}


@dataclasses.dataclass(frozen=True)
class _Block:
    """Makes table rows of one of our blocks."""

    prefix: str
    number: int

    def __call__(self, name: str, path: str, axes: str, index: tuple = ()):
        return f"{self.prefix}.{name}", (Part(path, axes, index, self.number),)


def _config(get: Options, **fields) -> ModelConfig:
    common = {
        "vocab_size": get("vocab_size"),
        "targets": get("vocab_size"),
        "width": get("hidden_size"),
        "depth": get("num_hidden_layers"),
        "position_embedding": "none",
        "tie_embeddings": get("tie_word_embeddings", False),
    }
    return ModelConfig(**common | fields)


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

"""What an architecture of Hugging Face's library is: its options as our configuration, its tensors as our parameters.

A table says for each tensor which slice of which of our parameters it is and how its axes are arranged. Each architecture is one
file of `models/import_hf/families/`, named as its `model_type`.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from common.errors import UserError
from models.checks import about
from models.config import ModelConfig
from ops import rotary_scaling


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

    def rotary(self) -> tuple[float, float, str]:
        """The base of the rotary frequencies, the rotated share of a head, and the rule for longer sequences (as text of
        `ops.rotary_scaling`), in any of the library's spellings.

        Raises:
          UserError: for another kind of rotary embedding, by its option's name.
        """
        name = next((key for key in ("rope_scaling", "rope_parameters") if self.options.get(key)), "rope_parameters")
        rope = dict(self.options.get(name) or {})
        spelling = next((key for key in ("rope_type", "type") if key in rope), "rope_type")
        kind = rope.pop(spelling, "default")
        if kind not in ("default", *ROPE):
            supported = ", ".join(map(repr, ("default", *ROPE)))
            raise UserError(f"{self.where}: {name}.{spelling}={kind!r} is not supported, only {supported}")
        base = rope.pop("rope_theta", self("rope_theta"))
        share = rope.pop("partial_rotary_factor", self("partial_rotary_factor"))
        rope.pop("type", None)
        scales = [rope.pop(key, None) for key in ("mscale", "mscale_all_dim")] if kind == "yarn" else []
        given = {ours: rope.pop(theirs) for theirs, ours in ROPE.get(kind, {}).items() if rope.get(theirs) is not None}
        rope = {key: value for key, value in rope.items() if key not in ROPE.get(kind, {})}
        if rope:
            raise UserError(f"{self.where}: nobody reads {', '.join(f'{name}.{key}' for key in sorted(rope))}")
        if all(scales) and scales and "magnitude" not in given and "factor" in given:
            one, other = (0.1 * scale * math.log(max(given["factor"], 1.0)) + 1 for scale in scales)
            given["magnitude"] = one / other
        with about(f"{self.where}: {name}"):
            return float(base), 1.0 if share is None else float(share), rope_text(kind, given)


# The library's names of the arguments of each rule of `ops.rotary_scaling`.
ROPE = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "low_freq_factor": "low_factor",
        "high_freq_factor": "high_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "magnitude",
    },
}


def rope_text(kind: str, given: Mapping[str, float]) -> str:
    """A rule of `ops.rotary_scaling` with all of its arguments, so that two texts of the same rule are equal."""
    if kind == "default":
        return "none"
    return rotary_scaling.complete(f"{kind}:" + ",".join(f"{key}={float(value)!r}" for key, value in given.items()))


def rope_options(mixer: Mapping[str, Any]) -> dict[str, Any]:
    """The library's options of a mixer's rotary embedding."""
    kind, given = rotary_scaling.parse(mixer["rotary_scaling"])
    if kind not in ROPE:
        return {"rope_theta": mixer["rotary_base"]}
    names = {ours: theirs for theirs, ours in ROPE[kind].items()}
    rope = {names[key]: value for key, value in given.items() if key != "magnitude" or value}
    rope |= {key: int(rope[key]) for key in ("original_max_position_embeddings",) if key in rope}
    rope |= {"truncate": bool(rope["truncate"])} if "truncate" in rope else {}
    return {"rope_theta": mixer["rotary_base"], "rope_scaling": {"rope_type": kind, **rope}}


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


@dataclasses.dataclass(frozen=True)
class Block:
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


def config_of(get: Options, **fields) -> ModelConfig:
    """Our configuration: the fields, and those that every architecture has in the same way."""
    common = {
        "vocab_size": get("vocab_size"),
        "targets": get("vocab_size"),
        "width": get("hidden_size"),
        "depth": get("num_hidden_layers"),
        "position_embedding": "none",
        "tie_embeddings": get("tie_word_embeddings"),
    }
    return ModelConfig(**common | fields)


def number(value: float) -> int | float:
    """An integer where it is whole, as the library writes it."""
    return int(value) if value == int(value) else value


def outside(config: ModelConfig, embedding: str, norm: str, head: str = "lm_head.weight") -> Tensors:
    """The rows of the embedding, the last norm, and the head."""
    yield embedding, (Part("embedding", "v d -> v d"),)
    yield norm, (Part("norm.weight", VECTOR),)
    if not config.tie_embeddings:
        yield head, (Part("head", LINEAR),)


def attention_rows(block: Block, prefix: str) -> Tensors:
    """The rows of the maps of an attention."""
    for name in "qkv":
        yield block(f"{prefix}.{name}_proj.weight", f"mixer.w_{name}", "d h k -> (h k) d")
    yield block(f"{prefix}.o_proj.weight", "mixer.w_o", "h k d -> d (h k)")


def gated_mlp(block: Block, prefix: str, bias: bool = False) -> Tensors:
    """The rows of a gated channel mixer."""
    for i, name in enumerate(("gate_proj", "up_proj")):
        yield block(f"{prefix}.{name}.weight", "channel_mixer.w_in", "d f -> f d", (slice(None), i))
        if bias:
            yield block(f"{prefix}.{name}.bias", "channel_mixer.b_in", VECTOR, (i,))
    yield block(f"{prefix}.down_proj.weight", "channel_mixer.w_out", LINEAR)
    if bias:
        yield block(f"{prefix}.down_proj.bias", "channel_mixer.b_out", VECTOR)

"""What an architecture of Hugging Face's library is: its options as our configuration, its tensors as our parameters.

A table says for each tensor which slice of which of our parameters it is and how its axes are arranged. Each architecture is one
file of `models/import_hf/families/`, named as its `model_type`.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
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
    begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range
    label2id length_penalty max_length max_position_embeddings min_length model_type no_repeat_ngram_size num_beam_groups
    num_beams num_labels num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache
    """.split()
)


# What may stand in place of each other in a config.json, by the kind of the default.
KINDS_OF_VALUES = (int | float, str, list | tuple | range, Mapping)
# Options that are more than 0 wherever they are read.
SIZES = frozenset(
    """
    hidden_size vocab_size head_dim num_hidden_layers num_attention_heads num_key_value_heads query_pre_attn_scalar num_heads
    mamba_n_heads mamba_num_heads linear_num_key_heads linear_num_value_heads n_groups mamba_n_groups full_attention_interval
    decoder_sparse_step logits_scaling
    """.split()
)
# Options with an entry for each layer.
PER_LAYER = ("layer_types", "mlp_layer_types")


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
        self.options, self.where, self.defaults, self.ties = options, where, architecture.defaults, architecture.ties
        known = {*self.defaults, *NEUTRAL, *architecture.neutral, "pruned_heads", "is_decoder", "is_encoder_decoder"}
        if "rope_theta" in known:
            known |= {"rope_scaling", "rope_parameters"}
        packed = self._section("quantization_config")
        if packed and packed.get("quant_method") not in architecture.quantised:
            raise UserError(
                f"{where}: quantization_config says that the weights are stored in fewer bits, which is not read; convert "
                "them to bfloat16 and take it out"
            )
        if unread := sorted(set(options) - known - {"quantization_config"}):
            raise UserError(
                f"{where}: nobody reads {', '.join(unread)}; take out what has no effect on this model's outputs (its class in "
                f"transformers reads {', '.join(sorted(self.defaults))})"
            )
        for key, value in (("pruned_heads", {}), ("is_decoder", False), ("is_encoder_decoder", False)):
            if options.get(key, value) != value:
                self.refuse(key, value)

    def __call__(self, key: str):
        """The value of an option. Raises a UserError where it is null and its class has no null, or of another kind."""
        value = self.options.get(key, self.defaults[key])
        if value is None and self.defaults[key] is not None:
            raise UserError(f"{self.where}: {key} is null; give its value, or leave it out for {self.defaults[key]!r}")
        self._check(key, value)
        return value

    def or_else(self, key: str, value):
        """The value of an option that may be null, which stands for `value`. Raises a UserError for one of another kind."""
        found = self.options.get(key, self.defaults[key])
        self._check(key, found, value)
        return value if found is None else found

    def _check(self, key: str, value: Any, instead: Any = None) -> None:
        """Raises a UserError for a value of another kind than the default (or what stands in its place), and for a size that is
        none."""
        default = self.defaults[key] if self.defaults[key] is not None else instead
        if value is None or value is default:
            return
        for kinds in KINDS_OF_VALUES:
            if default != "auto" and isinstance(default, kinds) and not isinstance(value, kinds):
                raise UserError(f"{self.where}: {key}={value!r} must be such as {default!r}")
        if isinstance(value, bool) != isinstance(default, bool) and isinstance(default, int | float):
            raise UserError(f"{self.where}: {key}={value!r} must be such as {default!r}")
        if key in SIZES and not value > 0:
            raise UserError(f"{self.where}: {key}={value!r} must be more than 0")
        if (
            key in PER_LAYER
            and "num_hidden_layers" in self.defaults
            and len(value) != (depth := self("num_hidden_layers"))
        ):
            raise UserError(f"{self.where}: {key} has {len(value)} entries for the {depth} of num_hidden_layers")

    def expect(self, **supported) -> None:
        """Raises a UserError for an option with another value than the one that our model has."""
        for key, value in supported.items():
            if self(key) != value:
                self.refuse(key, value)

    def refuse(self, key: str, supported) -> None:
        """Raises a UserError that names an option."""
        raise UserError(f"{self.where}: {key}={self.options.get(key)!r} is not supported, only {supported!r}")

    def _section(self, key: str) -> Mapping[str, Any] | None:
        """An option that is an object. Raises a UserError for what is none."""
        value = self.options.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise UserError(f"{self.where}: {key}={value!r} must be an object")
        return value

    def rotary(
        self,
        layer_type: str | None = None,
        base: str = "rope_theta",
        scaled: bool = True,
        default: Mapping[str, Any] | None = None,
        partial: bool = False,
        kinds: Sequence[str] | None = None,
        optional: bool = False,
    ) -> tuple[float, float, str] | None:
        """The base of the rotary frequencies, the rotated share of a head, and the rule for longer sequences (as text of
        `ops.rotary_scaling`), in any of the library's spellings.

        Args:
          layer_type: of the layers that it is asked for, in architectures that have options for each type.
          base: the older name of the base's option.
          scaled: whether an older rule for all layers is for these, too.
          default: what the class has where nothing is said.
          partial: whether the architecture rotates parts of heads.
          kinds: the rules that the architecture has; by default all of `ROPE`.
          optional: whether a base that is null says that nothing is rotated; None is returned then.

        Raises:
          UserError: for another kind of rotary embedding, by its option's name.
        """
        sections = {key: self._section(key) for key in ("rope_scaling", "rope_parameters")}
        if all(sections.values()) and sections["rope_scaling"] != sections["rope_parameters"]:
            raise UserError(
                f"{self.where}: rope_scaling and rope_parameters say the same thing in two ways; leave one of them out"
            )
        name = next((key for key, section in sections.items() if section is not None), "rope_parameters")
        rope = dict((default or {}) if sections[name] is None else sections[name])
        by_type = layer_type is not None and any(kind in rope for kind in LAYER_TYPES)
        if layer_type is not None and (by_type or name == "rope_parameters"):
            if unread := sorted(set(rope) - {*LAYER_TYPES}):
                raise UserError(
                    f"{self.where}: nobody reads {', '.join(f'{name}.{key}' for key in unread)}; this class has them for "
                    f"each type of layer, {' and '.join(LAYER_TYPES)}"
                )
        if by_type:
            name = f"{name}.{layer_type}"
            rope = dict(rope.get(layer_type) or {})
            if not rope.get("truncate", True):  # its class looks for it elsewhere
                raise UserError(f"{self.where}: nobody reads {name}.truncate=false")
        elif not scaled:
            rope = {}
        spelling = next((key for key in ("rope_type", "type") if key in rope), "rope_type")
        kind = rope.pop(spelling, "default")
        if kind not in (known := ("default", *(ROPE if kinds is None else kinds))):
            supported = ", ".join(map(repr, known))
            raise UserError(f"{self.where}: {name}.{spelling}={kind!r} is not supported, only {supported}")
        if (base := rope.pop("rope_theta", self(base))) is None:
            if optional:
                return None
            raise UserError(f"{self.where}: {name}.rope_theta is null; give its value, or leave it out")
        inside = rope.pop("partial_rotary_factor", None)
        share = self.options.get("partial_rotary_factor") if inside is None else inside
        share = self.defaults.get("partial_rotary_factor") if share is None else share
        if not partial and share not in (None, 1):
            key = "partial_rotary_factor" if inside is None else f"{name}.partial_rotary_factor"
            raise UserError(f"{self.where}: {key}={share!r} is not supported: this class rotates whole heads")
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


LAYER_TYPES = ("full_attention", "sliding_attention")  # of layers that may be rotated in ways of their own

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


def rope_options_by_kind(mixers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The library's options of rotary embeddings that differ between types of layers.

    Args:
      mixers: by type of layer.
    """
    found = {}
    for kind, mixer in mixers.items():
        rope = rope_options(mixer)
        found[kind] = {"rope_type": "default", "rope_theta": rope["rope_theta"], **rope.get("rope_scaling", {})}
    return {"rope_parameters": found}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture that we share with the library.

    Attributes:
      name: of its class for language models.
      config: its options as our configuration.
      options: our configuration as its options, but for those that all have; what `config` makes of them says whether it fits.
      tensors: what each of its tensors is of ours.
      mixers: those that its blocks are made of.
      all_mixers: whether each of its models has all of them.
      defaults: of its class, for every option that `config` reads.
      neutral: options that have no effect on what it computes, beside `NEUTRAL`.
      head: the tensor of the head.
      buffers: ends of the names of tensors that some writers store and that follow from the options.
      spellings: parts of the names of tensors, and what some writers have in their place.
      quantised: ways of storing tensors in fewer bits (`quantization_config.quant_method`) that are read.
      unused: beginnings of the names of tensors that the library's class does not read, either.
      ties: whether its class can have the embedding for a head; if not, the head is stored, whatever the options say.
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
    quantised: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    all_mixers: bool = False
    ties: bool = True
    spellings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def stored_names(self, names: Iterable[str], files: Container[str]) -> dict[str, str]:
        """The name in the files of each tensor."""
        found = {}
        for name in names:
            others = (name.replace(ours, theirs) for ours, theirs in self.spellings.items() if ours in name)
            found[name] = next((n for n in (name, *others) if n in files), name)
        return found


@dataclasses.dataclass(frozen=True)
class Block:
    """Makes table rows of one of our blocks.

    Attributes:
      prefix: of the names of its tensors.
      number: of the block.
      mixer: the path of its mixer, where several are side by side.
    """

    prefix: str
    number: int
    mixer: str = "mixer"

    def __call__(self, name: str, path: str, axes: str, index: tuple = ()) -> tuple[str, tuple[Part, ...]]:
        """A tensor that is a part of one parameter; for the arguments see `Part`."""
        return f"{self.prefix}.{name}", (self.part(path, axes, index),)

    def part(self, path: str, axes: str, index: tuple = ()) -> Part:
        """A part of a parameter of the block."""
        if path.startswith("mixer."):
            path = self.mixer + path.removeprefix("mixer")
        return Part(path, axes, index, self.number)


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
        "depth": fields["depth"] if "depth" in fields else get("num_hidden_layers"),
        "position_embedding": "none",
        "tie_embeddings": get.ties and get("tie_word_embeddings"),
    }
    return ModelConfig(**common | fields)


def number(value: float) -> int | float:
    """An integer where it is whole, as the library writes it."""
    return int(value) if value == int(value) else value


def preimage(function: Callable[[float], float], value: float, guess: float) -> float:
    """The x nearest to a guess for which function(x) is the value, exactly where there is such a one among its neighbours."""
    near = (float(round(guess)), guess, math.nextafter(guess, math.inf), math.nextafter(guess, -math.inf))
    return next((x for x in near if x and function(x) == value), guess)


def arranged(items: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The prefix, the pattern and the suffix of a model's blocks, such that as many as possible are repeats."""

    def runs(start: int, period: int) -> int:
        pattern, count = items[start : start + period], 1
        while items[start + count * period : start + (count + 1) * period] == pattern:
            count += 1
        return count

    items = list(items)
    choices = [(start, period) for start in range(len(items)) for period in range(1, len(items) - start + 1)]
    found = [(start, period, runs(start, period)) for start, period in choices]
    # The fewest blocks that are compiled, and of these the fewest outside of the repeats.
    start, period, count = min(found, key=lambda f: (len(items) - (f[2] - 1) * f[1], len(items) - f[2] * f[1]))
    end = start + count * period
    return {
        "prefix": tuple(items[:start]),
        "pattern": tuple(items[start : start + period]),
        "suffix": tuple(items[end:]),
    }


def outside(config: ModelConfig, embedding: str, norm: str, head: str = "lm_head.weight", ties: bool = True) -> Tensors:
    """The rows of the embedding, the last norm, and the head, which is the embedding again where the class does not tie them."""
    yield embedding, (Part("embedding", "v d -> v d"),)
    yield norm, (Part("norm.weight", VECTOR),)
    if not config.tie_embeddings:
        yield head, (Part("head", LINEAR),)
    elif not ties:
        yield head, (Part("embedding", "v d -> v d"),)


def attention_rows(block: Block, prefix: str) -> Tensors:
    """The rows of the maps of an attention."""
    for name in "qkv":
        yield block(f"{prefix}.{name}_proj.weight", f"mixer.w_{name}", "d h k -> (h k) d")
    yield block(f"{prefix}.o_proj.weight", "mixer.w_o", "h k d -> d (h k)")


def gated_mlp(block: Block, prefix: str, bias: bool = False, ours: str = "channel_mixer") -> Tensors:
    """The rows of a gated channel mixer."""
    for i, name in enumerate(("gate_proj", "up_proj")):
        yield block(f"{prefix}.{name}.weight", f"{ours}.w_in", "d f -> f d", (slice(None), i))
        if bias:
            yield block(f"{prefix}.{name}.bias", f"{ours}.b_in", VECTOR, (i,))
    yield block(f"{prefix}.down_proj.weight", f"{ours}.w_out", LINEAR)
    if bias:
        yield block(f"{prefix}.down_proj.bias", f"{ours}.b_out", VECTOR)

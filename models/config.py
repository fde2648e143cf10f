"""What a model is made of, and how it is checked."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from common import signatures
from common.errors import UserError, check_choice, near
from models import mixer as mixers
from models.channel_mixers import CHANNEL_MIXERS
from models.checks import about
from models.heads import LOSSES, POOLINGS
from models.moe import MoE
from models.norms import NORMS
from models.parallel import Parallel
from models.params import without_values
from models.pattern import CHANNELS, NORM_POSITIONS, Item, expand, mixers_of, parse
from models.stack import REMAT


def parallel_defaults() -> ConfigDict:
    """The options of `Parallel`."""
    return signatures.defaults(Parallel.__init__, ("self", "parts", "width", "rngs"))


def moe_defaults() -> ConfigDict:
    """The options of `MoE`."""
    return signatures.defaults(MoE.__init__, ("self", "width", "rngs", "depth", "expansion"))


# Sections of the model that hold the options of one thing, whoever may use it: what they are by default, and whose they are.
SECTIONS = {"parallel": (parallel_defaults, Parallel), "moe": (moe_defaults, MoE)}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything about a model.

    Attributes:
      vocab_size: number of input ids; None where inputs are real.
      targets: size of the output.
      channels: number of real input channels; None where inputs are ids.
      head: what is scored: "token" (every position), "pooled" (the row) or "pair" (two rows).
      causal: False for an encoder.
      length: of the longest sequence that mixers whose parameters or normalisers depend on one are built for.
      width: size of the residual stream.
      depth: number of blocks: those of the prefix and the suffix, and a multiple of the pattern's length.
      pattern: mixers of the blocks that the depth repeats, with "mixer/channel mixer" where a block has one of its own and
        "mixer|mixer" for several side by side, see `models.pattern`.
      prefix: blocks before the repeats of the pattern, written like it ("attention/mlp+2*gla").
      suffix: blocks behind them.
      mixer: hyperparameters by mixer name; what is left out takes the mixer's default.
      parallel: how the mixers of a block that has several make one, see `models.parallel.Parallel`.
      moe: options of the channel mixer "moe", see `models.moe.MoE`.
      channel_mixer: of blocks that name none: "swiglu", "geglu", "mlp" (with GELU), "relu2" (an MLP with max(x, 0)^2), "moe",
        "none", or "auto": swiglu except beside mixers that replace it.
      expansion: hidden size of the channel mixer over the width (gated ones take 2/3 of it).
      channel_size: hidden size of the channel mixer itself, instead of `expansion`.
      channel_bias: whether the channel mixer's maps have biases.
      channel_scales: two factors in the channel mixer, of what the activation is of and of the output (Falcon-H1, arXiv
        2507.22448); () for none. Experts have none.
      norm: "rmsnorm", "rmsnorm1p" (weights stored as their difference from 1), "layernorm", "scalenorm" or "batchnorm".
      norm_eps: added to the norm's variance; by default the norm's own.
      final_norm_eps: the same of the last norm; by default `norm_eps`.
      norm_position: of blocks that name none, where a branch f has its norms: "pre", x + f(norm(x)); "post", norm(x + f(x));
        "sandwich", x + norm(f(norm(x))); "output", x + norm(f(x)); or "input", h + f(h) with h = norm(x) (MiniMax-01).
      branch_scale: factor of each residual branch (`residual_multiplier` of Granite 4).
      residual_scale: factor of what a branch is added to (alpha of MiniMax-01, arXiv 2501.08313).
      embedding_norm: whether the embedded tokens are normalised before the first block.
      embedding_scale: factor of the embedded tokens (width^0.5 in arXiv 1706.03762, section 3.4); real inputs have none.
      ngrams: the n of which the last n tokens have an embedding of their own, as in (2, 3, 4), added to the token's, see
        `models.ngram_embedding`; () for none.
      ngram_rows: rows of each of their tables.
      ngram_size: numbers of a row.
      position_embedding: "sinusoidal" (with a learned scale), "none", or "auto": sinusoidal if some mixer of the pattern
        does not know the order of tokens.
      pooling: what stands for a row: the "mean" of its tokens (padding left out), its "last" or its "first" token.
      loss: of tasks with real targets: "squared", "absolute", "laplace", "rle" or "rle_authors", see `models.heads`.
      tie_embeddings: whether the head is the transposed embedding.
      logit_scale: factor of the logits of classes. A tied table of deviation 0.02 starts them at 0.02 width^0.5, which a narrow
        model takes long to leave under AdamW.
      logit_cap: c of logits = c tanh(logits / c); 0 for none.
      base_width: width of the narrow model whose learning rate is to hold for this one: initial values, logits and updates follow
        the width as docs/scaling.md says (arXiv 2203.03466, 2310.17813); 0 for none.
      base_depth: number of blocks of that model: the residual branches have the factor (depth / base_depth)^-depth_alpha; 0 for
        none.
      depth_alpha: see `base_depth`: from 0.5 (arXiv 2310.02244) to 1 (2505.01618).
      dropout: rate on the residual branches.
      remat: what the backward pass computes again instead of keeping it: "none"; "elementwise", all but what primitives return
        and their loops leave (`ops.kept`), so that hardly a product or a recurrence is computed twice; "mixer", all within the
        mixers; "dots", all but the outputs of products with parameters; "offload", the same, with them in the host's memory
        meanwhile; or "full".
    """

    vocab_size: int | None
    targets: int
    channels: int | None = None
    head: str = "token"
    causal: bool = True
    length: int = 512
    width: int = 256
    depth: int = 6
    pattern: tuple[str, ...] = ("attention",)
    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()
    mixer: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    parallel: Mapping[str, Any] = dataclasses.field(default_factory=parallel_defaults)
    moe: Mapping[str, Any] = dataclasses.field(default_factory=moe_defaults)
    channel_mixer: str = "auto"
    expansion: float = 4.0
    channel_size: int | None = None
    channel_bias: bool = False
    channel_scales: tuple[float, ...] = ()
    norm: str = "rmsnorm"
    norm_eps: float | None = None
    final_norm_eps: float | None = None
    norm_position: str = "pre"
    branch_scale: float = 1.0
    residual_scale: float = 1.0
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    ngrams: tuple[int, ...] = ()
    ngram_rows: int = 131_072
    ngram_size: int = 32
    position_embedding: str = "auto"
    pooling: str = "mean"
    loss: str | None = None
    tie_embeddings: bool = True
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    base_width: int = 0
    base_depth: int = 0
    depth_alpha: float = 1.0
    dropout: float = 0.0
    remat: str = "none"

    def __post_init__(self):
        choices = {
            "channel_mixer": ("auto", *CHANNELS),
            "norm": tuple(NORMS),
            "norm_position": NORM_POSITIONS,
            "position_embedding": ("auto", "none", "sinusoidal"),
            "remat": tuple(REMAT),
            "head": ("token", "pooled", "pair"),
            "pooling": POOLINGS,
        }
        for key, known in choices.items():
            check_choice(f"model.{key}", getattr(self, key), known)
        if self.loss is not None:
            check_choice("model.loss", self.loss, LOSSES)
        sizes = ("vocab_size", "targets", "channels", "length", "width", "depth", "channel_size")
        for key in (*sizes, "ngram_rows", "ngram_size"):
            value = getattr(self, key)
            if value is not None and not value >= 1:
                raise UserError(f"model.{key} must be at least 1, got {value}")
        for key in ("expansion", "norm_eps", "final_norm_eps", "logit_scale", "branch_scale", "residual_scale"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"model.{key} must be more than 0 and finite, got {value}")
        # Of a file that has lists only.
        tupled = lambda options: {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        object.__setattr__(self, "mixer", {name: tupled(options) for name, options in self.mixer.items()})
        if len(self.channel_scales) not in (0, 2) or not all(map(math.isfinite, self.channel_scales)):
            raise UserError(
                f"model.channel_scales must be two finite numbers, or () for none, got {self.channel_scales}"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout must be at least 0 and less than 1, got {self.dropout}")
        if not 0 <= self.logit_cap < math.inf:
            raise UserError(f"model.logit_cap must be at least 0 (for none) and finite, got {self.logit_cap}")
        for key in ("base_width", "base_depth"):
            if getattr(self, key) < 0:
                raise UserError(f"model.{key} must be at least 0 (for none), got {getattr(self, key)}")
        if not 0.5 <= self.depth_alpha <= 1:
            raise UserError(f"model.depth_alpha must be from 0.5 to 1, got {self.depth_alpha}")
        if self.depth_alpha != 1 and not self.base_depth:
            raise UserError(f"model.depth_alpha={self.depth_alpha} acts only with model.base_depth: set that, too")
        if not math.isfinite(self.embedding_scale):
            raise UserError(f"model.embedding_scale must be finite, got {self.embedding_scale}")
        self._check_ngrams()
        if not self.pattern:
            raise UserError("model.pattern must be names of mixers, such as ('attention',); it is empty")
        for key in ("prefix", "pattern", "suffix"):
            if isinstance(getattr(self, key), str):
                raise UserError(
                    f"model.{key} must be names of mixers, such as ('attention',); got {getattr(self, key)!r}"
                )
            object.__setattr__(self, key, expand(getattr(self, key), f"model.{key}"))
            for text in getattr(self, key):
                for name in parse(text, f"model.{key}").mixers:
                    mixers.find(name)
        self._check_depth()
        self._check_base_depth()
        self._check_effects()
        for name in self.mixer:
            if name not in self.names:
                raise UserError(f"model.mixer.{name} is set, but model.pattern={self.pattern} does not use {name!r}")
        self._check_section("parallel", any(len(item.mixers) > 1 for item in self.items))
        self._check_section("moe", "moe" in (item.channel or self.channel_mixer for item in self.items))
        if self.tie_embeddings and self.targets != self.vocab_size:
            raise UserError(
                f"model.tie_embeddings=True needs as many targets ({self.targets}) as input ids ({self.vocab_size}); "
                "set it to False"
            )

    def _check_ngrams(self) -> None:
        if any(n < 2 for n in self.ngrams) or len(set(self.ngrams)) < len(self.ngrams):
            raise UserError(f"model.ngrams must be different numbers of tokens, each at least 2, got {self.ngrams}")
        if self.ngrams and self.channels is not None:
            raise UserError(
                f"model.ngrams={self.ngrams} are of tokens, and this task's inputs are numbers: set it to ()"
            )

    def _check_effects(self) -> None:
        dense = {item.channel or self.channel_mixer for item in self.items} - {"none", "moe"}
        logits = self.head != "pair" and self.loss is None
        leave = "; leave it at its default"
        for used, mend, keys in (
            (self.ngrams, "set model.ngrams, too", ("ngram_rows", "ngram_size")),
            (
                dense,
                "no block has a dense channel mixer (experts have model.moe.bias)" + leave,
                ("channel_bias", "channel_scales"),
            ),
            (logits, "a task of pairs or of real targets has no such logits" + leave, ("logit_scale", "logit_cap")),
        ):
            for key in keys:
                if not used and getattr(self, key) != getattr(type(self), key):
                    raise UserError(f"model.{key}={getattr(self, key)} has no effect: {mend}")

    def _check_depth(self) -> None:
        outside, length = len(self.prefix) + len(self.suffix), len(self.pattern)
        if self.depth > outside and (self.depth - outside) % length == 0:
            return
        repeats = max(1, (self.depth - outside) // length)
        fit = [outside + n * length for n in (repeats, repeats + 1)]
        if outside:
            what = f"{len(self.prefix)} of the prefix, {len(self.suffix)} of the suffix, and a multiple of the pattern's {length}"
        else:
            what = f"a multiple of the pattern's length {length}"
        raise UserError(
            f"model.depth={self.depth} must be {what}: {fit[0]} or {fit[1]} would fit; or give the blocks that are left "
            "over as model.prefix or model.suffix"
        )

    def _check_section(self, key: str, used: bool) -> None:
        """Fills in the defaults of one of the `SECTIONS`, which must be left at them where nothing uses it."""
        default = SECTIONS[key][0]().to_dict()
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in getattr(self, key).items()}
        for name in given:
            if name not in default:
                raise UserError(f"nobody reads model.{key}.{name}; {near(name, default)}")
        signatures.check(SECTIONS[key][1].__init__, given, lambda name: f"model.{key}.{name}")
        for name, value in given.items():
            if not used and value != default[name]:
                raise UserError(
                    f"model.{key}.{name}={value!r} has no effect: no block of model.pattern={self.pattern} uses it"
                )
        object.__setattr__(self, key, default | given)

    def _check_base_depth(self) -> None:
        if self.base_depth and any((item.norm_position or self.norm_position) != "pre" for item in self.items):
            raise UserError(
                "model.base_depth is for branches of a stream that no norm interrupts: set model.norm_position='pre'"
            )
        outside, length = len(self.prefix) + len(self.suffix), len(self.pattern)
        if self.base_depth and (self.base_depth <= outside or (self.base_depth - outside) % length):
            more = f", beside the {outside} blocks of prefix and suffix" if outside else ""
            raise UserError(
                f"model.base_depth={self.base_depth} must be a multiple of the pattern's length {length}{more}"
            )

    @property
    def repeats(self) -> int:
        """How often the pattern is repeated between prefix and suffix."""
        return (self.depth - len(self.prefix) - len(self.suffix)) // len(self.pattern)

    @functools.cached_property
    def items(self) -> tuple[Item, ...]:
        """All blocks, in the order of the layers."""
        return tuple(map(parse, (*self.prefix, *self.repeats * self.pattern, *self.suffix)))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all mixers, each once, those of the pattern first."""
        return mixers_of((*self.pattern, *self.prefix, *self.suffix))

    def layers(self, name: str) -> int:
        """The number of blocks with this mixer."""
        return sum(name in item.mixers for item in self.items)

    def place(self, layer: int) -> tuple[str, tuple[int, ...]]:
        """Where the parameters of a layer are: the path of its block below "stack", and the index into stacked parameters."""
        layer -= len(self.prefix)
        if layer < 0:
            return f"prefix.blocks.{layer + len(self.prefix)}", ()
        if layer >= self.repeats * len(self.pattern):
            return f"suffix.blocks.{layer - self.repeats * len(self.pattern)}", ()
        repeat, place = divmod(layer, len(self.pattern))
        return f"stacked.blocks.{place}", (repeat,)

    def mixer_options(self, name: str) -> dict[str, Any]:
        """What `mixers.create` is told of a mixer of the pattern: its surroundings and the hyperparameters that are given."""
        return {
            "causal": self.causal,
            "depth": self.base_depth or self.depth,  # which initial values follow
            "layers": self.layers(name),
            "all_layers": self.depth,
            "length": self.length,
            "base_width": self.base_width or self.width,
            **self.mixer.get(name, {}),
        }

    @property
    def transfers(self) -> bool:
        """Whether the model is scaled from a base, so that its hyperparameters hold."""
        return bool(self.base_width or self.base_depth)

    @property
    def width_ratio(self) -> float:
        """The width over the base's; 1 without a base."""
        return self.width / self.base_width if self.base_width else 1.0

    @property
    def depth_ratio(self) -> float:
        """The depth over the base's; 1 without a base."""
        return self.depth / self.base_depth if self.base_depth else 1.0

    @property
    def gradient_ratio(self) -> float:
        """How many times smaller gradients are than the base's: they come through the factors of the logits and branches."""
        return self.width_ratio * self.depth_ratio**self.depth_alpha

    @property
    def logit_factor(self) -> float:
        """What the logits of classes are multiplied by. A sum over `width` aligned products grows with the width."""
        return self.logit_scale / self.width_ratio

    @property
    def branch_factor(self) -> float:
        """What the output of a residual branch is multiplied by."""
        return self.branch_scale * self.depth_ratio**-self.depth_alpha

    @functools.cached_property
    def base(self) -> "ModelConfig":
        """The model that this one is scaled from, with `base_width` and `base_depth`; itself where they are 0.

        Its heads are of the same size where that is a whole number of heads, and else as many; its channel mixer's hidden size is
        the same multiple of the width. Hyperparameters of mixers that are None by default, and have the value that stands for it
        at this width, have that of the base's width.
        """
        width = self.base_width or self.width
        free = {name: [key for key, value in mixers.defaults(name).items() if value is None] for name in self.names}
        unset = {name: {**self.mixer.get(name, {}), **dict.fromkeys(keys)} for name, keys in free.items()}
        derived = dataclasses.replace(self, mixer=unset).sketches

        def at_base(name: str, key: str, value: Any) -> Any:
            if key in free[name] and value == mixers.as_used(derived[name], unset[name])[key]:
                return None
            if key.endswith("heads") and isinstance(value, int) and value * width % self.width == 0:
                return value * width // self.width
            return value

        given = {name: mixers.defaults(name).to_dict() | dict(self.mixer.get(name, {})) for name in free}
        scaled = lambda size: size and max(1, round(size * width / self.width))
        return dataclasses.replace(
            self,
            width=width,
            depth=self.base_depth or self.depth,
            mixer={name: {key: at_base(name, key, value) for key, value in own.items()} for name, own in given.items()},
            channel_size=scaled(self.channel_size),
            moe=self.moe | {key: scaled(self.moe[key]) for key in ("hidden", "shared_hidden")},
            base_width=0,
            base_depth=0,
            depth_alpha=1.0,
        )

    @functools.cached_property
    def sketches(self) -> dict[str, mixers.Mixer | mixers.Bidirectional]:
        """The mixers of the pattern by name, built as the model builds them but without values.

        What a mixer can do may depend on its form and its hyperparameters, so these are asked and not its class.
        """
        return {name: mixers.sketch(name, self.width, alone=False, **self.mixer_options(name)) for name in self.names}

    @property
    def random(self) -> bool:
        """Whether training differs from evaluation, and so needs a key."""
        experts = any(self.channel_mixer_of(item) == "moe" for item in self.items)
        return self.dropout > 0 or self.norm == "batchnorm" or experts or any(m.random for m in self.sketches.values())

    @property
    def streams(self) -> bool:
        """Whether the model takes a carry."""
        return all(mixer.streams for mixer in self.sketches.values())

    @property
    def sinusoidal(self) -> bool:
        """Whether the model adds a position embedding to its inputs."""
        if self.position_embedding == "auto":
            aware = lambda item: any(self.sketches[name].position_aware for name in item.mixers)
            return not all(map(aware, self.items))
        return self.position_embedding == "sinusoidal"

    def channel_mixer_of(self, item: Item) -> str:
        """The kind of channel mixer that stands behind the mixers of a block; "none" for none."""
        kind = self.channel_mixer if item.channel is None else item.channel
        if kind != "auto":
            return kind
        return "none" if all(self.sketches[name].replaces_channel_mixer for name in item.mixers) else "swiglu"

    def make_mixer(self, item: Item, layer: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The mixer of a block; `layer` is its place among those of its name in the model, and may be traced."""

        def make(name, layer):
            return mixers.create(name, self.width, rngs=rngs, layer=layer, alone=False, **self.mixer_options(name))

        if len(item.mixers) == 1:
            return make(item.mixers[0], layer)
        return Parallel({name: make(name, layer[name]) for name in item.mixers}, self.width, rngs=rngs, **self.parallel)

    def make_norm(self, rngs: nnx.Rngs, final: bool = False) -> nnx.Module:
        """A norm of the residual stream; `final` for the one before the head."""
        eps = self.final_norm_eps if final and self.final_norm_eps is not None else self.norm_eps
        return NORMS[self.norm](self.width, rngs=rngs, **({} if eps is None else {"eps": eps}))

    def make_channel_mixer(self, kind: str, rngs: nnx.Rngs) -> nnx.Module | None:
        """A channel mixer of a kind of `models.pattern.CHANNELS`; None for "none"."""
        if kind == "none":
            return None
        if kind == "moe":
            depth = self.base_depth or self.depth
            return MoE(self.width, rngs=rngs, depth=depth, expansion=self.expansion, **self.moe)
        return CHANNEL_MIXERS[kind](
            self.width,
            rngs=rngs,
            expansion=self.expansion,
            hidden=self.channel_size,
            bias=self.channel_bias,
            scales=self.channel_scales,
            depth=self.base_depth or self.depth,
        )

    def as_used(self) -> "ModelConfig":
        """The configuration of the same model with every hyperparameter filled in.

        What was None or "auto" has the value that it stands for, and `mixer` holds every hyperparameter of every mixer. Still
        None are `channel_size` without a channel mixer or where they differ in it, and what means something as None (`loss`,
        some mixers' options); still "auto" is `channel_mixer` where blocks differ in it.

        Raises:
          UserError: if the model cannot be built.
        """
        if self.transfers:
            with about(f"the model at model.base_width={self.base.width}, model.base_depth={self.base.depth}"):
                self.base.as_used()
        kinds = {self.channel_mixer_of(item) for item in self.items}
        behind = sorted(kinds - {"none"})
        make = lambda: (self.make_norm(nnx.Rngs(0)), [self.make_channel_mixer(kind, nnx.Rngs(0)) for kind in behind])
        norm, channel_mixers = without_values(make)
        dense = [made for kind, made in zip(behind, channel_mixers, strict=True) if kind != "moe"]
        sizes = {made.hidden for made in dense}
        experts = [made.hidden for kind, made in zip(behind, channel_mixers, strict=True) if kind == "moe"]
        return dataclasses.replace(
            self,
            mixer={name: mixers.as_used(mixer, self.mixer.get(name, {})) for name, mixer in self.sketches.items()},
            channel_mixer=kinds.pop() if len(kinds) == 1 else self.channel_mixer,
            moe=self.moe | ({"hidden": experts[0]} if experts else {}),
            channel_size=sizes.pop() if len(sizes) == 1 else self.channel_size if sizes else None,
            norm_eps=norm.eps,
            final_norm_eps=norm.eps if self.final_norm_eps is None else self.final_norm_eps,
            position_embedding="sinusoidal" if self.sinusoidal else "none",
        )

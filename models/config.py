"""What a model is made of, and how it is checked."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from flax import nnx

from common.errors import UserError, check_choice
from models import mixer as mixers
from models.channel_mixers import CHANNEL_MIXERS
from models.checks import about
from models.heads import LOSSES, POOLINGS
from models.norms import NORMS
from models.stack import REMAT


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
      depth: number of blocks; a multiple of the pattern's length.
      pattern: names of mixers, repeated over the depth.
      mixer: hyperparameters by mixer name; what is left out takes the mixer's default.
      channel_mixer: "swiglu", "geglu", "mlp", "none", or "auto": swiglu except beside mixers that replace it.
      expansion: hidden size of the channel mixer over the width (gated ones take 2/3 of it).
      channel_size: hidden size of the channel mixer itself, instead of `expansion`.
      channel_bias: whether the channel mixer's maps have biases.
      norm: "rmsnorm", "rmsnorm1p" (weights stored as their difference from 1), "layernorm", "scalenorm" or "batchnorm".
      norm_eps: added to the norm's variance; by default the norm's own.
      final_norm_eps: the same of the last norm; by default `norm_eps`.
      norm_position: "pre" or "post".
      embedding_norm: whether the embedded tokens are normalised before the first block.
      embedding_scale: factor of the embedded tokens (width^0.5 in arXiv 1706.03762, section 3.4); real inputs have none.
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
      remat: what the backward pass computes again instead of keeping it: "none"; "mixer", all within the mixers; "dots", all but
        the outputs of products with parameters; "offload", the same, with them in the host's memory meanwhile; or "full".
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
    mixer: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    channel_mixer: str = "auto"
    expansion: float = 4.0
    channel_size: int | None = None
    channel_bias: bool = False
    norm: str = "rmsnorm"
    norm_eps: float | None = None
    final_norm_eps: float | None = None
    norm_position: str = "pre"
    embedding_norm: bool = False
    embedding_scale: float = 1.0
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
            "channel_mixer": ("auto", "none", *CHANNEL_MIXERS),
            "norm": tuple(NORMS),
            "norm_position": ("pre", "post"),
            "position_embedding": ("auto", "none", "sinusoidal"),
            "remat": tuple(REMAT),
            "head": ("token", "pooled", "pair"),
            "pooling": POOLINGS,
        }
        for key, known in choices.items():
            check_choice(f"model.{key}", getattr(self, key), known)
        if self.loss is not None:
            check_choice("model.loss", self.loss, LOSSES)
        for key in ("vocab_size", "targets", "channels", "length", "width", "depth", "channel_size"):
            value = getattr(self, key)
            if value is not None and not value >= 1:
                raise UserError(f"model.{key} must be at least 1, got {value}")
        for key in ("expansion", "norm_eps", "final_norm_eps", "logit_scale"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"model.{key} must be more than 0 and finite, got {value}")
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
        if self.base_depth and self.norm_position != "pre":
            raise UserError(
                "model.base_depth is for branches of a stream that no norm interrupts: set model.norm_position='pre'"
            )
        if self.base_depth % len(self.pattern or "-"):
            raise UserError(
                f"model.base_depth={self.base_depth} must be a multiple of the pattern's length {len(self.pattern)}"
            )
        if not math.isfinite(self.embedding_scale):
            raise UserError(f"model.embedding_scale must be finite, got {self.embedding_scale}")
        if isinstance(self.pattern, str) or not self.pattern:
            raise UserError(f"model.pattern must be names of mixers, such as ('attention',); got {self.pattern!r}")
        for name in self.pattern:
            mixers.find(name)
        if self.depth % len(self.pattern):
            raise UserError(f"model.depth={self.depth} must be a multiple of the pattern's length {len(self.pattern)}")
        for name in self.mixer:
            if name not in self.pattern:
                raise UserError(f"model.mixer.{name} is set, but model.pattern={self.pattern} does not use {name!r}")
        if self.tie_embeddings and self.targets != self.vocab_size:
            raise UserError(
                f"model.tie_embeddings=True needs as many targets ({self.targets}) as input ids ({self.vocab_size}); "
                "set it to False"
            )

    def layers(self, name: str) -> int:
        """The number of blocks with this mixer."""
        return self.depth // len(self.pattern) * self.pattern.count(name)

    def mixer_options(self, name: str) -> dict[str, Any]:
        """What `mixers.create` is told of a mixer of the pattern: its surroundings and the hyperparameters that are given."""
        return {
            "causal": self.causal,
            "depth": self.base_depth or self.depth,  # which initial values follow
            "layers": self.layers(name),
            "length": self.length,
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
    def branch_scale(self) -> float:
        """What the output of a residual branch is multiplied by."""
        return self.depth_ratio**-self.depth_alpha

    @functools.cached_property
    def base(self) -> "ModelConfig":
        """The model that this one is scaled from, with `base_width` and `base_depth`; itself where they are 0.

        Its heads are of the same size where that is a whole number of heads, and else as many; its channel mixer's hidden size is
        the same multiple of the width. Hyperparameters of mixers that are None by default, and have the value that stands for it
        at this width, have that of the base's width.
        """
        width = self.base_width or self.width
        free = {name: [key for key, value in mixers.defaults(name).items() if value is None] for name in self.pattern}
        unset = {name: {**self.mixer.get(name, {}), **dict.fromkeys(keys)} for name, keys in free.items()}
        derived = dataclasses.replace(self, mixer=unset).sketches

        def at_base(name: str, key: str, value: Any) -> Any:
            if key in free[name] and value == mixers.as_used(derived[name], unset[name])[key]:
                return None
            if key.endswith("heads") and isinstance(value, int) and value * width % self.width == 0:
                return value * width // self.width
            return value

        given = {name: mixers.defaults(name).to_dict() | dict(self.mixer.get(name, {})) for name in free}
        return dataclasses.replace(
            self,
            width=width,
            depth=self.base_depth or self.depth,
            mixer={name: {key: at_base(name, key, value) for key, value in own.items()} for name, own in given.items()},
            channel_size=self.channel_size and max(1, round(self.channel_size * width / self.width)),
            base_width=0,
            base_depth=0,
            depth_alpha=1.0,
        )

    @functools.cached_property
    def sketches(self) -> dict[str, mixers.Mixer | mixers.Bidirectional]:
        """The mixers of the pattern by name, built as the model builds them but without values.

        What a mixer can do may depend on its form and its hyperparameters, so these are asked and not its class.
        """
        return {
            name: mixers.sketch(name, self.width, alone=False, **self.mixer_options(name))
            for name in dict.fromkeys(self.pattern)
        }

    @property
    def random(self) -> bool:
        """Whether training differs from evaluation, and so needs a key."""
        return self.dropout > 0 or self.norm == "batchnorm" or any(m.random for m in self.sketches.values())

    @property
    def streams(self) -> bool:
        """Whether the model takes a carry."""
        return all(mixer.streams for mixer in self.sketches.values())

    @property
    def sinusoidal(self) -> bool:
        """Whether the model adds a position embedding to its inputs."""
        if self.position_embedding == "auto":
            return not all(mixer.position_aware for mixer in self.sketches.values())
        return self.position_embedding == "sinusoidal"

    def channel_mixer_of(self, name: str) -> str:
        """The kind of channel mixer that stands behind a mixer of the pattern; "none" for none."""
        if self.channel_mixer != "auto":
            return self.channel_mixer
        return "none" if self.sketches[name].replaces_channel_mixer else "swiglu"

    def make_norm(self, rngs: nnx.Rngs, final: bool = False) -> nnx.Module:
        """A norm of the residual stream; `final` for the one before the head."""
        eps = self.final_norm_eps if final and self.final_norm_eps is not None else self.norm_eps
        return NORMS[self.norm](self.width, rngs=rngs, **({} if eps is None else {"eps": eps}))

    def make_channel_mixer(self, kind: str, rngs: nnx.Rngs) -> nnx.Module | None:
        """A channel mixer of a kind of `CHANNEL_MIXERS`; None for "none"."""
        if kind == "none":
            return None
        return CHANNEL_MIXERS[kind](
            self.width,
            rngs=rngs,
            expansion=self.expansion,
            hidden=self.channel_size,
            bias=self.channel_bias,
            depth=self.base_depth or self.depth,
        )

    def as_used(self) -> "ModelConfig":
        """The configuration of the same model with every hyperparameter filled in.

        What was None or "auto" has the value that it stands for, and `mixer` holds every hyperparameter of every mixer. Still
        None are `channel_size` without a channel mixer, and what means something as None (`loss`, some mixers' options);
        still "auto" is `channel_mixer` where only some mixers of the pattern replace it.

        Raises:
          UserError: if the model cannot be built.
        """
        if self.transfers:
            with about(f"the model at model.base_width={self.base.width}, model.base_depth={self.base.depth}"):
                self.base.as_used()
        kinds = {self.channel_mixer_of(name) for name in self.pattern}
        behind = sorted(kinds - {"none"})
        make = lambda: (self.make_norm(nnx.Rngs(0)), [self.make_channel_mixer(kind, nnx.Rngs(0)) for kind in behind])
        norm, channel_mixers = nnx.eval_shape(make)
        return dataclasses.replace(
            self,
            mixer={name: mixers.as_used(mixer, self.mixer.get(name, {})) for name, mixer in self.sketches.items()},
            channel_mixer=kinds.pop() if len(kinds) == 1 else self.channel_mixer,
            channel_size=channel_mixers[0].hidden if channel_mixers else None,
            norm_eps=norm.eps,
            final_norm_eps=norm.eps if self.final_norm_eps is None else self.final_norm_eps,
            position_embedding="sinusoidal" if self.sinusoidal else "none",
        )

"""The sequence model: embedding, stack, norm, head."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from common.errors import UserError
from models import mixer as mixers
from models.channel_mixers import CHANNEL_MIXERS
from models.heads import LOSSES, POOLINGS, PairHead, Regression, pool
from models.norms import NORMS, normalize
from models.params import constant, dense, normal, param
from models.partitioning import constrain
from models.stack import REMAT, Stack


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything about a model but its mixers' own hyperparameters.

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
      norm: "rmsnorm", "rmsnorm1p" (weights stored as their difference from 1), "layernorm" or "scalenorm".
      norm_eps: added to the norm's variance; by default the norm's own.
      norm_position: "pre" or "post".
      embedding_norm: whether the embedded tokens are normalised before the first block.
      embedding_scale: factor of the embedded tokens (width^0.5 in arXiv 1706.03762, section 3.4); real inputs have none.
      position_embedding: "sinusoidal" (with a learned scale), "none", or "auto": sinusoidal if some mixer of the pattern
        does not know the order of tokens.
      pooling: what stands for a row: the "mean" of its tokens (padding left out), its "last" or its "first" token.
      loss: of tasks with real targets: "squared", "absolute", "laplace" or "rle", see `models.heads`.
      tie_embeddings: whether the head is the transposed embedding.
      logit_cap: c of logits = c tanh(logits / c); 0 for none.
      dropout: rate on the residual branches.
      remat: what the backward pass recomputes: "none", "dots" (all but matmul outputs) or "full".
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
    norm_position: str = "pre"
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    position_embedding: str = "auto"
    pooling: str = "mean"
    loss: str | None = None
    tie_embeddings: bool = True
    logit_cap: float = 0.0
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
            "loss": (None, *LOSSES),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise UserError(
                    f"model.{key} must be one of {', '.join(map(str, allowed))}; got {getattr(self, key)!r}"
                )
        for name in self.pattern:
            mixers.find(name)
        if not self.pattern or self.depth % len(self.pattern):
            raise UserError(f"model.depth={self.depth} must be a multiple of the pattern's length {len(self.pattern)}")
        for name in self.mixer:
            if name not in self.pattern:
                raise UserError(f"model.mixer.{name} is set, but model.pattern={self.pattern} does not use {name!r}")
        if self.tie_embeddings and self.targets != self.vocab_size:
            raise UserError(
                f"model.tie_embeddings=True needs as many targets ({self.targets}) as input ids ({self.vocab_size}); "
                "set it to False"
            )

    def make_norm(self, rngs: nnx.Rngs) -> nnx.Module:
        """A norm of the residual stream."""
        return NORMS[self.norm](self.width, rngs=rngs, **({} if self.norm_eps is None else {"eps": self.norm_eps}))

    @property
    def random(self) -> bool:
        """Whether training differs from evaluation, and so needs a key."""
        return self.dropout > 0 or self.norm == "batchnorm" or any(mixers.find(n).random for n in self.pattern)

    def layers(self, name: str) -> int:
        """The number of blocks with this mixer."""
        return self.depth // len(self.pattern) * self.pattern.count(name)


def sinusoids(positions: Int[Array, "B T"], width: int) -> Float[Array, "B T D"]:
    """Sines and cosines of geometrically spaced frequencies (arXiv 1706.03762, section 3.5), sines first."""
    half = (width + 1) // 2
    frequency = jnp.exp(-math.log(10000.0) * jnp.arange(half) / half)
    angle = positions[..., None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)[..., :width]


class SequenceModel(nnx.Module):
    """head(norm(stack(embedding(inputs))))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        sinusoidal = config.position_embedding == "sinusoidal" or (
            config.position_embedding == "auto" and not all(mixers.find(name).position_aware for name in config.pattern)
        )
        if config.channels is None:
            self.embedding = param(rngs, normal(0.02), (config.vocab_size, config.width), ("vocab", "embed"))
        else:
            self.embedding = dense(rngs, (config.channels, config.width), (None, "embed"))
        self.real_inputs = config.channels is not None
        self.position_scale = param(rngs, constant(config.width**-0.5), (), ()) if sinusoidal else None
        self.embedding_norm = config.make_norm(rngs) if config.embedding_norm else None
        self.embedding_scale = config.embedding_scale
        self.stack = Stack(config, rngs=rngs)
        self.norm = config.make_norm(rngs)
        self.kind, self.pooling = config.head, config.pooling
        self.logit_cap = config.logit_cap
        real, pair = config.loss is not None, config.head == "pair"
        untied = not (real or pair or config.tie_embeddings)
        self.regression = Regression(config.width, config.targets, config.loss, rngs=rngs) if real else None
        self.pair = PairHead(config.width, config.targets, rngs=rngs) if pair and not real else None
        self.head = dense(rngs, (config.width, config.targets), ("embed", "vocab")) if untied else None

    def __call__(
        self,
        inputs: Int[Array, "B T"] | Float[Array, "B T C"] | Int[Array, "B 2 T"],
        carry: Any = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        key: jax.Array | None = None,
        targets: Float[Array, "B ..."] | None = None,
    ) -> tuple[Any, Any]:
        """Scores the next token (or the token's label) at every position, or each row, or pair of rows.

        Args:
          inputs: [batch, length] ids; [batch, length, channels] numbers; for pairs [batch, 2, length] ids (then segment_ids and
            positions likewise).
          carry: None in training, else from `initial_carry` or the previous call. For heads on tokens.
          segment_ids, positions: as in `Mixer.__call__`.
          key: source of random numbers in training (dropout, mixers that are `random`); None in evaluation.
          targets: only of models with a `loss`: what to score instead of predicting.

        Returns:
          float32 logits [batch, length, targets] or [batch, targets], and the carry for the next piece (None if `carry` is
          None). Models with a `loss` return predictions in place of logits; given targets, a pair (predictions, loss [batch,
          ...]).
        """
        rows = inputs.shape[0]
        if self.kind == "pair":  # both rows of a pair go through one model
            pack = lambda a: None if a is None else a.reshape(2 * rows, *a.shape[2:])
            inputs, segment_ids, positions = pack(inputs), pack(segment_ids), pack(positions)
        x, carry = self.encode(inputs, carry, segment_ids=segment_ids, positions=positions, key=key)
        if self.kind != "token":
            x = pool(x, segment_ids, self.pooling)
        if self.regression is not None:
            return self.regression(x, targets), carry
        if self.pair is not None:
            return self.pair(x.reshape(rows, 2, -1)), carry
        head = self.embedding[...].T if self.head is None else self.head[...]
        logits = jnp.einsum("...d,dv->...v", x, head, preferred_element_type=jnp.float32)
        if self.logit_cap:
            logits = self.logit_cap * jnp.tanh(logits / self.logit_cap)
        return constrain(logits, "batch", *("length",) * (self.kind == "token"), "vocab"), carry

    def encode(self, inputs, carry=None, *, segment_ids=None, positions=None, key=None):
        """What the head reads: the normalised output of the stack, [batch, length, width], and the carry; see `__call__`."""
        place, _, positions = mixers.locate(inputs.shape[:2], carry, segment_ids, positions)
        if self.real_inputs:
            x = inputs.astype(self.embedding.dtype) @ self.embedding[...]
        else:
            x = self.embedding_scale * constrain(self.embedding[...], "vocab", "activation")[inputs]
        if self.position_scale is not None:
            x = x + (self.position_scale[...] * sinusoids(positions, x.shape[-1])).astype(x.dtype)
        apply = lambda norm, x: normalize(norm, x, training=key is not None, segment_ids=segment_ids)
        if self.embedding_norm is not None:
            x = apply(self.embedding_norm, x)
        x = constrain(x, "batch", "length", "activation")
        x, stack_carry = self.stack(
            x,
            None if carry is None else carry["stack"],
            segment_ids=segment_ids,
            positions=positions,
            key=key,
        )
        return apply(self.norm, x), (None if carry is None else {**place, "stack": stack_carry})

    def initial_carry(self, batch: int, capacity: int) -> Any:
        """The carry before the first token; `capacity` is the number of tokens that growing carries must hold."""
        return {**mixers.origin(batch), "stack": self.stack.initial_carry(batch, capacity)}

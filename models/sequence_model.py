"""The sequence model: embedding, stack, norm, head."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models import mixer as mixers
from models.config import ModelConfig
from models.heads import PairHead, Regression, pool
from models.ngram_embedding import NGramEmbedding
from models.norms import Statistics, normalize
from models.params import constant, dense, normal, param
from models.partitioning import constrain
from models.stack import Stack
from ops.projection import project


def sinusoids(positions: Int[Array, "B T"], width: int) -> Float[Array, "B T D"]:
    """Sines and cosines of geometrically spaced frequencies (arXiv 1706.03762, section 3.5), sines first."""
    half = (width + 1) // 2
    frequency = jnp.exp(-math.log(10000.0) * jnp.arange(half) / half)
    angle = positions[..., None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)[..., :width]


class SequenceModel(nnx.Module):
    """head(norm(stack(embedding(inputs))))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        if config.channels is None:
            self.embedding = param(rngs, normal(0.02), (config.vocab_size, config.width), ("vocab", "embed"))
        else:
            self.embedding = dense(rngs, (config.channels, config.width), (None, "embed"))
        self.real_inputs = config.channels is not None
        tables = config.ngrams, config.ngram_rows, config.ngram_size
        self.ngrams = NGramEmbedding(*tables, config.width, rngs=rngs) if config.ngrams else None
        # Scaled from a base, positions keep their size beside embedded tokens, whose size is the same at every width.
        narrow = config.base_width or config.width
        self.position_scale = param(rngs, constant(narrow**-0.5), (), ()) if config.sinusoidal else None
        self.embedding_norm = config.make_norm(rngs) if config.embedding_norm else None
        self.embedding_scale = config.embedding_scale
        self.stack = Stack(config, rngs=rngs)
        self.norm = config.make_norm(rngs, final=True)
        self.kind, self.pooling = config.head, config.pooling
        self.logit_scale, self.logit_cap = config.logit_factor, config.logit_cap
        real, pair = config.loss is not None, config.head == "pair"
        untied = not (real or pair or config.tie_embeddings)
        self.regression = Regression(config.width, config.targets, config.loss, rngs=rngs) if real else None
        self.pair = PairHead(config.width, config.targets, rngs=rngs) if pair and not real else None
        # Scaled from a base, the head has the base's deviation: what is left to 1 / width is in the factor of the logits.
        gain = math.sqrt(config.width / narrow)
        self.head = dense(rngs, (config.width, config.targets), ("embed", "vocab"), gain=gain) if untied else None

    def __call__(
        self,
        inputs: Int[Array, "B T"] | Float[Array, "B T C"] | Int[Array, "B 2 T"],
        carry: Any = None,
        *,
        segment_ids: Int[Array, "B T"] | Int[Array, "B 2 T"] | None = None,
        positions: Int[Array, "B T"] | Int[Array, "B 2 T"] | None = None,
        key: jax.Array | None = None,
        targets: Float[Array, "B ..."] | None = None,
        reduce: Callable[[Callable, Float[Array, "B T D"]], Any] | None = None,
        places: Int[Array, "B T tables"] | Int[Array, "B 2 T tables"] | None = None,
    ) -> tuple[Any, Any] | tuple[Any, Any, Statistics, dict[str, Float[Array, "L"]]]:
        """Scores the next token (or the token's label) at every position, or each row, or pair of rows.

        Args:
          inputs: [batch, length] ids; [batch, length, channels] numbers; for pairs [batch, 2, length] ids (then segment_ids and
            positions likewise).
          carry: None in training, else from `initial_carry` or the previous call. For heads on tokens.
          segment_ids, positions: as in `Mixer.__call__`.
          key: source of random numbers in training (dropout, mixers that are `random`); None in evaluation.
          targets: only of models with a `loss`: what to score instead of predicting.
          reduce: only of models with a head on tokens and without a `loss`: called as (head, x) with what the head reads [batch,
            length, width], and the head, which makes logits of any piece of it. Its result is returned in place of logits.
          places: where in the tables of n-grams the rows of `rows_read` are; None where the tables have all of their rows.

        Returns:
          float32 logits [batch, length, targets] or [batch, targets], and the carry for the next piece (None if `carry` is
          None). Models with a `loss` return predictions in place of logits; given targets, a pair (predictions, loss [batch,
          ...]). In training (with a key) thirdly what norms and experts saw of the batch, for `models.norms.follow`, and
          `models.mixer.Scalars`, with a number for each layer that has such a one.
        """
        rows = inputs.shape[0]
        if self.kind == "pair":  # both rows of a pair go through one model
            pack = lambda a: None if a is None else a.reshape(2 * rows, *a.shape[2:])
            inputs, segment_ids, positions, places = map(pack, (inputs, segment_ids, positions, places))
        about = {"segment_ids": segment_ids, "positions": positions, "places": places}
        x, carry, *seen = self.encode(inputs, carry, **about, key=key)
        result = self._score(x, segment_ids, targets) if reduce is None else reduce(self._logits, x)
        return (result, carry) if key is None else (result, carry, *seen)

    def _score(self, x, segment_ids, targets):
        if self.kind != "token":
            x = pool(x, segment_ids, self.pooling)
        if self.regression is not None:
            return self.regression(x, targets)
        if self.pair is not None:
            return self.pair(x.reshape(-1, 2, x.shape[-1]))
        return self._logits(x)

    def _logits(self, x):
        head = self.embedding[...].T if self.head is None else self.head[...]
        logits = project(x, head, dtype=jnp.float32)
        if self.logit_scale != 1:
            logits = self.logit_scale * logits
        if self.logit_cap:
            logits = self.logit_cap * jnp.tanh(logits / self.logit_cap)
        return constrain(logits, "batch", *("length",) * (self.kind == "token"), "vocab")

    def encode(
        self,
        inputs: Int[Array, "B T"] | Float[Array, "B T C"],
        carry: Any = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        places: Int[Array, "B T tables"] | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Any, Statistics, dict[str, Float[Array, "L"]]]:
        """What the head reads, and what goes beside it; for the arguments see `__call__`.

        Returns:
          the normalised output of the stack, the carry, and in training what the model saw of the batch, as `__call__` returns.
        """
        statistics = {}
        place, runs, positions = mixers.locate(inputs.shape[:2], carry, segment_ids, positions)
        if self.real_inputs:
            x = project(inputs.astype(self.embedding.dtype), self.embedding[...])
        else:
            x = constrain(self.embedding[...], "vocab", "activation")[inputs]
            if self.ngrams is not None:
                embedded, past = self.ngrams(inputs, _past(carry, runs), segment_ids, places)
                x = x + embedded
                place |= {"ngrams": past}
            x = self.embedding_scale * x
        if self.position_scale is not None:
            x = x + (self.position_scale[...] * sinusoids(positions, x.shape[-1])).astype(x.dtype)
        apply = lambda norm, x: normalize(norm, x, training=key is not None, segment_ids=segment_ids)
        if self.embedding_norm is not None:
            x, statistics["embedding_norm"] = apply(self.embedding_norm, x)
        x = constrain(x, "batch", "length", "activation")
        x, stack_carry, statistics["stack"], scalars = self.stack(
            x,
            None if carry is None else carry["stack"],
            segment_ids=segment_ids,
            positions=positions,
            key=key,
        )
        x, statistics["norm"] = apply(self.norm, x)
        return x, (None if carry is None else {**place, "stack": stack_carry}), statistics, scalars

    def rows_read(
        self, inputs: Int[Array, "B *rows T"], carry: Any = None, segment_ids: Int[Array, "B *rows T"] | None = None
    ) -> Int[Array, "B *rows T tables"]:
        """The rows that are read of the tables of n-grams; for the arguments see `__call__`."""
        ids, segment_ids = (a if a is None else a.reshape(-1, a.shape[-1]) for a in (inputs, segment_ids))
        _, runs, _ = mixers.locate(ids.shape, carry, segment_ids, None)
        rows, _ = self.ngrams.rows_read(ids, _past(carry, runs), segment_ids)
        return rows.reshape(*inputs.shape, -1)

    def initial_carry(self, batch: int, capacity: int) -> Any:
        """The carry before the first token; `capacity` is the number of tokens that growing carries must hold."""
        past = {} if self.ngrams is None else {"ngrams": self.ngrams.initial_state(batch)}
        return {**mixers.origin(batch), **past, "stack": self.stack.initial_carry(batch, capacity)}


def _past(carry: Any, runs: Int[Array, "B T"]) -> Int[Array, "B n"] | None:
    """The tokens before a piece, for n-grams; of another document nothing is left."""
    return None if carry is None else jnp.where((runs[:, 0] == carry["run"])[:, None], carry["ngrams"], 0)

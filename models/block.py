"""The residual block: a token mixer, then (where the mixer's paper has one) a channel mixer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models import mixer as mixers
from models.mixer import Context
from models.norms import Statistics, normalize
from models.partitioning import constrain


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + channel_mixer(norm(x)); with `norm_position="post"`, norm(x + f(x)) in each place.

    Under `config.base_depth` each branch has the factor `config.branch_scale`.

    Args:
      name: the mixer's name.
      layer: its place among the mixers of this name in the model; may be traced.
      config: a `models.config.ModelConfig`.
    """

    def __init__(self, name: str, layer: int | Int[Array, ""], config, *, rngs: nnx.Rngs):
        kind = config.channel_mixer_of(name)
        self.mixer_norm = config.make_norm(rngs)
        self.mixer = mixers.create(
            name, config.width, rngs=rngs, layer=layer, alone=False, **config.mixer_options(name)
        )
        self.channel_norm = None if kind == "none" else config.make_norm(rngs)
        self.channel_mixer = config.make_channel_mixer(kind, rngs)
        self.pre_norm = config.norm_position == "pre"
        self.dropout = config.dropout
        self.branch_scale = config.branch_scale
        self.recompute_mixer = config.remat == "mixer"

    def __call__(
        self,
        x: Float[Array, "B T D"],
        carry: Any = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        context: Context,
    ) -> tuple[Float[Array, "B T D"], Any, Any, Statistics]:
        """Applies the block.

        Args:
          x: [batch, length, width].
          carry, segment_ids, positions: as in `Mixer.__call__`.
          context: as in `Mixer.__call__`. Where it has a key, the block is in training: dropout acts on both residual branches.

        Returns:
          y of x's shape; the carry and the stream as of `Mixer.__call__`; and what the norms saw of the batch, see
          `models.norms.Statistics`.
        """
        keys = (None,) * 3 if context.key is None else jax.random.split(context.key, 3)

        def mix(h):
            y, *rest = self.mixer(
                h, carry, segment_ids=segment_ids, positions=positions, context=context._replace(key=keys[2])
            )
            return y, rest

        if self.recompute_mixer:
            mix = jax.checkpoint(mix, prevent_cse=False)

        def residual(x, norm, f, key):
            """The branch added to x; what f returns beside; and what the norm saw."""
            apply = lambda x: normalize(norm, x, training=context.key is not None, segment_ids=segment_ids)
            h, seen = apply(x) if self.pre_norm else (x, None)
            y, beside = f(h)
            if key is not None and self.dropout > 0:
                keep = jax.random.bernoulli(key, 1 - self.dropout, y.shape)
                y = jnp.where(keep, y / (1 - self.dropout), 0).astype(y.dtype)
            if self.branch_scale != 1:
                y = self.branch_scale * y
            x = constrain(x + y, "batch", "length", "activation")
            if not self.pre_norm:
                x, seen = apply(x)
            return x, beside, seen

        statistics = {}
        x, (carry, stream), statistics["mixer_norm"] = residual(x, self.mixer_norm, mix, keys[0])
        if self.channel_mixer is not None:
            transform = lambda h: (self.channel_mixer(h), None)
            x, _, statistics["channel_norm"] = residual(x, self.channel_norm, transform, keys[1])
        return x, carry, stream, statistics

    def initial_carry(self, batch: int, capacity: int) -> Any:
        """The mixer's carry before the first token."""
        return self.mixer.initial_carry(batch, capacity)

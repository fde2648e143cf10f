"""The residual block: a token mixer (or several side by side), then (where the mixer's paper has one) a channel mixer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.mixer import Context, Scalars, add_scalars
from models.moe import MoE
from models.norms import Statistics, normalize
from models.partitioning import constrain
from models.pattern import Item


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + channel_mixer(norm(x)); or with the norms elsewhere, see `models.pattern.NORM_POSITIONS`.

    A "sandwich" has a norm before each branch and another behind it, `mixer_output_norm` and `channel_output_norm`.

    Each branch has the factor `config.branch_factor`, and what it is added to `config.residual_scale`.

    Args:
      item: what the block is made of.
      layer: the place of its mixer among those of its name in the model; may be traced. A dict by name where several mixers act
        side by side.
      config: a `models.config.ModelConfig`.
    """

    def __init__(self, item: Item, layer: Any, config, *, rngs: nnx.Rngs):
        kind = config.channel_mixer_of(item)
        self.norm_position = item.norm_position or config.norm_position
        self.mixer_norm = config.make_norm(rngs)
        self.mixer = config.make_mixer(item, layer, rngs)
        self.channel_norm = None if kind == "none" else config.make_norm(rngs)
        self.channel_mixer = config.make_channel_mixer(kind, rngs)
        sandwich = self.norm_position == "sandwich"
        self.mixer_output_norm = config.make_norm(rngs) if sandwich else None
        self.channel_output_norm = config.make_norm(rngs) if sandwich and kind != "none" else None
        self.dropout = config.dropout
        self.branch_factor, self.residual_scale = config.branch_factor, config.residual_scale
        self.recompute_mixer = config.remat == "mixer"

    def __call__(
        self,
        x: Float[Array, "B T D"],
        carry: Any = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        context: Context,
    ) -> tuple[Float[Array, "B T D"], Any, Any, Statistics, Scalars]:
        """Applies the block.

        Args:
          x: [batch, length, width].
          carry, segment_ids, positions: as in `Mixer.__call__`.
          context: as in `Mixer.__call__`. Where it has a key, the block is in training: dropout acts on both residual branches.

        Returns:
          y of x's shape; the carry and the stream as of `Mixer.__call__`; and in training what the norms and experts saw of the
          batch, see `models.norms.Statistics`, and the `Scalars` of mixer and channel mixer together ({} in evaluation).
        """
        keys = (None,) * 3 if context.key is None else jax.random.split(context.key, 3)

        def mix(h):
            y, *rest = self.mixer(
                h, carry, segment_ids=segment_ids, positions=positions, context=context._replace(key=keys[2])
            )
            return y, rest

        if self.recompute_mixer:
            mix = jax.checkpoint(mix, prevent_cse=False)

        statistics = {}

        def residual(x, branch, f, key):
            """The branch added to x, with the norms of this name; and what f returns beside."""

            def apply(which, x):
                norm = getattr(self, which)
                y, statistics[which] = normalize(norm, x, training=context.key is not None, segment_ids=segment_ids)
                return y

            where = self.norm_position
            if where == "input":
                x = apply(f"{branch}_norm", x)
            y, beside = f(apply(f"{branch}_norm", x) if where in ("pre", "sandwich") else x)
            if where in ("sandwich", "output"):
                y = apply(f"{branch}_output_norm" if where == "sandwich" else f"{branch}_norm", y)
            if key is not None and self.dropout > 0:
                keep = jax.random.bernoulli(key, 1 - self.dropout, y.shape)
                y = jnp.where(keep, y / (1 - self.dropout), 0).astype(y.dtype)
            if self.branch_factor != 1:
                y = self.branch_factor * y
            if self.residual_scale != 1:
                x = self.residual_scale * x
            x = constrain(x + y, "batch", "length", "activation")
            return (apply(f"{branch}_norm", x) if where == "post" else x), beside

        def transform(h):
            if not isinstance(self.channel_mixer, MoE):
                return self.channel_mixer(h), {}
            training = context.key is not None
            y, followed, scalars = self.channel_mixer(h, segment_ids=segment_ids, training=training)
            if followed:
                statistics["channel_mixer"] = followed
            return y, scalars

        x, (carry, stream, *scalars) = residual(x, "mixer", mix, keys[0])
        if self.channel_mixer is not None:
            x, more = residual(x, "channel", transform, keys[1])
            scalars.append(more)
        return x, carry, stream, statistics, add_scalars(*scalars)

    def initial_carry(self, batch: int, capacity: int) -> Any:
        """The mixer's carry before the first token."""
        return self.mixer.initial_carry(batch, capacity)

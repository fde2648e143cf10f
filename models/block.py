"""The residual block: a token mixer, then (where the mixer's paper has one) a channel mixer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models import mixer as mixers
from models.channel_mixers import CHANNEL_MIXERS
from models.mixer import Context
from models.norms import normalize
from models.partitioning import constrain


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + channel_mixer(norm(x)); with `norm_position="post"`, norm(x + f(x)) in each place.

    Args:
      name: the mixer's name.
      layer: its place among the mixers of this name in the model; may be traced.
      config: a `models.sequence_model.ModelConfig`.
    """

    def __init__(self, name: str, layer: int | Int[Array, ""], config, *, rngs: nnx.Rngs):
        make_norm = lambda: config.make_norm(rngs)
        kind = config.channel_mixer
        if kind == "auto":
            kind = "none" if mixers.find(name).replaces_channel_mixer else "swiglu"
        self.mixer_norm = make_norm()
        self.mixer = mixers.create(
            name,
            config.width,
            rngs=rngs,
            causal=config.causal,
            depth=config.depth,
            layer=layer,
            layers=config.layers(name),
            length=config.length,
            alone=False,
            **config.mixer.get(name, {}),
        )
        self.channel_norm = None if kind == "none" else make_norm()
        self.channel_mixer = (
            None
            if kind == "none"
            else CHANNEL_MIXERS[kind](
                config.width,
                rngs=rngs,
                expansion=config.expansion,
                hidden=config.channel_size,
                bias=config.channel_bias,
                depth=config.depth,
            )
        )
        self.pre_norm = config.norm_position == "pre"
        self.dropout = config.dropout

    def __call__(
        self,
        x: Float[Array, "B T D"],
        carry=None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        context: Context,
    ):
        """Returns (y, carry, stream); see `Mixer.__call__`. Dropout acts on both residual branches where there is a key."""
        keys = (None,) * 3 if context.key is None else jax.random.split(context.key, 3)

        def mix(h):
            y, *rest = self.mixer(
                h, carry, segment_ids=segment_ids, positions=positions, context=context._replace(key=keys[2])
            )
            return y, rest

        def residual(x, norm, f, key):
            apply = lambda x: normalize(norm, x, training=context.key is not None, segment_ids=segment_ids)
            y, aux = f(apply(x) if self.pre_norm else x)
            if key is not None and self.dropout > 0:
                keep = jax.random.bernoulli(key, 1 - self.dropout, y.shape)
                y = jnp.where(keep, y / (1 - self.dropout), 0).astype(y.dtype)
            x = constrain(x + y, "batch", "length", "activation")
            return (x if self.pre_norm else apply(x)), aux

        x, (carry, stream) = residual(x, self.mixer_norm, mix, keys[0])
        if self.channel_mixer is not None:
            x, _ = residual(x, self.channel_norm, lambda h: (self.channel_mixer(h), None), keys[1])
        return x, carry, stream

    def initial_carry(self, batch: int, capacity: int):
        """The mixer's carry before the first token."""
        return self.mixer.initial_carry(batch, capacity)

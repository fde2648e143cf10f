"""The stack: a pattern of blocks, repeated, with one scan over the repeats.

Parameters of the repeats are stacked on a leading axis, so compilation time does not grow with depth.

What passes between layers beside the residual stream has one way: each mixer is told its place among the mixers of its name,
and those that declare `Mixer.Shared` get common parameters and hand a stream from one to the next, see `mixer.Context`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from models import mixer as mixers
from models.block import Block
from models.mixer import Context

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Pattern(nnx.Module):
    """One repeat: a block for each name in `config.pattern`.

    Args:
      repeat: which repeat of the pattern it is; may be traced.
    """

    def __init__(self, config, repeat, *, rngs: nnx.Rngs):
        self.names = config.pattern
        self.blocks = nnx.List(
            [Block(name, self.layer(i, repeat), config, rngs=rngs) for i, name in enumerate(self.names)]
        )

    def layer(self, i: int, repeat):
        """The place of the i-th block among those of its name in the model."""
        return repeat * self.names.count(self.names[i]) + self.names[:i].count(self.names[i])

    def __call__(self, x, carries=None, streams=None, *, repeat=0, segment_ids=None, positions=None, key=None):
        new, streams = [], dict(streams or {})
        for i, (name, block) in enumerate(zip(self.names, self.blocks)):
            context = Context(
                self.layer(i, repeat), None if key is None else jax.random.fold_in(key, i), streams.get(name)
            )
            x, carry, stream = block(
                x,
                None if carries is None else carries[i],
                segment_ids=segment_ids,
                positions=positions,
                context=context,
            )
            new.append(carry)
            if name in streams:
                streams[name] = stream
        return x, (None if carries is None else new), streams


class Stack(nnx.Module):
    """`config.depth` blocks: `config.pattern` repeated depth / len(pattern) times."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        self.repeats = config.depth // len(config.pattern)
        keys = jax.random.split(rngs.params(), self.repeats)
        make = lambda key, repeat: Pattern(config, repeat, rngs=nnx.Rngs(params=key))
        self.stacked = jax.vmap(make)(keys, jnp.arange(self.repeats))
        self.shared = nnx.Dict(
            {
                name: mixers.create_shared(
                    name,
                    config.width,
                    rngs=rngs,
                    causal=config.causal,
                    layers=config.layers(name),
                    length=config.length,
                    **config.mixer.get(name, {}),
                )
                for name in dict.fromkeys(config.pattern)
                if mixers.find(name).Shared is not None
            }
        )
        self.remat = config.remat

    def __call__(self, x, carry=None, *, segment_ids=None, positions=None, key=None):
        """Applies all blocks.

        Args:
          x: [batch, length, width].
          carry: None or the stacked carries of `initial_carry`.
          segment_ids: as in `Mixer.__call__`.
          positions: [batch, length].
          key: source of random numbers (dropout, mixers that are `random`); None for evaluation.

        Returns:
          (y, carry).
        """

        def repeat(passing, inputs):
            x, streams = passing
            pattern, carries, key, index = inputs
            x, carries, streams = pattern(
                x, carries, streams, repeat=index, segment_ids=segment_ids, positions=positions, key=key
            )
            return (x, streams), carries

        if self.remat != "none":
            repeat = jax.checkpoint(repeat, prevent_cse=False, policy=REMAT[self.remat])
        keys = None if key is None else jax.random.split(key, self.repeats)
        streams = {
            name: shared(x, segment_ids=segment_ids, positions=positions) for name, shared in self.shared.items()
        }
        (x, _), carry = jax.lax.scan(repeat, (x, streams), (self.stacked, carry, keys, jnp.arange(self.repeats)))
        return x, carry

    def initial_carry(self, batch: int, capacity: int):
        """The carries of all blocks before the first token, stacked like the parameters."""
        make = lambda pattern: [block.initial_carry(batch, capacity) for block in pattern.blocks]
        return jax.vmap(make)(self.stacked)

"""The stack: a pattern of blocks, repeated, with one scan over the repeats.

Parameters of the repeats are stacked on a leading axis, so compilation time does not grow with depth.
"""

import jax
from flax import nnx

from models.block import Block

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Pattern(nnx.Module):
    """One repeat: a block for each name in `config.pattern`."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(name, config.mixer.get(name, {}), config, rngs=rngs) for name in config.pattern])

    def __call__(self, x, carries=None, *, segment_ids=None, positions=None, dropout_key=None):
        new = []
        for i, block in enumerate(self.blocks):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
            x, carry = block(
                x,
                None if carries is None else carries[i],
                segment_ids=segment_ids,
                positions=positions,
                dropout_key=key,
            )
            new.append(carry)
        return x, (None if carries is None else new)


class Stack(nnx.Module):
    """`config.depth` blocks: `config.pattern` repeated depth / len(pattern) times."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        self.repeats = config.depth // len(config.pattern)
        keys = jax.random.split(rngs.params(), self.repeats)
        self.stacked = jax.vmap(lambda key: Pattern(config, rngs=nnx.Rngs(params=key)))(keys)
        self.remat = config.remat

    def __call__(self, x, carry=None, *, segment_ids=None, positions=None, dropout_key=None):
        """Applies all blocks.

        Args:
          x: [batch, length, width].
          carry: None or the stacked carries of `initial_carry`.
          segment_ids, positions: as in `Mixer.__call__`.
          dropout_key: None for no dropout.

        Returns:
          (y, carry).
        """

        def repeat(x, inputs):
            pattern, carries, key = inputs
            return pattern(x, carries, segment_ids=segment_ids, positions=positions, dropout_key=key)

        if self.remat != "none":
            repeat = jax.checkpoint(repeat, prevent_cse=False, policy=REMAT[self.remat])
        keys = None if dropout_key is None else jax.random.split(dropout_key, self.repeats)
        return jax.lax.scan(repeat, x, (self.stacked, carry, keys))

    def initial_carry(self, batch: int, capacity: int):
        """The carries of all blocks before the first token, stacked like the parameters."""
        make = lambda pattern: [block.initial_carry(batch, capacity) for block in pattern.blocks]
        return jax.vmap(make)(self.stacked)

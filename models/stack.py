"""The stack: a pattern of blocks, repeated, with one scan over the repeats.

Parameters of the repeats are stacked on a leading axis, so compilation time does not grow with depth.

What passes between layers beside the residual stream has one way: each mixer is told its place among the mixers of its name,
and those that declare `Mixer.Shared` get common parameters and hand a stream from one to the next, see `mixer.Context`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models import mixer as mixers
from models.block import Block
from models.mixer import Context
from models.norms import Statistics

# What the backward pass has of a repeat, see `ModelConfig.remat`; None where nothing of it is recomputed as a whole.
REMAT = {
    "none": None,
    "mixer": None,  # which the blocks do
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


class Pattern(nnx.Module):
    """One repeat: a block for each name in `config.pattern`.

    Args:
      repeat: which repeat of the pattern it is; may be traced.
    """

    def __init__(self, config, repeat: int | Int[Array, ""], *, rngs: nnx.Rngs):
        self.names = config.pattern
        self.blocks = nnx.List(
            [Block(name, self.layer(i, repeat), config, rngs=rngs) for i, name in enumerate(self.names)]
        )

    def layer(self, i: int, repeat: int | Int[Array, ""]) -> int | Int[Array, ""]:
        """The place of the i-th block among those of its name in the model."""
        return repeat * self.names.count(self.names[i]) + self.names[:i].count(self.names[i])

    def __call__(
        self,
        x: Float[Array, "B T D"],
        carries: list | None = None,
        streams: Mapping[str, Any] | None = None,
        *,
        repeat: int | Int[Array, ""] = 0,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T D"], list | None, dict[str, Any], Statistics]:
        """Applies the blocks.

        Args:
          x: [batch, length, width].
          carries: one of each block; None without.
          streams: what the repeat before handed on, by mixer name.
          repeat: which repeat of the pattern it is; may be traced.
          segment_ids, positions: as in `Mixer.__call__`.
          key: source of random numbers in training; None in evaluation.

        Returns:
          y; the carries, a list, one of each block (None without); the streams by mixer name; and what the norms saw of the
          batch, see `models.norms.Statistics`.
        """
        new, streams, statistics = [], dict(streams or {}), {}
        for i, (name, block) in enumerate(zip(self.names, self.blocks)):
            context = Context(
                self.layer(i, repeat), None if key is None else jax.random.fold_in(key, i), streams.get(name)
            )
            x, carry, stream, statistics[str(i)] = block(
                x,
                None if carries is None else carries[i],
                segment_ids=segment_ids,
                positions=positions,
                context=context,
            )
            new.append(carry)
            if name in streams:
                streams[name] = stream
        return x, (None if carries is None else new), streams, {"blocks": statistics}


class Stack(nnx.Module):
    """`config.depth` blocks: `config.pattern` repeated depth / len(pattern) times."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        self.repeats = config.depth // len(config.pattern)
        keys = jax.random.split(rngs.params(), self.repeats)
        make = lambda key, repeat: Pattern(config, repeat, rngs=nnx.Rngs(params=key))
        self.stacked = jax.vmap(make)(keys, jnp.arange(self.repeats))
        self.shared = nnx.Dict(
            {
                name: mixers.create_shared(name, config.width, rngs=rngs, **config.mixer_options(name))
                for name in dict.fromkeys(config.pattern)
                if mixers.find(name).Shared is not None
            }
        )
        self.remat = config.remat

    def __call__(
        self,
        x: Float[Array, "B T D"],
        carry: Any = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Any, Statistics]:
        """Applies all blocks.

        Args:
          x: [batch, length, width].
          carry: None or the carries of `initial_carry`.
          segment_ids: as in `Mixer.__call__`.
          positions: [batch, length].
          key: source of random numbers in training (dropout, mixers that are `random`); None in evaluation.

        Returns:
          y, the carry, and in training what the norms saw of the batch, see `models.norms.Statistics`.
        """

        def repeat(passing, inputs):
            x, streams = passing
            pattern, carries, key, index = inputs
            x, carries, streams, statistics = pattern(
                x, carries, streams, repeat=index, segment_ids=segment_ids, positions=positions, key=key
            )
            return (x, streams), (carries, statistics)

        if REMAT[self.remat] is not None:
            repeat = jax.checkpoint(repeat, prevent_cse=False, policy=REMAT[self.remat])
        keys = None if key is None else jax.random.split(key, self.repeats)
        streams = {
            name: shared(x, segment_ids=segment_ids, positions=positions) for name, shared in self.shared.items()
        }
        layers, passing = (self.stacked, keys, jnp.arange(self.repeats)), (x, streams)
        join = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        if carry is not None and x.shape[1] == 1:
            # A scan would copy what every repeat carries out of a stack and into another; a long cache is then all that
            # decoding does.
            results = []
            for i, own in enumerate(carry):
                pattern, key, index = repeat_of(layers, i)
                passing, result = repeat(passing, (pattern, own, key, index))
                results.append(result)
            return passing[0], [own for own, _ in results], {"stacked": join([statistics for _, statistics in results])}
        pattern, keys, indices = layers
        inputs = (pattern, None if carry is None else join(carry), keys, indices)
        (x, _), (new, statistics) = jax.lax.scan(repeat, passing, inputs)
        if carry is not None:
            new = [repeat_of(new, i) for i in range(self.repeats)]
        return x, new, {"stacked": statistics}

    def initial_carry(self, batch: int, capacity: int) -> list:
        """The carries of all blocks before the first token, a list with one item for each repeat of the pattern."""
        make = lambda pattern: [block.initial_carry(batch, capacity) for block in pattern.blocks]
        return [make(repeat_of(self.stacked, i)) for i in range(self.repeats)]


def repeat_of(stacked: Any, repeat: int) -> Any:
    """One repeat of the pattern, of what is stacked over all of them."""
    return jax.tree.map(lambda leaf: leaf[repeat], stacked)

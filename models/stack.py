"""The stack: a pattern of blocks, repeated, with one scan over the repeats, and what stands before and behind them.

Parameters of the repeats are stacked on a leading axis, so compilation time does not grow with depth. The prefix and the suffix
are compiled block by block.

What passes between layers beside the residual stream has one way: each mixer is told its place among the mixers of its name,
and those that declare `Mixer.Shared` get common parameters and hand a stream from one to the next, see `mixer.Context`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models import mixer as mixers
from models.block import Block
from models.mixer import Context
from models.norms import Statistics
from models.pattern import Item
from ops import kept

# What the backward pass has of a repeat, see `ModelConfig.remat`; None where nothing of it is recomputed as a whole.
REMAT = {
    "none": None,
    "mixer": None,  # which the blocks do
    "elementwise": jax.checkpoint_policies.save_only_these_names(kept.NAME),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


class Pattern(nnx.Module):
    """Blocks in a row: one repeat of the pattern, or the prefix, or the suffix.

    Args:
      items: of the blocks.
      before: of each mixer's name, how many there are in the model before the first repeat.
      start: how many blocks there are before it.
      repeat: which repeat of the pattern it is; may be traced.
      config: a `models.config.ModelConfig`.
    """

    def __init__(
        self,
        items: Sequence[Item],
        before: Mapping[str, int],
        start: int,
        config,
        repeat: int | Int[Array, ""] = 0,
        *,
        rngs: nnx.Rngs,
    ):
        self.names = tuple(item.mixers for item in items)
        self.start = start
        inside = [name for names in self.names for name in names]
        earlier = lambda i, name: sum(name in names for names in self.names[:i])
        self.strides = tuple(tuple(inside.count(name) for name in names) for names in self.names)
        self.firsts = tuple(
            tuple(before.get(name, 0) + earlier(i, name) for name in names) for i, names in enumerate(self.names)
        )
        self.blocks = nnx.List([Block(item, self.layer(i, repeat), config, rngs=rngs) for i, item in enumerate(items)])

    def layer(self, i: int, repeat: int | Int[Array, ""]) -> Any:
        """The place of the i-th block's mixer among those of its name in the model; of several side by side, by name."""
        places = [repeat * stride + first for stride, first in zip(self.strides[i], self.firsts[i])]
        return places[0] if len(places) == 1 else dict(zip(self.names[i], places))

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
    ) -> tuple[Float[Array, "B T D"], list | None, dict[str, Any], Statistics, dict[str, Float[Array, "L"]]]:
        """Applies the blocks.

        Args:
          x: [batch, length, width].
          carries: one of each block; None without.
          streams: what the repeat before handed on, by mixer name.
          repeat: which repeat of the pattern it is; may be traced.
          segment_ids, positions: as in `Mixer.__call__`.
          key: source of random numbers in training; None in evaluation.

        Returns:
          y; the carries, a list, one of each block (None without); the streams by mixer name; what the blocks saw of the
          batch, see `models.norms.Statistics`; and their `models.mixer.Scalars`, a number for each block that has such a one.
        """
        new, streams, statistics, scalars = [], dict(streams or {}), {}, []
        for i, (names, block) in enumerate(zip(self.names, self.blocks)):
            alone = len(names) == 1
            own = streams.get(names[0]) if alone else {name: streams.get(name) for name in names}
            own_key = None if key is None else jax.random.fold_in(key, i)
            context = Context(self.layer(i, repeat), own_key, own, self.start + repeat * len(self.names) + i)
            x, carry, stream, statistics[str(i)], found = block(
                x,
                None if carries is None else carries[i],
                segment_ids=segment_ids,
                positions=positions,
                context=context,
            )
            new.append(carry)
            scalars.append({name: value[None] for name, value in found.items()})
            handed_on = {names[0]: stream} if alone else stream
            streams |= {name: stream for name, stream in handed_on.items() if name in streams}
        return x, (None if carries is None else new), streams, {"blocks": statistics}, _joined(scalars)


class Stack(nnx.Module):
    """`config.depth` blocks: the prefix, the pattern `config.repeats` times, and the suffix.

    Their parameters are `prefix` and `suffix` (None without blocks), and `stacked`, with a first axis of the repeats.
    """

    def __init__(self, config, *, rngs: nnx.Rngs):
        self.repeats = config.repeats
        first, behind = len(config.prefix), len(config.prefix) + self.repeats * len(config.pattern)
        prefix, suffix = config.items[:first], config.items[behind:]
        repeated = config.items[first : first + len(config.pattern)]
        before = {name: sum(name in item.mixers for item in prefix) for name in config.names}
        until = {name: sum(name in item.mixers for item in config.items[:behind]) for name in config.names}
        keys = jax.random.split(rngs.params(), self.repeats)
        make = lambda key, repeat: Pattern(repeated, before, first, config, repeat, rngs=nnx.Rngs(params=key))
        self.stacked = jax.vmap(make)(keys, jnp.arange(self.repeats))
        self.shared = nnx.Dict(
            {
                name: mixers.create_shared(name, config.width, rngs=rngs, **config.mixer_options(name))
                for name in config.names
                if mixers.find(name).Shared is not None
            }
        )
        self.prefix = Pattern(prefix, {}, 0, config, rngs=rngs) if prefix else None
        self.suffix = Pattern(suffix, until, behind, config, rngs=rngs) if suffix else None
        self.remat = config.remat

    def __call__(
        self,
        x: Float[Array, "B T D"],
        carry: Any = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Any, Statistics, dict[str, Float[Array, "L"]]]:
        """Applies all blocks.

        Args:
          x: [batch, length, width].
          carry: None or the carries of `initial_carry`.
          segment_ids: as in `Mixer.__call__`.
          positions: [batch, length].
          key: source of random numbers in training (dropout, mixers that are `random`); None in evaluation.

        Returns:
          y, the carry, and in training what the blocks saw of the batch, see `models.norms.Statistics`, and their
          `models.mixer.Scalars`, a number for each layer that has such a one, in the order of the layers.
        """

        def run(passing, inputs):
            x, streams = passing
            pattern, carries, key, index = inputs
            x, carries, streams, *seen = pattern(
                x, carries, streams, repeat=index, segment_ids=segment_ids, positions=positions, key=key
            )
            return (x, streams), (carries, seen)

        if REMAT[self.remat] is not None:
            run = jax.checkpoint(run, prevent_cse=False, policy=REMAT[self.remat])
        streams = {
            name: shared(x, segment_ids=segment_ids, positions=positions) for name, shared in self.shared.items()
        }
        first, *repeats, last = (None,) * (self.repeats + 2) if carry is None else self._by_run(carry)
        own_key = lambda i: None if key is None else jax.random.fold_in(key, i)
        passing, seen = (x, streams), {}
        if self.prefix is not None:
            passing, (first, seen["prefix"]) = run(passing, (self.prefix, first, own_key(self.repeats), 0))
        passing, repeats, (statistics, scalars) = self._repeated(run, passing, None if carry is None else repeats, key)
        seen["stacked"] = statistics, {name: value.reshape(-1) for name, value in scalars.items()}
        if self.suffix is not None:
            passing, (last, seen["suffix"]) = run(passing, (self.suffix, last, own_key(self.repeats + 1), 0))
        if carry is not None:
            carry = [own for own in (first, *repeats, last) if own is not None]
        statistics = {name: found for name, (found, _) in seen.items()}
        return passing[0], carry, statistics, _joined([found for _, found in seen.values()])

    def _repeated(self, run, passing, carry, key):
        """The repeats of the pattern: what passes on, their carries, and what they saw, stacked."""
        keys = None if key is None else jax.random.split(key, self.repeats)
        layers = (self.stacked, keys, jnp.arange(self.repeats))
        join = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        if carry is not None and passing[0].shape[1] == 1:
            # A scan would copy what every repeat carries out of a stack and into another; a long cache is then all that
            # decoding does.
            results = []
            for i, own in enumerate(carry):
                pattern, key, index = repeat_of(layers, i)
                passing, result = run(passing, (pattern, own, key, index))
                results.append(result)
            return passing, [own for own, _ in results], join([seen for _, seen in results])
        pattern, keys, indices = layers
        inputs = (pattern, None if carry is None else join(carry), keys, indices)
        passing, (new, seen) = jax.lax.scan(run, passing, inputs)
        if carry is not None:
            new = [repeat_of(new, i) for i in range(self.repeats)]
        return passing, new, seen

    def _by_run(self, carry: list) -> list:
        """The carries of the prefix, of each repeat, and of the suffix; None where there is no such run."""
        first, last = [None] * (self.prefix is None), [None] * (self.suffix is None)
        return [*first, *carry, *last]

    def initial_carry(self, batch: int, capacity: int) -> list:
        """The carries of all blocks before the first token, a list with one item for each run of blocks (see `runs`)."""
        return [[block.initial_carry(batch, capacity) for block in run.blocks] for run, _ in self.runs()]

    def runs(self) -> list[tuple[Pattern, int]]:
        """The prefix, each repeat of the pattern, and the suffix, so far as there are any; and which repeat it is."""
        repeats = [(repeat_of(self.stacked, i), i) for i in range(self.repeats)]
        before, behind = ([] if run is None else [(run, 0)] for run in (self.prefix, self.suffix))
        return [*before, *repeats, *behind]


def _joined(found: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """What several have under each name, one behind the other."""
    names = dict.fromkeys(name for one in found for name in one)
    return {name: jnp.concatenate([one[name] for one in found if name in one]) for name in names}


def repeat_of(stacked: Any, repeat: int) -> Any:
    """One repeat of the pattern, of what is stacked over all of them."""
    return jax.tree.map(lambda leaf: leaf[repeat], stacked)

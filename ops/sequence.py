"""Sequences that lie on several devices, a shard on each: what passes between the shards.

A primitive asks `is_split(length)` and, where that holds, runs on each shard by `apply`, which its own code does not notice:
inside, nothing is split. What a shard needs of the others it gets by three functions.

    recurrence    the state that enters a shard, of a recurrence that maps the state before a shard to T(state) + own. Each shard
                  finds its T and own; the pairs are composed in log2(shards) steps of a parallel prefix; then each shard runs
                  from its own initial state, so that outputs need no correction.
    halo          the tokens next to a shard, for what looks a few tokens back.
    continues     whether a shard's first token belongs to the document of the last one before it.

Who traces for a mesh says `split_over`. Lengths that the shards do not divide are left to the compiler, as is everything that is
done token by token.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree, Shaped

from ops.dispatch import Axes

AXIS = "sequence"  # of the mesh

# The axes of each argument (of all leaves, where it is a tree), and the axes and shape of each result.
ArgumentAxes = Mapping[str, Axes]
ResultAxes = Sequence[tuple[Axes, tuple[int, ...]]]


class _Split(NamedTuple):
    ways: int
    place: Callable


_split: contextvars.ContextVar[_Split | None] = contextvars.ContextVar("split", default=None)


@contextlib.contextmanager
def split_over(ways: int, place: Callable[[Callable, dict, ArgumentAxes, ResultAxes], Any]) -> Iterator[None]:
    """Makes primitives that are traced inside work on shards.

    Args:
      ways: number of shards; 1 for none.
      place: (function, arguments, their axes, axes and shapes of the results) -> results; each device computes its part.
    """
    token = _split.set(_Split(ways, place) if ways > 1 else None)
    try:
        yield
    finally:
        _split.reset(token)


def is_inside() -> bool:
    """Whether what is traced now is one device's part: there, nothing is split any more."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def ways() -> int:
    """In how many shards a length is split that they divide."""
    split = _split.get()
    return 1 if split is None else split.ways


def is_split(length: int) -> bool:
    """Whether sequences of this length lie in shards here."""
    return ways() > 1 and length % ways() == 0 and not is_inside()


def apply(function: Callable, arguments: Mapping[str, Any], axes: ArgumentAxes, results: ResultAxes) -> Any:
    """Runs a function on the shards.

    Args:
      function: of the arguments, by name. It must not close over arrays.
      arguments: arrays or trees of arrays; None for one that is not given.
      axes: logical names of the axes of each ("batch", "length", "heads", ...).
      results: of each result, its axes' names and its whole shape.

    Returns:
      a tuple of the results.
    """
    given = {name: x for name, x in arguments.items() if x is not None}
    missing = {name: None for name, x in arguments.items() if x is None}
    return _split.get().place(lambda given: function(**given, **missing), given, axes, results)


def _from_left(tree: PyTree, distance: int) -> PyTree:
    """What the shard so many places to the left has; zeros where there is none."""
    pairs = [(i, i + distance) for i in range(ways() - distance)]
    return jax.tree.map(lambda x: lax.ppermute(x, AXIS, pairs), tree)


def _from_right(tree: PyTree, distance: int) -> PyTree:
    pairs = [(i + distance, i) for i in range(ways() - distance)]
    return jax.tree.map(lambda x: lax.ppermute(x, AXIS, pairs), tree)


def halo(x: Shaped[Array, "B T ..."], left: int, right: int = 0) -> Shaped[Array, "B U ..."]:
    """A shard's tokens with some before and behind it, from as many other shards as they reach; zeros beyond the sequence."""
    length = x.shape[1]
    before, behind = [], []
    for distance in range(1, min(-(-left // length), ways() - 1) + 1):
        size = min(length, left - (distance - 1) * length)
        before.insert(0, _from_left(x[:, length - size :], distance))
    for distance in range(1, min(-(-right // length), ways() - 1) + 1):
        size = min(length, right - (distance - 1) * length)
        behind.append(_from_right(x[:, :size], distance))
    fill = lambda size: jnp.zeros((x.shape[0], size, *x.shape[2:]), x.dtype)
    lacking = [wanted - sum(part.shape[1] for part in parts) for wanted, parts in ((left, before), (right, behind))]
    return jnp.concatenate([fill(lacking[0]), *before, x, *behind, fill(lacking[1])], axis=1)


def before(x: Shaped[Array, "..."], combine: Callable) -> Shaped[Array, "..."]:
    """The sum (or, of numbers >= 0, the maximum) over the shards to the left of what each has; zero in the first."""
    index, all_of = lax.axis_index(AXIS), lax.all_gather(x, AXIS)
    result = jnp.zeros_like(x)
    for i in range(ways() - 1):
        result = jnp.where(i < index, combine(result, all_of[i]), result)
    return result


def cumulative(reduce: Callable, combine: Callable, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
    """`jax.lax.cumsum`, or of numbers >= 0 `cummax`, along the length, also of a sequence in shards.

    Args:
      reduce: `jax.lax.cumsum` or `jax.lax.cummax`.
      combine: what it does to two numbers.
      x: [B, T, ...].
    """
    if not is_split(x.shape[1]):
        return reduce(x, axis=1)

    def shard(x):
        own = reduce(x, axis=1)
        return (combine(own, before(own[:, -1], combine)[:, None]),)

    axes = ("batch", "length", *(None,) * (x.ndim - 2))
    return apply(shard, {"x": x}, {"x": axes}, [(axes, x.shape)])[0]


def of_last(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """What the last shard has, on all."""
    return lax.psum(jnp.where(lax.axis_index(AXIS) == ways() - 1, x, jnp.zeros_like(x)), AXIS)


def is_first() -> Bool[Array, ""]:
    """Whether this is the first shard."""
    return lax.axis_index(AXIS) == 0


def continues(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B"]:
    """Whether a shard's first token is of the same segment as the one before it; that of the first shard is."""
    before = _from_left(segment_ids[:, -1], 1)
    return is_first() | (segment_ids[:, 0] == before)


def _times(transition: PyTree, x: PyTree) -> PyTree:
    return jax.tree.map(jnp.multiply, transition, x)


def _add(x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, x, y)


def _entering(transition, own, initial, act, add):
    """The state before each shard: a parallel prefix over the shards (Hillis and Steele 1986)."""
    index = lax.axis_index(AXIS)

    def where(condition, x, y):
        return jax.tree.map(lambda x, y: jnp.where(condition, x, y), x, y)

    own = where(index == 0, add(act(transition, initial), own), own)
    distance = 1
    while distance < ways():
        earlier, state = _from_left((transition, own), distance)
        reached = index >= distance
        own = where(reached, add(act(transition, state), own), own)
        transition = where(reached, act(transition, earlier), transition)
        distance *= 2
    return where(index == 0, initial, _from_left(own, 1))


def recurrence(
    run: Callable[..., tuple[tuple, PyTree]],
    total: Callable[..., tuple[PyTree, PyTree]],
    arguments: Mapping[str, Any],
    axes: ArgumentAxes,
    outputs: ResultAxes,
    initial_state: PyTree,
    state_axes: Axes,
    segment_ids: Int[Array, "B T"] | None,
    *,
    act: Callable[[PyTree, PyTree], PyTree] = _times,
    add: Callable[[PyTree, PyTree], PyTree] = _add,
    void: float = 0.0,
) -> tuple[Any, PyTree]:
    """Runs a recurrence over the shards, whose state is mapped by each shard to add(act(transition, state), own).

    Args:
      run: (initial_state, segment_ids, **arguments) -> (outputs, final state), of one shard.
      total: (segment_ids, **arguments) -> (transition, own), of one shard; what a restart inside it does is in them.
      arguments, axes: as of `apply`.
      outputs: axes and shapes of the outputs.
      initial_state: before the first token; an array or a tree of them, [B, ...].
      state_axes: of each array of the state.
      segment_ids: or None.
      act: applies a transition to a state, and to an earlier transition.
      add: of two states.
      void: the transition and the state from which nothing comes.

    Returns:
      the outputs and the final state.
    """
    leaves, tree = jax.tree.flatten(initial_state)

    def shard(initial_state, segment_ids, **arguments):
        transition, own = total(segment_ids, **arguments)
        if segment_ids is not None:
            kept = continues(segment_ids)
            keep = lambda x: jnp.where(kept.reshape((-1,) + (1,) * (x.ndim - 1)), x, jnp.full_like(x, void))
            transition = jax.tree.map(keep, transition)
        state = _entering(transition, own, initial_state, act, add)
        if segment_ids is not None:
            state = jax.tree.map(keep, state)
        y, final = run(state, segment_ids, **arguments)
        return *y, *map(of_last, jax.tree.leaves(final))

    states = [(state_axes, leaf.shape) for leaf in leaves]
    given = {**arguments, "initial_state": initial_state, "segment_ids": segment_ids}
    axes = {**axes, "initial_state": state_axes, "segment_ids": ("batch", "length")}
    found = apply(shard, given, axes, [*outputs, *states])
    return tuple(found[: len(outputs)]), jax.tree.unflatten(tree, found[len(outputs) :])

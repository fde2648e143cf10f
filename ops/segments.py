"""Segments: the one way to say padding, packing and lengths.

`segment_ids` is an integer array [batch, length]. Id 0 is padding; any other id is a document, and each document is one
contiguous run of its id. A change of id restarts every recurrence; padding is never read from or written to a state.
What compares the ids of pairs of tokens must see ids that do not come back in a row: those of `runs`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Shaped

from ops import sequence

_TOKENS = ("batch", "length")


def is_start(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True where a token's segment differs from its left neighbour's. The first token of a row is never a start."""
    if sequence.is_split(segment_ids.shape[1]):
        shard = lambda ids: (is_start(ids).at[:, 0].set(~sequence.continues(ids)),)
        return sequence.apply(shard, {"ids": segment_ids}, {"ids": _TOKENS}, [(_TOKENS, segment_ids.shape)])[0]
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(change, ((0, 0), (1, 0)))


def zero_padding(x: Shaped[Array, "B T ..."], segment_ids: Int[Array, "B T"] | None) -> Shaped[Array, "B T ..."]:
    """Replaces the entries of padding tokens by zeros, whatever they were (NaN included)."""
    return fill_padding(x, segment_ids, 0)


def fill_padding(
    x: Shaped[Array, "B T ..."], segment_ids: Int[Array, "B T"] | None, value: float
) -> Shaped[Array, "B T ..."]:
    """Replaces the entries of padding tokens by a number."""
    if segment_ids is None:
        return x
    return jnp.where(expand(segment_ids != 0, x.ndim), x, jnp.asarray(value, x.dtype))


def unless_empty(final: PyTree, initial: PyTree, segment_ids: Int[Array, "B T"] | None) -> PyTree:
    """The state [B, ...] after a piece: `final`, but in rows of padding alone `initial`, which padding leaves as it was."""
    if segment_ids is None:
        return final
    empty = jnp.all(segment_ids == 0, axis=1)
    return jax.tree.map(lambda x, y: jnp.where(expand(empty, x.ndim), y, x), final, initial)


def expand(x: Shaped[Array, "B ..."], ndim: int) -> Shaped[Array, "B ..."]:
    """Appends axes of size 1 until there are `ndim`, so that what is known of tokens or rows broadcasts to their entries."""
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def _run_starts(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Index of the first token of the run that each token belongs to."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    return sequence.cumulative(jax.lax.cummax, jnp.maximum, jnp.where(is_start(segment_ids), index, 0))


def runs(
    segment_ids: Int[Array, "B T"],
    previous_segment: Int[Array, "B"] | None = None,
    previous_run: Int[Array, "B"] | None = None,
) -> Int[Array, "B T"]:
    """The documents of a row counted from 1, and 0 at padding: an id that comes back after others is another document.

    Args:
      segment_ids: [batch, length].
      previous_segment: segment of the token before the first one, where this is the continuation of a sequence.
      previous_run: the number of documents up to that token.
    """
    first = segment_ids[:, :1] != (0 if previous_segment is None else previous_segment[:, None])
    start = is_start(segment_ids).at[:, :1].set(first)
    number = sequence.cumulative(jax.lax.cumsum, jnp.add, (start & (segment_ids != 0)).astype(jnp.int32))
    if previous_run is not None:
        number = number + previous_run[:, None]
    return jnp.where(segment_ids != 0, number, 0)


def positions(
    segment_ids: Int[Array, "B T"],
    previous_segment: Int[Array, "B"] | None = None,
    previous_position: Int[Array, "B"] | None = None,
) -> Int[Array, "B T"]:
    """Position of each token inside its segment, counted from 0.

    Args:
      segment_ids: [batch, length].
      previous_segment: segment of the token before the first one, where this is the continuation of a sequence.
      previous_position: the position that follows that token's; used where the first token continues its segment.
    """
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    start = _run_starts(segment_ids)
    result = index - start
    if previous_segment is None:
        return result
    continues = (start == 0) & (segment_ids[:, :1] == previous_segment[:, None])
    return result + jnp.where(continues, previous_position[:, None], 0)


def reverse(x: Shaped[Array, "B T ..."], segment_ids: Int[Array, "B T"] | None) -> Shaped[Array, "B T ..."]:
    """Reverses the order of tokens inside each segment, so that padding stays where it is. Its own inverse."""
    if segment_ids is None:
        return jnp.flip(x, axis=1)
    length = segment_ids.shape[1]
    start = _run_starts(segment_ids)
    end = length - 1 - jnp.flip(_run_starts(jnp.flip(segment_ids, 1)), 1)
    index = start + end - jnp.arange(length, dtype=jnp.int32)
    return jnp.take_along_axis(x, expand(index, x.ndim), axis=1)


def lengths(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Number of tokens of each token's document; at padding, of its run of padding."""
    index = positions(segment_ids)
    return index + reverse(index, segment_ids) + 1

"""The growing carry of quadratic mixers: the keys and values of all tokens so far."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from common.errors import UserError
from ops.segments import expand, zero_padding


def check_capacity(capacity: int) -> None:
    """Raises a UserError where the carry of a mixer, which grows, is to hold no token."""
    if capacity < 1:
        raise UserError(
            f"this mixer's carry grows: initial_carry needs the number of tokens to hold, got capacity={capacity}"
        )


def buffers(batch: int, capacity: int, **shapes: tuple[int, ...]) -> dict[str, Array]:
    """Makes the empty cache.

    Args:
      batch: number of rows.
      capacity: number of tokens that the cache can hold.
      **shapes: for each buffer by name, the shape of what it holds of one token.

    Returns:
      the buffers, float32 zeros [batch, capacity, *shape], or, of several rows and for a shape (heads, channels), [batch, heads,
      capacity, channels]: so attention reads them, and need not turn the whole cache over at every token; "segment" [batch,
      capacity], the segment of the token in each slot (0 where the slot is empty); and "length", the number of tokens held.

    Raises:
      UserError: if the capacity is less than 1.
    """
    check_capacity(capacity)
    state = {name: _heads_first(jnp.zeros((batch, capacity, *shape), jnp.float32)) for name, shape in shapes.items()}
    return state | {"segment": jnp.zeros((batch, capacity), jnp.int32), "length": jnp.zeros((), jnp.int32)}


def extend(state: dict[str, Array], new: dict[str, Array]) -> dict[str, Array]:
    """Writes a piece of a sequence behind what a cache holds.

    Args:
      state: as `buffers` or the last call returned it.
      new: a piece [batch, length, *shape] for each buffer, and "segment" [batch, length]. Of padding, zeros are written.

    Returns:
      the cache after the piece. Beyond its capacity what is written is NaN, and with it all that reads it, so that nothing is
      forgotten silently.
    """
    length = state["length"] + new["segment"].shape[1]
    full = length > state["segment"].shape[1]

    def write(buffer, piece):
        piece = _heads_first(zero_padding(piece, new["segment"]).astype(buffer.dtype))
        if jnp.issubdtype(buffer.dtype, jnp.floating):
            piece = jnp.where(full, jnp.nan, piece)
        return jax.lax.dynamic_update_slice_in_dim(buffer, piece, state["length"], axis=2 if _turns(buffer) else 1)

    return {name: write(state[name], piece) for name, piece in new.items()} | {"length": length}


def held(state: dict[str, Array], name: str, dtype: DTypeLike) -> Array:
    """What a cache holds in one of its buffers: [batch, capacity, *shape]."""
    return _heads_first(state[name]).astype(dtype)


def replace(state: dict[str, Array], name: str, value: Array) -> dict[str, Array]:
    """The cache with other contents [batch, capacity, *shape] in one of its buffers."""
    return state | {name: _heads_first(value.astype(state[name].dtype))}


def nan_if_overfull(state: dict[str, Array], y: Array) -> Array:
    """y, or NaN where the cache was to hold more than its capacity: for what is not read from it."""
    return jnp.where(state["length"] > state["segment"].shape[1], jnp.nan, y)


def of_document(state: dict[str, Array], name: str, segment_ids: Array) -> Array:
    """What a state has of the last token beside its buffers, such as inputs of a convolution: 0 in rows whose piece begins with
    another document. A carry that grows is not restarted from outside.

    Args:
      state: before the piece is written.
      name: of an array [batch, ...].
      segment_ids: of the piece.
    """
    last = jnp.take(state["segment"], state["length"] - 1, axis=1, mode="clip")
    return jnp.where(expand(last == segment_ids[:, 0], state[name].ndim), state[name], 0)


def _heads_first(buffer):
    """[batch, tokens, heads, channels] to [batch, heads, tokens, channels], and back; other buffers as they are."""
    return jnp.swapaxes(buffer, 1, 2) if _turns(buffer) else buffer


def _turns(buffer):
    """Integers are labels, which masks read as they are; and of a single row XLA, which drops its axis, would write the cache
    twice at every token."""
    return buffer.ndim == 4 and buffer.shape[0] > 1 and jnp.issubdtype(buffer.dtype, jnp.floating)

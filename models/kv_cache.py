"""The growing carry of quadratic mixers: the keys and values of all tokens so far."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from common.errors import UserError


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
      the buffers, float32 zeros [batch, capacity, *shape]; "segment" [batch, capacity], the segment of the token in each slot
      (0 where the slot is empty); and "length", the number of tokens held.

    Raises:
      UserError: if the capacity is less than 1.
    """
    check_capacity(capacity)
    state = {name: jnp.zeros((batch, capacity, *shape), jnp.float32) for name, shape in shapes.items()}
    return state | {"segment": jnp.zeros((batch, capacity), jnp.int32), "length": jnp.zeros((), jnp.int32)}


def extend(state: dict[str, Array], new: dict[str, Array]) -> dict[str, Array]:
    """Writes a piece of a sequence behind what a cache holds.

    Args:
      state: as `buffers` or the last call returned it.
      new: a piece [batch, length, *shape] for each buffer, and "segment" [batch, length].

    Returns:
      the cache after the piece. Beyond its capacity all of it is NaN, so that nothing is forgotten silently.
    """
    length = state["length"] + new["segment"].shape[1]
    full = length > state["segment"].shape[1]

    def write(buffer, piece):
        start = (0, state["length"]) + (0,) * (buffer.ndim - 2)
        buffer = jax.lax.dynamic_update_slice(buffer, piece.astype(buffer.dtype), start)
        return jnp.where(full, jnp.nan, buffer) if jnp.issubdtype(buffer.dtype, jnp.floating) else buffer

    return {name: write(state[name], piece) for name, piece in new.items()} | {"length": length}

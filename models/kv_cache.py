"""The growing carry of quadratic mixers: the keys and values of all tokens so far."""

import jax
import jax.numpy as jnp

from common.errors import UserError


def buffers(batch: int, capacity: int, **shapes: tuple[int, ...]) -> dict:
    """Empty float32 buffers [batch, capacity, *shape], the segment of each slot (0: empty), and the number of tokens held."""
    if capacity < 1:
        raise UserError(
            f"this mixer's carry grows: initial_carry needs the number of tokens to hold, got capacity={capacity}"
        )
    state = {name: jnp.zeros((batch, capacity, *shape), jnp.float32) for name, shape in shapes.items()}
    return state | {"segment": jnp.zeros((batch, capacity), jnp.int32), "length": jnp.zeros((), jnp.int32)}


def extend(state: dict, new: dict) -> dict:
    """Writes the tokens of `new` behind those that `buffers` hold. Beyond the capacity everything turns NaN, loudly."""
    length = state["length"] + new["segment"].shape[1]
    full = length > state["segment"].shape[1]

    def write(buffer, piece):
        start = (0, state["length"]) + (0,) * (buffer.ndim - 2)
        buffer = jax.lax.dynamic_update_slice(buffer, piece.astype(buffer.dtype), start)
        return jnp.where(full, jnp.nan, buffer) if jnp.issubdtype(buffer.dtype, jnp.floating) else buffer

    return {name: write(state[name], piece) for name, piece in new.items()} | {"length": length}

"""Projections with a short convolution, which make the queries, keys and values of the delta rules."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.checks import head_size, scaled
from models.params import conv_taps, dense
from models.partitioning import constrain
from ops.elementwise import silu
from ops.projection import project
from ops.short_convolution import short_convolution


def grouped(
    width: int, heads: int, value_heads: int | None, *, expand_key: float, expand_value: float
) -> tuple[int, tuple[int, int, int]]:
    """Heads of values that share queries and keys, in groups of neighbours.

    Args:
      heads: of queries and keys.
      value_heads: a multiple of `heads`; None for as many.
      expand_key, expand_value: size of all keys and of all values over the width.

    Returns:
      the number of value heads in a group; and of the memory the number of heads, a key's size and a value's.

    Raises:
      UserError: for sizes that the heads do not divide.
    """
    value_heads = heads if value_heads is None else value_heads
    key = head_size(scaled(width, expand_key=expand_key), heads, "the size of the keys")
    value = head_size(scaled(width, expand_value=expand_value), value_heads, "the size of the values", "value_heads")
    return head_size(value_heads, heads, "`value_heads`"), (value_heads, key, value)


class ConvolvedProjection(nnx.Module):
    """silu(conv(W x)), split into heads.

    Args:
      heads: number of heads.
      size: channels of each.
      conv_size: taps of the convolution.
    """

    def __init__(self, width: int, heads: int, size: int, conv_size: int, *, rngs: nnx.Rngs):
        self.size = size
        self.weight = dense(rngs, (width, heads * size), ("embed", "heads"))
        self.taps = conv_taps(rngs, conv_size, heads * size, "heads")

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: Float[Array, "B past C"] | None,
        segment_ids: Int[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B past C"]]:
        """Returns the heads and the next state: the last inputs of the convolution. For the arguments see
        `ops.short_convolution`."""
        u = constrain(project(x, self.weight[...]), "batch", "length", "heads")
        u, state = short_convolution(u, self.taps[...], initial_state=state, segment_ids=segment_ids)
        return silu(u).reshape(*u.shape[:2], -1, self.size), state

    def initial_state(self, batch: int) -> Float[Array, "B past C"]:
        """The state before the first token."""
        conv_size, channels = self.taps.shape
        return jnp.zeros((batch, conv_size - 1, channels), jnp.float32)


def convolve(
    projections: Sequence[ConvolvedProjection],
    x: Float[Array, "B T D"],
    states: Sequence[Float[Array, "B _ _"]] | None,
    segment_ids: Int[Array, "B T"] | None,
) -> tuple[list[Float[Array, "B T _ _"]], list[Float[Array, "B _ _"]]]:
    """What several projections make of x, such as queries, keys and values of their own heads and sizes, and their next
    states."""
    states = [None] * len(projections) if states is None else states
    made = [projection(x, state, segment_ids) for projection, state in zip(projections, states, strict=True)]
    return [heads for heads, _ in made], [state for _, state in made]

"""What the state spaces share: complex numbers as pairs of real ones, and the half of a two-sided form that looks ahead."""

import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Num

from models.mixer import Ids, Tokens
from ops import segments

Pair = tuple[Float[Array, "*shape"], Float[Array, "*shape"]]


def pair(z: Num[Array, "*shape"]) -> Pair:
    """(real, imaginary)."""
    return jnp.real(z), jnp.imag(z)


def unit(z: Complex[Array, "*shape"]) -> Pair:
    """1 + 0i in the shape of z."""
    return jnp.ones(z.shape, jnp.float32), jnp.zeros(z.shape, jnp.float32)


def from_lag_one(kernel: Float[Array, "D T"]) -> Float[Array, "D T"]:
    """The kernel whose lag l acts on the token l + 1 ahead, for `ops.long_convolution`, where lag l acts on the l-th."""
    return jnp.pad(kernel, ((0, 0), (1, 0)))[:, :-1]


def look_ahead(y: Tokens, segment_ids: Ids) -> Tokens:
    """What tokens read of those after them.

    Args:
      y: what a causal system gives on tokens that were reversed inside their segments.
      segment_ids: of the rows.

    Returns:
      y in the order of the tokens, each with what the one after it had read: the token itself is left out.
    """
    y = jnp.pad(y, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    y = jnp.where(segments.is_start(segment_ids)[..., None], 0, y)
    return segments.reverse(y, segment_ids)

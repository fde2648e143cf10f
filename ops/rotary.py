"""Position signals of attention: rotary embedding of queries and keys, and the slopes of ALiBi."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from common.errors import UserError, check_choice


def rotary(
    x: Float[Array, "B T H K"],
    positions: Int[Array, "#B T"],
    *,
    base: float = 10000.0,
    frequencies: Float[Array, "F"] | None = None,
    magnitude: float = 1.0,
    layout: str = "half",
) -> Float[Array, "B T H K"]:
    """Rotates pairs of channels by an angle proportional to the position (RoPE, arXiv 2104.09864).

    Pair i of the token at position p turns by p * theta_i, so that a query at m and a key at n meet as a function of
    m - n. The angles and the rotation are computed in float32 (float64 for float64 inputs).

    Args:
      x: queries or keys [batch, length, heads, channels].
      positions: position of each token inside its segment [batch, length], or [1, length] where all rows agree.
      base: theta_i = base^(-2i/K).
      frequencies: theta itself, [F] with F <= K/2. Only the first 2F channels turn, the others pass unchanged.
      magnitude: factor of the rotated channels (see `ops.rotary_scaling`).
      layout: "half" pairs channel i with i + F (GPT-NeoX, Llama); "interleaved" pairs 2i with 2i + 1 (GPT-J, xPos).

    Returns:
      The rotated x, with its shape and dtype.

    Raises:
      UserError: if the number of channels is odd or the layout unknown.
      ValueError: if a shape does not fit.
    """
    B, T, _, K = x.shape
    check_choice("layout", layout, ("half", "interleaved"))
    if positions.shape not in ((B, T), (1, T)):
        raise ValueError(f"positions must have shape {(B, T)} or {(1, T)} for x of shape {x.shape}: {positions.shape}")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if frequencies is None:
        if K % 2:
            raise UserError(f"rotary needs an even number of channels, or explicit frequencies: K={K}")
        frequencies = base ** (-np.arange(0, K, 2) / K)
    frequencies = jnp.asarray(frequencies, dtype)
    if frequencies.ndim != 1 or 2 * frequencies.size > K:
        raise ValueError(f"frequencies must be a vector of at most K/2={K // 2} entries: {frequencies.shape}")
    F = frequencies.size

    angle = positions.astype(dtype)[:, :, None, None] * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if magnitude != 1:
        cos, sin = magnitude * cos, magnitude * sin
    turned, rest = x[..., : 2 * F].astype(dtype), x[..., 2 * F :]
    if layout == "half":
        first, second = turned[..., :F], turned[..., F:]
    else:
        first, second = turned[..., 0::2], turned[..., 1::2]
    first, second = first * cos - second * sin, second * cos + first * sin
    if layout == "half":
        turned = jnp.concatenate((first, second), axis=-1)
    else:
        turned = jnp.stack((first, second), axis=-1).reshape(turned.shape)
    return jnp.concatenate((turned.astype(x.dtype), rest), axis=-1)


def alibi_slopes(heads: int) -> Float[Array, "H"]:
    """Slopes m_h of the attention bias -m_h * (i - j) (ALiBi, arXiv 2108.12409).

    2^(-8h/H) for h = 1..H where H is a power of two. Otherwise the slopes of the next lower power of two P, followed by
    every second slope of 2P, as the authors do.

    Args:
      heads: number of query heads H.

    Returns:
      [heads] float32.

    Raises:
      UserError: if heads is not positive.
    """
    if heads < 1:
        raise UserError(f"alibi_slopes needs at least one head: {heads}")

    def geometric(count: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)

    power = 1 << (heads.bit_length() - 1)
    return jnp.asarray(np.concatenate((geometric(power), geometric(2 * power)[::2]))[:heads], jnp.float32)

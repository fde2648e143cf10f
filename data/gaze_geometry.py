"""Where a pair of angles looks, in NumPy or in JAX as they are given."""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def direction(angles: Float[np.ndarray, "... 2"] | Float[Array, "... 2"]) -> np.ndarray | Array:
    """The unit vectors [..., 3] of gazes (pitch, yaw) in radians, in camera coordinates: x to the right, y down, z away."""
    xp = _namespace(angles)
    pitch, yaw = angles[..., 0], angles[..., 1]
    return -xp.stack([xp.cos(pitch) * xp.sin(yaw), xp.sin(pitch), xp.cos(pitch) * xp.cos(yaw)], -1)


def angle(
    first: Float[np.ndarray, "... 2"] | Float[Array, "... 2"],
    second: Float[np.ndarray, "... 2"] | Float[Array, "... 2"],
) -> np.ndarray | Array:
    """The angles [...] between gazes (pitch, yaw), in degrees; the gazes are in radians."""
    xp = _namespace(first)
    a, b = direction(first), direction(second)
    # atan2 is exact at small angles, where arccos of the product is not.
    sine = xp.linalg.norm(xp.cross(a, b), axis=-1)
    return xp.rad2deg(xp.arctan2(sine, xp.sum(a * b, -1)))


def _namespace(array: np.ndarray | Array) -> ModuleType:
    return jnp if isinstance(array, jax.Array) else np

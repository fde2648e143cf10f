"""Lower bounds of forget gates that rise with depth and are learned for all layers together: HGRN's and HGRN2's."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.mixer import Ids, Tokens
from models.params import param, zeros


def lower_bounds(gamma: Float[Array, "layers D"]) -> Float[Array, "layers D"]:
    """gamma^k = sum_{j<k} softmax(Gamma)_j over the layers: none forgets more than 1 - gamma^k, and gamma^0 = 0."""
    # A product with a matrix, because XLA on CPU (jaxlib 0.10.2) gets the gradient of some rows of a cumulative sum wrong.
    before = jnp.tril(jnp.ones((gamma.shape[0],) * 2, gamma.dtype), -1)
    return jnp.matmul(before, jax.nn.softmax(gamma, axis=0), precision="highest")


class LowerBounds(nnx.Module):
    """Gamma, one row for each layer, and the `lower_bounds` that it stands for.

    Attributes:
      axis: logical name of the channels that have a bound each.
    """

    axis: ClassVar[str] = "mlp"

    def __init__(self, width: int, *, rngs: nnx.Rngs, layers: int = 1):
        self.gamma = param(rngs, zeros, (layers, width), (None, self.axis), decay=False, keep_float32=True)

    def __call__(self, x: Tokens, *, segment_ids: Ids | None, positions: Ids) -> Float[Array, "layers D"]:
        """The bounds of all layers."""
        return lower_bounds(self.gamma[...])

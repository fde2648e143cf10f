"""RealNVP in two dimensions (arXiv 1605.08803), the flow of residual log-likelihood estimation (arXiv 2107.11291)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.params import param, uniform
from ops.projection import project_blocks

COUPLINGS = 6
HIDDEN = 64


class RealNVP(nnx.Module):
    """A density on the plane: x is N(0, I) noise z that went through six affine couplings.

    Coupling i = 0..5 moves the coordinate j = i mod 2 by the other, k, which stays: x_j = z_j exp(s_i(z_k)) + t_i(z_k). Each s
    and t is a network 1 -> 64 -> 64 -> 1 with leaky ReLUs (slope 0.01), s with a tanh at the end.

    From Jeff-sjtu/res-loglikelihood-regression, rlepose/models/layers/real_nvp.py and regression_nf.py. Their networks are
    2 -> 64 -> 64 -> 2 with one input and one output masked: the weights that meet a zero are left out here. Their
    initialiser (Xavier with gain 0.01) is never called, so what trained their models is PyTorch's default of a linear
    layer: weights and biases uniform in +-1/sqrt(inputs), two inputs in the first layer. That is what is drawn here.
    No parameter decays, and all stay in float32.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        facts = {"decay": False, "keep_float32": True}
        # [coupling, s or t, ...]
        draw = lambda inputs, *shape: param(
            rngs,
            uniform(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs)),
            (COUPLINGS, 2, *shape),
            (None,) * (2 + len(shape)),
            **facts,
        )
        self.w_1, self.b_1 = draw(2, HIDDEN), draw(2, HIDDEN)
        self.w_2, self.b_2 = draw(HIDDEN, HIDDEN, HIDDEN), draw(HIDDEN, HIDDEN)
        self.w_3, self.b_3 = draw(HIDDEN, HIDDEN), draw(HIDDEN)

    def _coupling(self, i: int, kept: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """s and t of coupling i."""
        h = jax.nn.leaky_relu(kept[..., None, None] * self.w_1[i] + self.b_1[i])
        h = jax.nn.leaky_relu(project_blocks(h, self.w_2[i]) + self.b_2[i])
        s, t = jnp.moveaxis(project_blocks(h, self.w_3[i]) + self.b_3[i], -1, 0)
        return jnp.tanh(s), t

    def from_noise(self, z: Float[Array, "... 2"]) -> Float[Array, "... 2"]:
        """x, in float32."""
        x = [z[..., 0].astype(jnp.float32), z[..., 1].astype(jnp.float32)]
        for i in range(COUPLINGS):
            s, t = self._coupling(i, x[1 - i % 2])
            x[i % 2] = x[i % 2] * jnp.exp(s) + t
        return jnp.stack(x, -1)

    def to_noise(self, x: Float[Array, "... 2"]) -> tuple[Float[Array, "... 2"], Float[Array, "..."]]:
        """z and log |det dz/dx|, in float32."""
        z = [x[..., 0].astype(jnp.float32), x[..., 1].astype(jnp.float32)]
        log_det = jnp.zeros(x.shape[:-1])
        for i in reversed(range(COUPLINGS)):
            s, t = self._coupling(i, z[1 - i % 2])
            z[i % 2] = (z[i % 2] - t) * jnp.exp(-s)
            log_det = log_det - s
        return jnp.stack(z, -1), log_det

    def log_prob(self, x: Float[Array, "... 2"]) -> Float[Array, "..."]:
        """The log-density, in float32."""
        z, log_det = self.to_noise(x)
        return log_det - jnp.sum(jnp.square(z), -1) / 2 - math.log(2 * math.pi)

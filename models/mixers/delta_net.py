"""DeltaNet."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import head_size, scaled
from models.mixer import Ids, Mixer, Tokens
from models.norms import RMSNorm, l2_normalize
from models.params import dense, residual_output
from models.short_convolution import ConvolvedProjection, convolve
from ops.delta_rule import delta_rule
from ops.projection import project


class DeltaNet(Mixer):
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t / sqrt(K), y = W_o norm(o)
    (arXiv 2406.06484, section 2.2; first in 2102.11174).

    q, k = l2norm(silu(conv(W x))), v = silu(conv(W x)), beta = sigmoid(W_b x), one for each head: a step of size beta down the
    gradient of |S^T k_t - v_t|^2 / 2. Keys must have unit length, or the state explodes.

    Args:
      heads: number of heads.
      expand_key: size of the keys over the width.
      expand_value: size of the values over the width.
      conv_size: taps of the short convolutions.
      negative_eigenvalues: beta in (0, 2) instead of (0, 1), for state tracking (arXiv 2411.12537).
    """

    paper = "DeltaNet, arXiv 2406.06484"
    primitive = "delta_rule"

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        expand_key: float = 1.0,
        expand_value: float = 1.0,
        conv_size: int = 4,
        negative_eigenvalues: bool = False,
    ):
        key = head_size(scaled(width, expand_key=expand_key), heads, "the size of the keys")
        value = head_size(scaled(width, expand_value=expand_value), heads, "the size of the values")
        self.sizes = (heads, key, value)
        self.beta_scale = 2.0 if negative_eigenvalues else 1.0
        sizes = ((heads, key), (heads, key), (heads, value))
        self.q, self.k, self.v = (ConvolvedProjection(width, *size, conv_size, rngs=rngs) for size in sizes)
        self.w_b = dense(rngs, (width, heads), ("embed", None))
        self.norm = RMSNorm(value, rngs=rngs)
        self.w_o = residual_output(rngs, (heads, value, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        conv = None if state is None else state["conv"]
        (q, k, v), conv = convolve((self.q, self.k, self.v), x, conv, segment_ids)
        beta = self.beta_scale * jax.nn.sigmoid(project(x, self.w_b[...]).astype(jnp.float32))
        o, memory = delta_rule(
            l2_normalize(q),
            l2_normalize(k),
            v,
            beta,
            scale=1 / math.sqrt(q.shape[-1]),
            initial_state=None if state is None else state["memory"],
            segment_ids=segment_ids,
        )
        y = project(self.norm(o), self.w_o[...], inputs=2)
        return y, {"conv": conv, "memory": memory}

    def initial_state(self, batch: int, capacity: int) -> dict:
        heads, key, value = self.sizes
        return {
            "conv": [projection.initial_state(batch) for projection in (self.q, self.k, self.v)],
            "memory": jnp.zeros((batch, heads, key, value), jnp.float32),
        }

"""Gated DeltaNet."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import scaled
from models.mixer import Ids, Mixer, Tokens, head_size
from models.norms import RMSNorm, l2_normalize
from models.params import dense, log_of, residual_output, step_bias, time_scale, uniform
from models.short_convolution import ConvolvedProjection, convolve
from ops.delta_rule import delta_rule
from ops.elementwise import silu_gate
from ops.projection import project


class GatedDeltaNet(Mixer):
    """S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t / sqrt(K),
    y = W_o (silu(W_g x) * norm(o)) (arXiv 2412.06464, equation 10 and section 3.4).

    q, k = l2norm(silu(conv(W x))), v = silu(conv(W x)), beta = sigmoid(W_b x), and
    log alpha = -exp(A_log) softplus(W_a x + dt_bias), one for each head.

    Args:
      heads: number of heads.
      expand_key: size of the keys over the width.
      expand_value: size of the values over the width.
      conv_size: taps of the short convolutions.
      negative_eigenvalues: beta in (0, 2) instead of (0, 1), for state tracking (arXiv 2411.12537).
    """

    paper = "Gated DeltaNet, arXiv 2412.06464"
    primitive = "delta_rule"

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        expand_key: float = 0.75,
        expand_value: float = 1.5,
        conv_size: int = 4,
        negative_eigenvalues: bool = False,
    ):
        key = head_size(scaled(width, expand_key=expand_key), heads, "the size of the keys")
        value = head_size(scaled(width, expand_value=expand_value), heads, "the size of the values")
        self.sizes = (heads, key, value)
        self.beta_scale = 2.0 if negative_eigenvalues else 1.0
        sizes = ((heads, key), (heads, key), (heads, value))
        self.q, self.k, self.v = (ConvolvedProjection(width, *size, conv_size, rngs=rngs) for size in sizes)
        self.w_g = dense(rngs, (width, heads, value), ("embed", "heads", None))
        self.w_b = dense(rngs, (width, heads), ("embed", None))
        self.w_a = dense(rngs, (width, heads), ("embed", None))
        self.a_log = time_scale(rngs, log_of(uniform(1e-3, 16.0)), (heads,), (None,))
        self.dt_bias = time_scale(rngs, step_bias(), (heads,), (None,))
        self.norm = RMSNorm(value, rngs=rngs)
        self.w_o = residual_output(rngs, (heads, value, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        conv = None if state is None else state["conv"]
        (q, k, v), conv = convolve((self.q, self.k, self.v), x, conv, segment_ids)
        beta = self.beta_scale * jax.nn.sigmoid(project(x, self.w_b[...]).astype(jnp.float32))
        dt = jax.nn.softplus(project(x, self.w_a[...]).astype(jnp.float32) + self.dt_bias[...])
        o, memory = delta_rule(
            l2_normalize(q),
            l2_normalize(k),
            v,
            beta,
            -jnp.exp(self.a_log[...]) * dt,
            scale=1 / math.sqrt(q.shape[-1]),
            initial_state=None if state is None else state["memory"],
            segment_ids=segment_ids,
        )
        g = project(x, self.w_g[...])
        y = project(silu_gate(g, self.norm(o)), self.w_o[...], inputs=2)
        return y, {"conv": conv, "memory": memory}

    def initial_state(self, batch: int, capacity: int) -> dict:
        heads, key, value = self.sizes
        return {
            "conv": [projection.initial_state(batch) for projection in (self.q, self.k, self.v)],
            "memory": jnp.zeros((batch, heads, key, value), jnp.float32),
        }

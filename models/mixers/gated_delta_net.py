"""Gated DeltaNet."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import at_least
from models.mixer import Ids, Mixer, Tokens
from models.norms import RMSNorm, l2_normalize
from models.params import dense, log_of, residual_output, step_bias, time_scale, uniform
from models.short_convolution import ConvolvedProjection, convolve, grouped
from ops.delta_rule import delta_rule
from ops.elementwise import silu_gate
from ops.projection import project


class GatedDeltaNet(Mixer):
    """S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t / sqrt(K),
    y = W_o (silu(W_g x) * norm(o)) (arXiv 2412.06464, equation 10 and section 3.4).

    q, k = l2norm(silu(conv(W x))), v = silu(conv(W x)), beta = sigmoid(W_b x), and
    log alpha = -exp(A_log) softplus(W_a x + dt_bias), one for each head. With more `value_heads` than heads, as in Qwen3-Next,
    neighbouring value heads read and write under the query and key of one head, and each has its own state, beta, alpha and gate.

    Args:
      heads: number of heads of queries and keys.
      value_heads: number of heads of values, a multiple of `heads`; by default `heads`.
      expand_key: size of all keys over the width.
      expand_value: size of all values over the width.
      conv_size: taps of the short convolutions.
      negative_eigenvalues: beta in (0, 2) instead of (0, 1), for state tracking (arXiv 2411.12537).
      eps: of the norm (1e-5 in OLMo Hybrid).
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
        value_heads: int | None = None,
        expand_key: float = 0.75,
        expand_value: float = 1.5,
        conv_size: int = 4,
        negative_eigenvalues: bool = False,
        eps: float = 1e-6,
    ):
        at_least(0, eps=eps)
        self.groups, self.sizes = grouped(width, heads, value_heads, expand_key=expand_key, expand_value=expand_value)
        value_heads, key, value = self.sizes
        self.value_heads = value_heads
        self.beta_scale = 2.0 if negative_eigenvalues else 1.0
        sizes = ((heads, key), (heads, key), (value_heads, value))
        self.q, self.k, self.v = (ConvolvedProjection(width, *size, conv_size, rngs=rngs) for size in sizes)
        self.w_g = dense(rngs, (width, value_heads, value), ("embed", "heads", None))
        self.w_b = dense(rngs, (width, value_heads), ("embed", None))
        self.w_a = dense(rngs, (width, value_heads), ("embed", None))
        self.a_log = time_scale(rngs, log_of(uniform(1e-3, 16.0)), (value_heads,), (None,))
        self.dt_bias = time_scale(rngs, step_bias(), (value_heads,), (None,))
        self.norm = RMSNorm(value, rngs=rngs, eps=eps)
        self.w_o = residual_output(rngs, (value_heads, value, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        conv = None if state is None else state["conv"]
        (q, k, v), conv = convolve((self.q, self.k, self.v), x, conv, segment_ids)
        beta = self.beta_scale * jax.nn.sigmoid(project(x, self.w_b[...]).astype(jnp.float32))
        dt = jax.nn.softplus(project(x, self.w_a[...]).astype(jnp.float32) + self.dt_bias[...])
        q, k = (l2_normalize(a) for a in (q, k))
        if self.groups > 1:
            q, k = (jnp.repeat(a, self.groups, axis=2) for a in (q, k))
        o, memory = delta_rule(
            q,
            k,
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

"""Comba, a bilinear recurrence with closed-loop control."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import at_least, finite
from models.mixer import Ids, Mixer, Tokens
from models.norms import RMSNorm, l2_normalize
from models.params import constant, dense, log_of, ones, residual_output, step_bias, time_scale, uniform
from models.short_convolution import ConvolvedProjection, convolve, grouped
from ops.delta_rule import delta_rule
from ops.projection import project


class Comba(Mixer):
    """u_t = beta_t (v_t - S_{t-1}^T p_t), S_t = alpha_t S_{t-1} + k_t u_t^T, o_t = S_t^T (q_t - d p_t) / sqrt(K),
    y = W_o (sigmoid(W_g x) * norm(o)) (arXiv 2506.02475).

    A delta rule whose feedback p = sigmoid(c) k is weaker than its key, and whose output is corrected by the same p. q, k =
    l2norm(silu(conv(W x))), v = silu(conv(W x)), beta = sigmoid(W_b x), log alpha = -exp(A_log) softplus(W_a x + dt_bias), and c
    and d are one learned number for each head of keys.

    The feedback reads the state before this token's decay, as the authors' kernels do (in Gated DeltaNet, after it): the delta
    rule with a = -beta k and b = p. Queries and keys are brought to length one before p and q - d p are made of them. In
    flash-linear-attention's layer they are so after it, where p's length, and with it c, has no effect on the memory.

    Args:
      heads: number of heads of queries and keys.
      value_heads: number of heads of values, a multiple of `heads`; by default `heads`. Neighbouring ones share q, k and p.
      expand_key: size of all keys over the width.
      expand_value: size of all values over the width.
      conv_size: taps of the short convolutions.
      correction: d at initialisation; the authors suggest 0.02 for small models.
      eps: of the norm.
    """

    paper = "Comba, arXiv 2506.02475"
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
        correction: float = 1.0,
        eps: float = 1e-5,
    ):
        at_least(0, eps=eps)
        finite(correction=correction)
        self.groups, self.sizes = grouped(width, heads, value_heads, expand_key=expand_key, expand_value=expand_value)
        value_heads, key, value = self.sizes
        self.value_heads = value_heads
        sizes = ((heads, key), (heads, key), (value_heads, value))
        self.q, self.k, self.v = (ConvolvedProjection(width, *size, conv_size, rngs=rngs) for size in sizes)
        self.w_b = dense(rngs, (width, value_heads), ("embed", None))
        self.w_a = dense(rngs, (width, value_heads), ("embed", None))
        self.a_log = time_scale(rngs, log_of(uniform(1e-3, 16.0)), (value_heads,), (None,))
        self.dt_bias = time_scale(rngs, step_bias(), (value_heads,), (None,))
        self.c = time_scale(rngs, ones, (heads,), (None,))
        self.d = time_scale(rngs, constant(correction), (heads,), (None,))
        self.w_g = dense(rngs, (width, value_heads, value), ("embed", "heads", None))
        self.norm = RMSNorm(value, rngs=rngs, eps=eps)
        self.w_o = residual_output(rngs, (value_heads, value, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        conv = None if state is None else state["conv"]
        (q, k, v), conv = convolve((self.q, self.k, self.v), x, conv, segment_ids)
        q, k = l2_normalize(q), l2_normalize(k)
        p = jax.nn.sigmoid(self.c[...])[:, None] * k
        q = (q - self.d[...][:, None] * p).astype(q.dtype)
        if self.groups > 1:
            q, k, p = (jnp.repeat(a, self.groups, axis=2) for a in (q, k, p))
        beta = jax.nn.sigmoid(project(x, self.w_b[...]).astype(jnp.float32))[..., None]
        dt = jax.nn.softplus(project(x, self.w_a[...]).astype(jnp.float32) + self.dt_bias[...])
        o, memory = delta_rule(
            q,
            k,
            (beta * v).astype(v.dtype),
            log_decay=-jnp.exp(self.a_log[...]) * dt,
            a=-beta * k,
            b=p,
            scale=1 / math.sqrt(q.shape[-1]),
            initial_state=None if state is None else state["memory"],
            segment_ids=segment_ids,
        )
        gate = jax.nn.sigmoid(project(x, self.w_g[...]))
        return project(gate * self.norm(o), self.w_o[...], inputs=2), {"conv": conv, "memory": memory}

    def initial_state(self, batch: int, capacity: int) -> dict:
        return {
            "conv": [projection.initial_state(batch) for projection in (self.q, self.k, self.v)],
            "memory": jnp.zeros((batch, *self.sizes), jnp.float32),
        }

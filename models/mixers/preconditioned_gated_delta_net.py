"""Preconditioned Gated DeltaNet."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import at_least, finite, head_size, scaled
from models.mixer import Ids, Mixer, Tokens
from models.norms import RMSNorm, l2_normalize
from models.params import constant, dense, log_of, residual_output, step_bias, time_scale, uniform
from models.short_convolution import ConvolvedProjection, convolve
from ops.delta_rule import delta_rule
from ops.elementwise import silu_gate
from ops.linear_recurrence import linear_recurrence
from ops.projection import project


class PreconditionedGatedDeltaNet(Mixer):
    """P_t = exp(h_t) P_{t-1} + gamma_t k_t^2, m_t = 3/2^(-r / (1 + |r|)) with r = log(P_t + 1e-6) - c,
    S' = alpha_t S_{t-1}, S_t = S' + beta_t (m_t * k_t) (v_t - S'^T k_t)^T, o_t = S_t^T q_t / sqrt(K),
    y = W_o (silu(W_g x) * norm(o)) (arXiv 2604.21100).

    Gated DeltaNet that writes under a preconditioned key: P, a number for each channel of the key, follows the size of that
    channel's past keys, and channels which were much used are written less, by a factor m between 2/3 and 3/2. q, k =
    l2norm(silu(conv(W x))), v = silu(conv(W x)), beta = sigmoid(W_b x), log alpha = -exp(A_log) softplus(W_a x + dt_bias); gamma
    and h are made like beta and log alpha, with weights of their own, and c is one learned number for each head.

    Args:
      heads: number of heads.
      expand_key: size of the keys over the width.
      expand_value: size of the values over the width.
      conv_size: taps of the short convolutions.
      negative_eigenvalues: beta in (0, 2) instead of (0, 1), for state tracking (arXiv 2411.12537).
      center: c at initialisation.
      eps: of the norm.
    """

    paper = "Preconditioned DeltaNet, arXiv 2604.21100"
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
        center: float = -0.2,
        eps: float = 1e-5,
    ):
        at_least(0, eps=eps)
        finite(center=center)
        key = head_size(scaled(width, expand_key=expand_key), heads, "the size of the keys")
        value = head_size(scaled(width, expand_value=expand_value), heads, "the size of the values")
        self.sizes = (heads, key, value)
        self.beta_scale = 2.0 if negative_eigenvalues else 1.0
        sizes = ((heads, key), (heads, key), (heads, value))
        self.q, self.k, self.v = (ConvolvedProjection(width, *size, conv_size, rngs=rngs) for size in sizes)
        self.w_g = dense(rngs, (width, heads, value), ("embed", "heads", None))
        # Of the memory, and of the preconditioner.
        self.w_b = dense(rngs, (width, 2, heads), ("embed", None, None))
        self.w_a = dense(rngs, (width, 2, heads), ("embed", None, None))
        self.a_log = time_scale(rngs, log_of(uniform(1e-3, 16.0)), (2, heads), (None, None))
        self.dt_bias = time_scale(rngs, step_bias(), (2, heads), (None, None))
        self.center = time_scale(rngs, constant(center), (heads,), (None,))
        self.norm = RMSNorm(value, rngs=rngs, eps=eps)
        self.w_o = residual_output(rngs, (heads, value, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        conv = None if state is None else state["conv"]
        (q, k, v), conv = convolve((self.q, self.k, self.v), x, conv, segment_ids)
        q, k = l2_normalize(q), l2_normalize(k)
        gates = jax.nn.sigmoid(project(x, self.w_b[...]).astype(jnp.float32))
        dt = jax.nn.softplus(project(x, self.w_a[...]).astype(jnp.float32) + self.dt_bias[...])
        log_decays = -jnp.exp(self.a_log[...]) * dt
        beta, gamma = (gates[:, :, i, :, None] for i in range(2))
        beta = self.beta_scale * beta

        squares = jnp.square(k.astype(jnp.float32))
        power, last_power = linear_recurrence(
            jnp.broadcast_to(jnp.exp(log_decays[:, :, 1, :, None]), k.shape),
            gamma * squares,
            initial_state=None if state is None else state["power"],
            segment_ids=segment_ids,
            axis="heads",
        )
        r = jnp.log(power + 1e-6) - self.center[...][:, None]
        write = jnp.exp(-math.log(1.5) * r / (1 + jnp.abs(r))) * k

        log_decay = log_decays[:, :, 0]
        o, memory = delta_rule(
            q,
            write.astype(k.dtype),
            (beta * v).astype(v.dtype),
            log_decay=log_decay,
            a=-beta * write,
            b=jnp.exp(log_decay)[..., None] * k,
            scale=1 / math.sqrt(q.shape[-1]),
            initial_state=None if state is None else state["memory"],
            segment_ids=segment_ids,
        )
        g = project(x, self.w_g[...])
        y = project(silu_gate(g, self.norm(o)), self.w_o[...], inputs=2)
        return y, {"conv": conv, "power": last_power, "memory": memory}

    def initial_state(self, batch: int, capacity: int) -> dict:
        heads, key, value = self.sizes
        return {
            "conv": [projection.initial_state(batch) for projection in (self.q, self.k, self.v)],
            "power": jnp.zeros((batch, heads, key), jnp.float32),
            "memory": jnp.zeros((batch, heads, key, value), jnp.float32),
        }

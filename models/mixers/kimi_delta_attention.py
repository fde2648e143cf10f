"""Kimi Delta Attention."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from models.checks import at_least, head_size, scaled
from models.mixer import Ids, Mixer, Tokens
from models.norms import RMSNorm, l2_normalize
from models.params import dense, log_of, residual_output, step_bias, time_scale, uniform
from models.short_convolution import ConvolvedProjection, convolve
from ops.delta_rule import delta_rule
from ops.projection import project


class KimiDeltaAttention(Mixer):
    """S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t / sqrt(K),
    y = W_o (sigmoid(W_g2 W_g1 x) * norm(o)) (Kimi Linear, arXiv 2510.26692, equation 1 and section 4).

    Gated DeltaNet with one decay for each channel of the key. q, k = l2norm(silu(conv(W x))), v = silu(conv(W x)),
    beta = sigmoid(W_b x), f = W_f2 W_f1 x + dt_bias with the rank of a head's size, and log alpha = -exp(A_log) softplus(f)
    with A_log one for each head. With a `lower_bound` L, log alpha = L sigmoid(exp(A_log) f), as in the authors' later code.

    Args:
      heads: number of heads.
      expand: size of the keys, and of the values, over the width.
      conv_size: taps of the short convolutions.
      lower_bound: the least log alpha, negative; by default there is none.
      eps: of the norm (1e-5 in the release).
    """

    paper = "Kimi Linear, arXiv 2510.26692"
    primitive = "delta_rule"

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        expand: float = 1.0,
        conv_size: int = 4,
        lower_bound: float | None = None,
        eps: float = 1e-6,
    ):
        at_least(0, eps=eps)
        if lower_bound is not None and not -math.inf < lower_bound < 0:
            raise UserError(f"`lower_bound` bounds a log-decay: make it negative, or None; got {lower_bound}")
        inner = scaled(width, expand=expand)
        size = head_size(inner, heads, "the size of the keys")
        self.sizes = (heads, size)
        self.lower_bound = lower_bound
        sizes = ((heads, size), (heads, size), (heads, size))
        self.q, self.k, self.v = (ConvolvedProjection(width, *size, conv_size, rngs=rngs) for size in sizes)
        self.w_b = dense(rngs, (width, heads), ("embed", None))
        self.w_f1 = dense(rngs, (width, size), ("embed", None))
        self.w_f2 = dense(rngs, (size, heads, size), (None, "heads", None))
        self.a_log = time_scale(rngs, log_of(uniform(1.0, 16.0)), (heads,), (None,))
        self.dt_bias = time_scale(rngs, step_bias(), (heads, size), ("heads", None))
        self.w_g1 = dense(rngs, (width, size), ("embed", None))
        self.w_g2 = dense(rngs, (size, heads, size), (None, "heads", None))
        self.norm = RMSNorm(size, rngs=rngs, eps=eps)
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        conv = None if state is None else state["conv"]
        # First what `tensor` does not split: the others' gradients of x are then one sum over its devices.
        low_rank = lambda w1, w2: project(project(x, w1[...]), w2[...])
        decay, gate = low_rank(self.w_f1, self.w_f2), low_rank(self.w_g1, self.w_g2)
        (q, k, v), conv = convolve((self.q, self.k, self.v), x, conv, segment_ids)
        o, memory = delta_rule(
            l2_normalize(q),
            l2_normalize(k),
            v,
            jax.nn.sigmoid(project(x, self.w_b[...]).astype(jnp.float32)),
            self.log_decay(decay),
            scale=1 / math.sqrt(q.shape[-1]),
            initial_state=None if state is None else state["memory"],
            segment_ids=segment_ids,
        )
        y = project(jax.nn.sigmoid(gate) * self.norm(o), self.w_o[...], inputs=2)
        return y, {"conv": conv, "memory": memory}

    def log_decay(self, f):
        f = f.astype(jnp.float32) + self.dt_bias[...]
        rate = jnp.exp(self.a_log[...])[:, None]
        if self.lower_bound is None:
            return -rate * jax.nn.softplus(f)
        return self.lower_bound * jax.nn.sigmoid(rate * f)

    def initial_state(self, batch: int, capacity: int) -> dict:
        heads, size = self.sizes
        return {
            "conv": [projection.initial_state(batch) for projection in (self.q, self.k, self.v)],
            "memory": jnp.zeros((batch, heads, size, size), jnp.float32),
        }

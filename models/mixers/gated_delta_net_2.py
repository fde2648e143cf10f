"""Gated DeltaNet-2."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import at_least
from models.mixer import Ids, Mixer, Tokens
from models.norms import RMSNorm, l2_normalize
from models.params import dense, log_of, param, residual_output, step_bias, time_scale, uniform, zeros
from models.short_convolution import ConvolvedProjection, convolve, grouped
from ops.delta_rule import delta_rule
from ops.projection import project


class GatedDeltaNet2(Mixer):
    """S_t = (I - k_t (b_t * k_t)^T) Diag(alpha_t) S_{t-1} + k_t (w_t * v_t)^T, o_t = S_t^T q_t / sqrt(K),
    y = W_o (sigmoid(W_g2 W_g1 x + c) * norm(o)) (arXiv 2605.22791).

    Kimi Delta Attention whose beta is two gates: b = sigmoid(W_b x) for each channel of the key says what is erased, and
    w = sigmoid(W_w x) for each channel of the value what is written. q, k = l2norm(silu(conv(W x))), v = silu(conv(W x)), and
    log alpha = -exp(A_log) softplus(W_f2 W_f1 x + dt_bias), with A_log one for each head; the low ranks are a value head's size.

    This is the delta rule with a = -k and b = alpha * b * k. As b differs between channels, I - k (b * k)^T is not symmetric:
    its eigenvalues are in [0, 1], but its norm may exceed 1 a little, so that without decay a product of many can grow.

    Args:
      heads: number of heads of queries and keys.
      value_heads: number of heads of values, a multiple of `heads`; by default `heads`. Neighbouring value heads share a query, a
        key, b and alpha.
      expand_key: size of all keys over the width.
      expand_value: size of all values over the width.
      conv_size: taps of the short convolutions.
      negative_eigenvalues: b in (0, 2) instead of (0, 1), for state tracking (arXiv 2411.12537).
      eps: of the norm.
    """

    paper = "Gated DeltaNet-2, arXiv 2605.22791"
    primitive = "delta_rule"

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        value_heads: int | None = None,
        expand_key: float = 1.0,
        expand_value: float = 1.0,
        conv_size: int = 4,
        negative_eigenvalues: bool = False,
        eps: float = 1e-5,
    ):
        at_least(0, eps=eps)
        self.groups, self.sizes = grouped(width, heads, value_heads, expand_key=expand_key, expand_value=expand_value)
        value_heads, key, value = self.sizes
        self.value_heads = value_heads
        self.erase_scale = 2.0 if negative_eigenvalues else 1.0
        sizes = ((heads, key), (heads, key), (value_heads, value))
        self.q, self.k, self.v = (ConvolvedProjection(width, *size, conv_size, rngs=rngs) for size in sizes)
        self.w_b = dense(rngs, (width, heads, key), ("embed", "heads", None))
        self.w_w = dense(rngs, (width, value_heads, value), ("embed", "heads", None))
        self.w_f1 = dense(rngs, (width, value), ("embed", None))
        self.w_f2 = dense(rngs, (value, heads, key), (None, "heads", None))
        self.a_log = time_scale(rngs, log_of(uniform(1.0, 16.0)), (heads,), (None,))
        self.dt_bias = time_scale(rngs, step_bias(), (heads, key), ("heads", None))
        self.w_g1 = dense(rngs, (width, value), ("embed", None))
        self.w_g2 = dense(rngs, (value, value_heads, value), (None, "heads", None))
        self.b_g = param(rngs, zeros, (value_heads, value), ("heads", None), decay=False)
        self.norm = RMSNorm(value, rngs=rngs, eps=eps)
        self.w_o = residual_output(rngs, (value_heads, value, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        conv = None if state is None else state["conv"]
        # First what `tensor` does not split: the others' gradients of x are then one sum over its devices.
        low_rank = lambda w1, w2: project(project(x, w1[...]), w2[...])
        dt = jax.nn.softplus(low_rank(self.w_f1, self.w_f2).astype(jnp.float32) + self.dt_bias[...])
        gate = low_rank(self.w_g1, self.w_g2)
        (q, k, v), conv = convolve((self.q, self.k, self.v), x, conv, segment_ids)
        log_decay = -jnp.exp(self.a_log[...])[:, None] * dt
        q, k = l2_normalize(q), l2_normalize(k)
        erase = self.erase_scale * jax.nn.sigmoid(project(x, self.w_b[...]).astype(jnp.float32)) * k
        if self.groups > 1:
            q, k, erase, log_decay = (jnp.repeat(a, self.groups, axis=2) for a in (q, k, erase, log_decay))
        o, memory = delta_rule(
            q,
            k,
            jax.nn.sigmoid(project(x, self.w_w[...])) * v,
            log_decay=log_decay,
            a=-k,
            b=jnp.exp(log_decay) * erase,
            scale=1 / math.sqrt(q.shape[-1]),
            initial_state=None if state is None else state["memory"],
            segment_ids=segment_ids,
        )
        gate = jax.nn.sigmoid(gate + self.b_g[...].astype(gate.dtype))
        return project(gate * self.norm(o), self.w_o[...], inputs=2), {"conv": conv, "memory": memory}

    def initial_state(self, batch: int, capacity: int) -> dict:
        return {
            "conv": [projection.initial_state(batch) for projection in (self.q, self.k, self.v)],
            "memory": jnp.zeros((batch, *self.sizes), jnp.float32),
        }

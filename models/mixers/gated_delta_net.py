"""Gated DeltaNet."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.mixer import Mixer, head_size
from models.norms import RMSNorm, l2_normalize
from models.params import dense, inverse_softplus, log_uniform, param, uniform
from models.short_convolution import ConvolvedProjection
from ops.delta_rule import delta_rule


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
        key = head_size(int(expand_key * width), heads, "the size of the keys")
        value = head_size(int(expand_value * width), heads, "the size of the values")
        self.sizes = (heads, key, value)
        self.beta_scale = 2.0 if negative_eigenvalues else 1.0
        self.q = ConvolvedProjection(width, heads, key, conv_size, rngs=rngs)
        self.k = ConvolvedProjection(width, heads, key, conv_size, rngs=rngs)
        self.v = ConvolvedProjection(width, heads, value, conv_size, rngs=rngs)
        self.w_g = dense(rngs, (width, heads, value), ("embed", "heads", None))
        self.w_b = dense(rngs, (width, heads), ("embed", None))
        self.w_a = dense(rngs, (width, heads), ("embed", None))
        log_a = lambda *args: jnp.log(uniform(1e-3, 16.0)(*args))
        self.a_log = param(rngs, log_a, (heads,), (None,), decay=False, keep_float32=True)
        dt_bias = inverse_softplus(log_uniform(1e-3, 0.1))
        self.dt_bias = param(rngs, dt_bias, (heads,), (None,), decay=False, keep_float32=True)
        self.norm = RMSNorm(value, rngs=rngs)
        self.w_o = dense(rngs, (heads, value, width), ("heads", None, "embed"), inputs=2, gain=(2 * depth) ** -0.5)

    def mix(self, x, state, *, segment_ids, positions):
        initial = {"conv_q": None, "conv_k": None, "conv_v": None, "memory": None} if state is None else state
        q, conv_q = self.q(x, initial["conv_q"], segment_ids)
        k, conv_k = self.k(x, initial["conv_k"], segment_ids)
        v, conv_v = self.v(x, initial["conv_v"], segment_ids)
        beta = self.beta_scale * jax.nn.sigmoid((x @ self.w_b[...]).astype(jnp.float32))
        dt = jax.nn.softplus((x @ self.w_a[...]).astype(jnp.float32) + self.dt_bias[...])
        o, memory = delta_rule(
            l2_normalize(q),
            l2_normalize(k),
            v,
            beta,
            -jnp.exp(self.a_log[...]) * dt,
            scale=1 / math.sqrt(q.shape[-1]),
            initial_state=initial["memory"],
            segment_ids=segment_ids,
        )
        g = jnp.einsum("btd,dhv->bthv", x, self.w_g[...])
        y = jnp.einsum("bthv,hvd->btd", jax.nn.silu(g) * self.norm(o), self.w_o[...])
        return y, {"conv_q": conv_q, "conv_k": conv_k, "conv_v": conv_v, "memory": memory}

    def initial_state(self, batch, capacity):
        heads, key, value = self.sizes
        return {
            "conv_q": self.q.initial_state(batch),
            "conv_k": self.k.initial_state(batch),
            "conv_v": self.v.initial_state(batch),
            "memory": jnp.zeros((batch, heads, key, value), jnp.float32),
        }

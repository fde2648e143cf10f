"""DeltaProduct: several delta-rule steps for each token."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from models.mixer import Mixer, head_size
from models.norms import RMSNorm, l2_normalize
from models.params import dense, inverse_softplus, log_uniform, param, uniform
from models.short_convolution import ConvolvedProjection
from ops.delta_rule import delta_rule


class DeltaProduct(Mixer):
    """S_{t,0} = alpha_t S_{t-1}, S_{t,j} = (I - beta_{t,j} k_{t,j} k_{t,j}^T) S_{t,j-1} + beta_{t,j} k_{t,j} v_{t,j}^T for
    j = 1..n, S_t = S_{t,n}, o_t = S_t^T q_t / sqrt(K), y = W_o norm(o) (arXiv 2502.10297, section 3).

    The transition is a product of n generalised Householder matrices, each with its own key, value and beta, so that it can
    rotate and permute. q, k = l2norm(silu(conv(W x))), v = silu(conv(W x)), beta = 2 sigmoid(W_b x). Computed as the delta
    rule over n T tokens, of which every n-th is read. Without gates alpha = 1 and this is DeltaNet for n = 1.
    Gated: log alpha = -exp(A_log) softplus(W_a x + dt_bias) and y = W_o (silu(W_g x) * norm(o)), Gated DeltaNet for n = 1.

    Args:
      steps: n.
      gated: whether there are a decay and an output gate (Gated DeltaProduct).
      heads: number of heads.
      expand_key: size of the keys over the width.
      expand_value: size of the values over the width.
      conv_size: taps of the short convolutions.
      negative_eigenvalues: beta in (0, 2); else in (0, 1).
    """

    paper = "DeltaProduct, arXiv 2502.10297"
    primitive = "delta_rule"
    tiny = {"gated": True}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        steps: int = 2,
        gated: bool = False,
        heads: int = 4,
        expand_key: float = 1.0,
        expand_value: float = 1.0,
        conv_size: int = 4,
        negative_eigenvalues: bool = True,
    ):
        if steps < 1:
            raise UserError(f"delta_product takes one step per token or more, got steps={steps}")
        key = head_size(int(expand_key * width), heads, "the size of the keys")
        value = head_size(int(expand_value * width), heads, "the size of the values")
        self.sizes = (heads, key, value)
        self.steps = steps
        self.gated = gated
        self.beta_scale = 2.0 if negative_eigenvalues else 1.0
        self.q = ConvolvedProjection(width, heads, key, conv_size, rngs=rngs)
        self.k = ConvolvedProjection(width, steps * heads, key, conv_size, rngs=rngs)
        self.v = ConvolvedProjection(width, steps * heads, value, conv_size, rngs=rngs)
        self.w_b = dense(rngs, (width, steps * heads), ("embed", None))
        if gated:
            self.w_a = dense(rngs, (width, heads), ("embed", None))
            log_a = lambda *args: jnp.log(uniform(1e-3, 16.0)(*args))
            self.a_log = param(rngs, log_a, (heads,), (None,), decay=False, keep_float32=True)
            dt_bias = inverse_softplus(log_uniform(1e-3, 0.1))
            self.dt_bias = param(rngs, dt_bias, (heads,), (None,), decay=False, keep_float32=True)
            self.w_g = dense(rngs, (width, heads, value), ("embed", "heads", None))
        self.norm = RMSNorm(value, rngs=rngs)
        self.w_o = dense(rngs, (heads, value, width), ("heads", None, "embed"), inputs=2, gain=(2 * depth) ** -0.5)

    def mix(self, x, state, *, segment_ids, positions):
        initial = {"conv_q": None, "conv_k": None, "conv_v": None, "memory": None} if state is None else state
        q, conv_q = self.q(x, initial["conv_q"], segment_ids)
        k, conv_k = self.k(x, initial["conv_k"], segment_ids)
        v, conv_v = self.v(x, initial["conv_v"], segment_ids)
        k, v = self.as_steps(k), self.as_steps(v)
        beta = self.beta_scale * jax.nn.sigmoid((x @ self.w_b[...]).astype(jnp.float32))
        log_decay = None
        if self.gated:
            dt = jax.nn.softplus((x @ self.w_a[...]).astype(jnp.float32) + self.dt_bias[...])
            log_decay = self.among_steps(-jnp.exp(self.a_log[...]) * dt, 0)
        o, memory = delta_rule(
            self.among_steps(l2_normalize(q), self.steps - 1),
            l2_normalize(k),
            v,
            beta.reshape(*k.shape[:3]),
            log_decay,
            scale=1 / math.sqrt(q.shape[-1]),
            initial_state=initial["memory"],
            segment_ids=None if segment_ids is None else jnp.repeat(segment_ids, self.steps, axis=1),
        )
        o = self.norm(o[:, self.steps - 1 :: self.steps])
        if self.gated:
            o = jax.nn.silu(jnp.einsum("btd,dhv->bthv", x, self.w_g[...])) * o
        y = jnp.einsum("bthv,hvd->btd", o, self.w_o[...])
        return y, {"conv_q": conv_q, "conv_k": conv_k, "conv_v": conv_v, "memory": memory}

    def as_steps(self, x):
        """Makes a token of each step: [B, T, n H, K] -> [B, n T, H, K]."""
        return x.reshape(x.shape[0], -1, self.sizes[0], x.shape[-1])

    def among_steps(self, x, step):
        """Gives x to one step of each token and zeros to the others: [B, T, ...] -> [B, n T, ...]."""
        spread = jnp.zeros((*x.shape[:2], self.steps, *x.shape[2:]), x.dtype).at[:, :, step].set(x)
        return spread.reshape(x.shape[0], -1, *x.shape[2:])

    def initial_state(self, batch, capacity):
        heads, key, value = self.sizes
        return {
            "conv_q": self.q.initial_state(batch),
            "conv_k": self.k.initial_state(batch),
            "conv_v": self.v.initial_state(batch),
            "memory": jnp.zeros((batch, heads, key, value), jnp.float32),
        }

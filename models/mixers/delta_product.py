"""DeltaProduct: several delta-rule steps for each token."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import at_least, head_size, scaled
from models.mixer import Ids, Mixer, Tokens
from models.norms import RMSNorm, l2_normalize
from models.params import dense, log_of, residual_output, step_bias, time_scale, uniform
from models.partitioning import constrain
from models.short_convolution import ConvolvedProjection, convolve
from ops.delta_rule import delta_rule
from ops.elementwise import silu_gate
from ops.projection import project


class DeltaProduct(Mixer):
    """S_{t,0} = alpha_t S_{t-1}, S_{t,j} = (I - beta_{t,j} k_{t,j} k_{t,j}^T) S_{t,j-1} + beta_{t,j} k_{t,j} v_{t,j}^T for
    j = 1..n, S_t = S_{t,n}, o_t = S_t^T q_t / sqrt(K), y = W_o norm(o) (arXiv 2502.10297, section 3).

    The transition is a product of n generalised Householder matrices, each with its own key, value and beta, so that it can
    rotate and permute. q, k = l2norm(silu(conv(W x))), v = silu(conv(W x)), beta = 2 sigmoid(W_b x). It is computed as the
    delta rule over n T tokens, of which every n-th is read. Without gates alpha = 1, and this is DeltaNet for n = 1.
    With gates log alpha = -exp(A_log) softplus(W_a x + dt_bias) and y = W_o (silu(W_g x) * norm(o)), Gated DeltaNet for n = 1.

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
        at_least(1, steps=steps)
        key = head_size(scaled(width, expand_key=expand_key), heads, "the size of the keys")
        value = head_size(scaled(width, expand_value=expand_value), heads, "the size of the values")
        self.sizes = (heads, key, value)
        self.steps = steps
        self.gated = gated
        self.beta_scale = 2.0 if negative_eigenvalues else 1.0
        sizes = ((heads, key), (steps * heads, key), (steps * heads, value))
        self.q, self.k, self.v = (ConvolvedProjection(width, *size, conv_size, rngs=rngs) for size in sizes)
        self.w_b = dense(rngs, (width, steps * heads), ("embed", None))
        if gated:
            self.w_a = dense(rngs, (width, heads), ("embed", None))
            self.a_log = time_scale(rngs, log_of(uniform(1e-3, 16.0)), (heads,), (None,))
            self.dt_bias = time_scale(rngs, step_bias(), (heads,), (None,))
            self.w_g = dense(rngs, (width, heads, value), ("embed", "heads", None))
        self.norm = RMSNorm(value, rngs=rngs)
        self.w_o = residual_output(rngs, (heads, value, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        # What `tensor` does not split comes first, and the gradients of the others are summed over it together.
        beta = self.beta_scale * jax.nn.sigmoid(project(x, self.w_b[...]).astype(jnp.float32))
        log_decay = None
        if self.gated:
            dt = jax.nn.softplus(project(x, self.w_a[...]).astype(jnp.float32) + self.dt_bias[...])
            log_decay = self.among_steps(-jnp.exp(self.a_log[...]) * dt, 0)
        conv = None if state is None else state["conv"]
        (q, k, v), conv = convolve((self.q, self.k, self.v), x, conv, segment_ids)
        k, v = self.as_steps(k), self.as_steps(v)
        o, memory = delta_rule(
            self.among_steps(l2_normalize(q), self.steps - 1),
            l2_normalize(k),
            v,
            beta.reshape(*k.shape[:3]),
            log_decay,
            scale=1 / math.sqrt(q.shape[-1]),
            initial_state=None if state is None else state["memory"],
            segment_ids=None if segment_ids is None else jnp.repeat(segment_ids, self.steps, axis=1),
        )
        o = self.norm(o[:, self.steps - 1 :: self.steps])
        if self.gated:
            o = silu_gate(project(x, self.w_g[...]), o)
        y = project(o, self.w_o[...], inputs=2)
        return y, {"conv": conv, "memory": memory}

    def as_steps(self, x):
        """Makes a token of each step: [B, T, n H, K] -> [B, n T, H, K]."""
        x = constrain(x.reshape(*x.shape[:2], self.steps, -1, x.shape[-1]), "batch", "length", None, "heads", None)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def among_steps(self, x, step):
        """Gives x to one step of each token and zeros to the others: [B, T, ...] -> [B, n T, ...]."""
        spread = jnp.zeros((*x.shape[:2], self.steps, *x.shape[2:]), x.dtype).at[:, :, step].set(x)
        return spread.reshape(x.shape[0], -1, *x.shape[2:])

    def initial_state(self, batch: int, capacity: int) -> dict:
        heads, key, value = self.sizes
        return {
            "conv": [projection.initial_state(batch) for projection in (self.q, self.k, self.v)],
            "memory": jnp.zeros((batch, heads, key, value), jnp.float32),
        }

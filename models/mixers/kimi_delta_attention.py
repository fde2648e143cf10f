"""Kimi Delta Attention."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.mixer import Mixer, head_size
from models.norms import RMSNorm, l2_normalize
from models.params import dense, inverse_softplus, log_uniform, param, uniform
from models.partitioning import constrain
from ops.delta_rule import delta_rule
from ops.short_convolution import short_convolution


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
    ):
        if lower_bound is not None and lower_bound >= 0:
            raise ValueError(f"lower_bound bounds a log-decay: make it negative, or None; got {lower_bound}")
        inner = int(expand * width)
        size = head_size(inner, heads, "the size of the keys")
        self.sizes = (heads, size)
        self.conv_size = conv_size
        self.lower_bound = lower_bound
        self.w_q = dense(rngs, (width, inner), ("embed", "heads"))
        self.w_k = dense(rngs, (width, inner), ("embed", "heads"))
        self.w_v = dense(rngs, (width, inner), ("embed", "heads"))
        tap = uniform(-(conv_size**-0.5), conv_size**-0.5)
        self.conv_q = param(rngs, tap, (conv_size, inner), (None, "heads"), decay=False)
        self.conv_k = param(rngs, tap, (conv_size, inner), (None, "heads"), decay=False)
        self.conv_v = param(rngs, tap, (conv_size, inner), (None, "heads"), decay=False)
        self.w_b = dense(rngs, (width, heads), ("embed", None))
        self.w_f1 = dense(rngs, (width, size), ("embed", None))
        self.w_f2 = dense(rngs, (size, heads, size), (None, "heads", None))
        log_a = lambda *args: jnp.log(uniform(1.0, 16.0)(*args))
        self.a_log = param(rngs, log_a, (heads,), (None,), decay=False, keep_float32=True)
        dt_bias = inverse_softplus(log_uniform(1e-3, 0.1))
        self.dt_bias = param(rngs, dt_bias, (heads, size), ("heads", None), decay=False, keep_float32=True)
        self.w_g1 = dense(rngs, (width, size), ("embed", None))
        self.w_g2 = dense(rngs, (size, heads, size), (None, "heads", None))
        self.norm = RMSNorm(size, rngs=rngs)
        self.w_o = dense(rngs, (heads, size, width), ("heads", None, "embed"), inputs=2, gain=(2 * depth) ** -0.5)

    def mix(self, x, state, *, segment_ids, positions):
        _, size = self.sizes
        new = {}

        def branch(name, w, taps):
            initial = None if state is None else state[name]
            u = constrain(x @ w[...], "batch", "length", "heads")
            u, new[name] = short_convolution(u, taps[...], initial_state=initial, segment_ids=segment_ids)
            return jax.nn.silu(u).reshape(*u.shape[:2], -1, size)

        low_rank = lambda w1, w2: jnp.einsum("btr,rhk->bthk", x @ w1[...], w2[...])
        q = l2_normalize(branch("conv_q", self.w_q, self.conv_q))
        k = l2_normalize(branch("conv_k", self.w_k, self.conv_k))
        v = branch("conv_v", self.w_v, self.conv_v)
        o, new["memory"] = delta_rule(
            q,
            k,
            v,
            jax.nn.sigmoid((x @ self.w_b[...]).astype(jnp.float32)),
            self.log_decay(low_rank(self.w_f1, self.w_f2)),
            scale=1 / math.sqrt(size),
            initial_state=None if state is None else state["memory"],
            segment_ids=segment_ids,
        )
        gate = jax.nn.sigmoid(low_rank(self.w_g1, self.w_g2))
        return jnp.einsum("bthv,hvd->btd", gate * self.norm(o), self.w_o[...]), new

    def log_decay(self, f):
        f = f.astype(jnp.float32) + self.dt_bias[...]
        rate = jnp.exp(self.a_log[...])[:, None]
        if self.lower_bound is None:
            return -rate * jax.nn.softplus(f)
        return self.lower_bound * jax.nn.sigmoid(rate * f)

    def initial_state(self, batch, capacity):
        heads, size = self.sizes
        taps = {name: jnp.zeros((batch, self.conv_size - 1, heads * size)) for name in ("conv_q", "conv_k", "conv_v")}
        return taps | {"memory": jnp.zeros((batch, heads, size, size), jnp.float32)}

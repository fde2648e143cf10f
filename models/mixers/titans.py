"""Titans' long-term memory, in the linear case."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.mixer import Mixer, head_size
from models.norms import RMSNorm, l2_normalize
from models.params import dense, log_uniform, param, uniform, zeros
from models.partitioning import constrain
from ops.momentum_delta_rule import momentum_delta_rule
from ops.short_convolution import short_convolution


class Titans(Mixer):
    """M_t = (1 - alpha_t) M_{t-1} + S_t, S_t = eta_t S_{t-1} - theta_t grad l(M_{t-1}; k_t, v_t),
    l(M; k, v) = |M^T k - v|^2 / 2, o_t = M_t^T q_t / sqrt(K), y = W_o (silu(W_g x) * norm(o))
    (arXiv 2501.00663, equations 9-15 and section 4.4).

    A memory trained by gradient descent with momentum S and weight decay alpha while the sequence is read. q, k =
    l2norm(silu(conv(W x))), v = silu(conv(W x)); eta = sigmoid(W_eta x + b_eta), theta = sigmoid(W_theta x + b_theta),
    alpha = sigmoid(W_alpha x + b_alpha), one for each head. Without momentum (eta = 0) this is a gated delta rule.

    Departures: the memory is one matrix per head, starting from zero, and not an MLP; its chunks are exact, so the gradient is
    always that of the last step's memory (the paper takes it at the start of the chunk). The loss is halved: with the paper's,
    steps of theta near 1 and a strong momentum make the memory explode. 1/sqrt(K) only scales what `norm` undoes. b_alpha
    starts such that memories last from ten to a thousand tokens (the paper says nothing). This is the memory as a layer (LMM),
    without the attention of MAC, MAG and MAL.

    Args:
      heads: number of heads.
      expand_key: size of the keys over the width.
      expand_value: size of the values over the width.
      conv_size: taps of the short convolutions.
    """

    paper = "Titans, arXiv 2501.00663"
    primitive = "momentum_delta_rule"

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        expand_key: float = 1.0,
        expand_value: float = 1.0,
        conv_size: int = 4,
    ):
        key = head_size(int(expand_key * width), heads, "the size of the keys")
        value = head_size(int(expand_value * width), heads, "the size of the values")
        self.sizes = (heads, key, value)
        self.conv_size = conv_size
        self.w_q = dense(rngs, (width, heads * key), ("embed", "heads"))
        self.w_k = dense(rngs, (width, heads * key), ("embed", "heads"))
        self.w_v = dense(rngs, (width, heads * value), ("embed", "heads"))
        self.w_g = dense(rngs, (width, heads, value), ("embed", "heads", None))
        tap = uniform(-(conv_size**-0.5), conv_size**-0.5)
        self.conv_q = param(rngs, tap, (conv_size, heads * key), (None, "heads"), decay=False)
        self.conv_k = param(rngs, tap, (conv_size, heads * key), (None, "heads"), decay=False)
        self.conv_v = param(rngs, tap, (conv_size, heads * value), (None, "heads"), decay=False)
        self.w_eta = dense(rngs, (width, heads), ("embed", None))
        self.w_theta = dense(rngs, (width, heads), ("embed", None))
        self.w_alpha = dense(rngs, (width, heads), ("embed", None))
        logit = lambda *args: jax.scipy.special.logit(log_uniform(1e-3, 0.1)(*args))
        self.b_eta = param(rngs, zeros, (heads,), (None,), decay=False, keep_float32=True)
        self.b_theta = param(rngs, zeros, (heads,), (None,), decay=False, keep_float32=True)
        self.b_alpha = param(rngs, logit, (heads,), (None,), decay=False, keep_float32=True)
        self.norm = RMSNorm(value, rngs=rngs)
        self.w_o = dense(rngs, (heads, value, width), ("heads", None, "embed"), inputs=2, gain=(2 * depth) ** -0.5)

    def mix(self, x, state, *, segment_ids, positions):
        _, key, value = self.sizes
        new = {}

        def branch(name, w, taps, size):
            initial = None if state is None else state[name]
            u = constrain(x @ w[...], "batch", "length", "heads")
            u, new[name] = short_convolution(u, taps[...], initial_state=initial, segment_ids=segment_ids)
            return jax.nn.silu(u).reshape(*u.shape[:2], -1, size)

        gate = lambda w, b: (x @ w[...]).astype(jnp.float32) + b[...]
        o, (new["memory"], new["momentum"]) = momentum_delta_rule(
            l2_normalize(branch("conv_q", self.w_q, self.conv_q, key)),
            l2_normalize(branch("conv_k", self.w_k, self.conv_k, key)),
            branch("conv_v", self.w_v, self.conv_v, value),
            jax.nn.sigmoid(gate(self.w_theta, self.b_theta)),
            jax.nn.log_sigmoid(gate(self.w_eta, self.b_eta)),
            jax.nn.log_sigmoid(-gate(self.w_alpha, self.b_alpha)),
            scale=1 / math.sqrt(key),
            initial_state=None if state is None else (state["memory"], state["momentum"]),
            segment_ids=segment_ids,
        )
        g = jnp.einsum("btd,dhv->bthv", x, self.w_g[...])
        return jnp.einsum("bthv,hvd->btd", jax.nn.silu(g) * self.norm(o), self.w_o[...]), new

    def initial_state(self, batch, capacity):
        heads, key, value = self.sizes
        taps = lambda size: jnp.zeros((batch, self.conv_size - 1, heads * size), jnp.float32)
        matrix = jnp.zeros((batch, heads, key, value), jnp.float32)
        convolutions = {"conv_q": taps(key), "conv_k": taps(key), "conv_v": taps(value)}
        return convolutions | {"memory": matrix, "momentum": matrix}

"""Titans' long-term memory, in the linear case."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import head_size, scaled
from models.mixer import Ids, Mixer, Tokens
from models.norms import RMSNorm, l2_normalize
from models.params import dense, log_uniform, param, residual_output, time_scale, zeros
from models.short_convolution import ConvolvedProjection, convolve
from ops.elementwise import silu_gate
from ops.momentum_delta_rule import momentum_delta_rule
from ops.projection import project


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
    sequence_parallel = ()  # no function of `ops` passes its memory on

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
        key = head_size(scaled(width, expand_key=expand_key), heads, "the size of the keys")
        value = head_size(scaled(width, expand_value=expand_value), heads, "the size of the values")
        self.sizes = (heads, key, value)
        sizes = ((heads, key), (heads, key), (heads, value))
        self.q, self.k, self.v = (ConvolvedProjection(width, *size, conv_size, rngs=rngs) for size in sizes)
        self.w_g = dense(rngs, (width, heads, value), ("embed", "heads", None))
        self.w_eta = dense(rngs, (width, heads), ("embed", None))
        self.w_theta = dense(rngs, (width, heads), ("embed", None))
        self.w_alpha = dense(rngs, (width, heads), ("embed", None))
        self.b_eta = param(rngs, zeros, (heads,), (None,), decay=False, keep_float32=True)
        self.b_theta = param(rngs, zeros, (heads,), (None,), decay=False, keep_float32=True)
        self.b_alpha = time_scale(rngs, forgetting, (heads,), (None,))
        self.norm = RMSNorm(value, rngs=rngs)
        self.w_o = residual_output(rngs, (heads, value, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        conv = None if state is None else state["conv"]
        (q, k, v), conv = convolve((self.q, self.k, self.v), x, conv, segment_ids)
        gate = lambda w, b: project(x, w[...]).astype(jnp.float32) + b[...]
        o, (memory, momentum) = momentum_delta_rule(
            l2_normalize(q),
            l2_normalize(k),
            v,
            jax.nn.sigmoid(gate(self.w_theta, self.b_theta)),
            jax.nn.log_sigmoid(gate(self.w_eta, self.b_eta)),
            jax.nn.log_sigmoid(-gate(self.w_alpha, self.b_alpha)),
            scale=1 / math.sqrt(q.shape[-1]),
            initial_state=None if state is None else (state["memory"], state["momentum"]),
            segment_ids=segment_ids,
        )
        g = project(x, self.w_g[...])
        y = project(silu_gate(g, self.norm(o)), self.w_o[...], inputs=2)
        return y, {"conv": conv, "memory": memory, "momentum": momentum}

    def initial_state(self, batch: int, capacity: int) -> dict:
        heads, key, value = self.sizes
        matrix = jnp.zeros((batch, heads, key, value), jnp.float32)
        return {
            "conv": [projection.initial_state(batch) for projection in (self.q, self.k, self.v)],
            "memory": matrix,
            "momentum": matrix,
        }


def forgetting(key, shape, dtype):
    """b_alpha, whose sigmoid is log-uniform between 1/1000 and 1/10."""
    return jax.scipy.special.logit(log_uniform(1e-3, 0.1)(key, shape, dtype))

"""Multi-scale retention."""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.checks import at_least, check_rotated, head_size, scaled
from models.mixer import Ids, MatrixState, Mixer, Tokens
from models.norms import rms_normalize
from models.params import param, xavier_uniform
from models.partitioning import constrain
from ops.elementwise import silu_gate
from ops.linear_attention import linear_attention
from ops.projection import project
from ops.rotary import rotary


class RetNet(Mixer):
    """S_t = gamma S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, y = W_o (silu(W_g x) * norm(o)) (arXiv 2307.08621, section 2).

    gamma_h = 1 - 2^(-5-h). Queries and keys are rotated in interleaved pairs by angles 10000^(-linspace(0, 1, K/2)), keys are
    scaled by 1/sqrt(K), and each head's output is RMS-normalised without a weight.

    The authors' code also divides scores and states by running sums that cancel in the norm but for its eps; they are left
    out, so that the parallel, chunked and recurrent forms are the same function.

    Args:
      heads: number of heads.
      expand_value: size of the values over the width.
      eps: of the head norm.
    """

    paper = "RetNet, arXiv 2307.08621"
    primitive = "linear_attention"

    def __init__(self, width: int, *, rngs: nnx.Rngs, heads: int = 4, expand_value: float = 2.0, eps: float = 1e-6):
        at_least(0, eps=eps)
        key = head_size(width, heads, "width")
        values = scaled(width, expand_value=expand_value)
        value = head_size(values, heads, "the size of the values")
        check_rotated(key)
        self.eps = eps
        self.sizes = (heads, key, value)
        init = lambda outputs: xavier_uniform(width, outputs, gain=2**-2.5)
        self.w_q = param(rngs, init(width), (width, heads, key), ("embed", "heads", None))
        self.w_k = param(rngs, init(width), (width, heads, key), ("embed", "heads", None))
        self.w_v = param(rngs, init(values), (width, heads, value), ("embed", "heads", None))
        self.w_g = param(rngs, init(values), (width, heads, value), ("embed", "heads", None))
        out = xavier_uniform(values, width, gain=0.5)
        self.w_o = param(rngs, out, (heads, value, width), ("heads", None, "embed"))

    def mix(
        self, x: Tokens, state: MatrixState | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, MatrixState | None]:
        heads, key, _ = self.sizes
        log_decay = jnp.asarray(np.log1p(-(2.0 ** (-5 - np.arange(heads)))), jnp.float32)
        frequencies = jnp.asarray(10000.0 ** -np.linspace(0, 1, key // 2), jnp.float32)
        to_heads = lambda w: constrain(project(x, w[...]), "batch", "length", "heads", None)
        q, k, v, g = to_heads(self.w_q), to_heads(self.w_k), to_heads(self.w_v), to_heads(self.w_g)
        q, k = (rotary(a, positions, frequencies=frequencies, layout="interleaved") for a in (q, k))
        o, state = linear_attention(
            q, k, v, log_decay, scale=1 / math.sqrt(key), initial_state=state, segment_ids=segment_ids
        )
        y = silu_gate(g, rms_normalize(o, self.eps))
        return project(y, self.w_o[...], inputs=2), state

    def initial_state(self, batch: int, capacity: int) -> MatrixState:
        return jnp.zeros((batch, *self.sizes), jnp.float32)

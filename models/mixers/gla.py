"""Gated linear attention."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.mixer import Mixer, head_size
from models.norms import RMSNorm
from models.params import dense, param, zeros
from models.partitioning import constrain
from ops.linear_attention import linear_attention


class GatedLinearAttention(Mixer):
    """S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K), y = W_o (silu(W_g x) * norm(o))
    (arXiv 2312.06635, section 4).

    alpha_t = sigmoid(W_2 W_1 x_t + b)^(1/tau), a decay for each key channel from a low-rank map of the input.

    Args:
      heads: number of heads.
      expand_key: size of the keys over the width.
      expand_value: size of the values over the width.
      gate_rank: rank of W_2 W_1.
      gate_temperature: tau.
    """

    paper = "GLA, arXiv 2312.06635"
    primitive = "linear_attention"

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        expand_key: float = 0.5,
        expand_value: float = 1.0,
        gate_rank: int = 16,
        gate_temperature: float = 16.0,
    ):
        key = head_size(int(expand_key * width), heads, "the size of the keys")
        value = head_size(int(expand_value * width), heads, "the size of the values")
        self.state_shape = (heads, key, value)
        self.gate_temperature = gate_temperature
        self.w_q = dense(rngs, (width, heads, key), ("embed", "heads", None))
        self.w_k = dense(rngs, (width, heads, key), ("embed", "heads", None))
        self.w_v = dense(rngs, (width, heads, value), ("embed", "heads", None))
        self.w_g = dense(rngs, (width, heads, value), ("embed", "heads", None))
        self.w_decay_in = dense(rngs, (width, gate_rank), ("embed", None))
        self.w_decay_out = dense(rngs, (gate_rank, heads, key), (None, "heads", None))
        self.b_decay = param(rngs, zeros, (heads, key), ("heads", None), decay=False, keep_float32=True)
        self.norm = RMSNorm(value, rngs=rngs)
        self.w_o = dense(rngs, (heads, value, width), ("heads", None, "embed"), inputs=2, gain=(2 * depth) ** -0.5)

    def mix(self, x, state, *, segment_ids, positions):
        project = lambda w: constrain(jnp.einsum("btd,dhk->bthk", x, w[...]), "batch", "length", "heads", None)
        q, k, v, g = project(self.w_q), project(self.w_k), project(self.w_v), project(self.w_g)
        gate = jnp.einsum("btr,rhk->bthk", x @ self.w_decay_in[...], self.w_decay_out[...])
        log_decay = jax.nn.log_sigmoid(gate.astype(jnp.float32) + self.b_decay[...]) / self.gate_temperature
        o, state = linear_attention(
            q, k, v, log_decay, scale=1 / math.sqrt(q.shape[-1]), initial_state=state, segment_ids=segment_ids
        )
        return jnp.einsum("bthv,hvd->btd", jax.nn.silu(g) * self.norm(o), self.w_o[...]), state

    def initial_state(self, batch, capacity):
        return jnp.zeros((batch, *self.state_shape), jnp.float32)

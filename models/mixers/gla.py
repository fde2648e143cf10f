"""Gated linear attention."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import at_least, head_size, positive, scaled
from models.mixer import Ids, MatrixState, Mixer, Tokens
from models.norms import RMSNorm
from models.params import dense, param, residual_output, zeros
from models.partitioning import constrain
from ops.elementwise import silu_gate
from ops.linear_attention import linear_attention
from ops.projection import project


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
        at_least(1, gate_rank=gate_rank)
        positive(gate_temperature=gate_temperature)
        key = head_size(scaled(width, expand_key=expand_key), heads, "the size of the keys")
        value = head_size(scaled(width, expand_value=expand_value), heads, "the size of the values")
        self.sizes = (heads, key, value)
        self.gate_temperature = gate_temperature
        self.w_q = dense(rngs, (width, heads, key), ("embed", "heads", None))
        self.w_k = dense(rngs, (width, heads, key), ("embed", "heads", None))
        self.w_v = dense(rngs, (width, heads, value), ("embed", "heads", None))
        self.w_g = dense(rngs, (width, heads, value), ("embed", "heads", None))
        self.w_decay_in = dense(rngs, (width, gate_rank), ("embed", None))
        self.w_decay_out = dense(rngs, (gate_rank, heads, key), (None, "heads", None))
        self.b_decay = param(rngs, zeros, (heads, key), ("heads", None), decay=False, keep_float32=True)
        self.norm = RMSNorm(value, rngs=rngs)
        self.w_o = residual_output(rngs, (heads, value, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: MatrixState | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, MatrixState | None]:
        to_heads = lambda w: constrain(project(x, w[...]), "batch", "length", "heads", None)
        # First what `tensor` does not split: the others' gradients of x are then one sum over its devices.
        gate = project(project(x, self.w_decay_in[...]), self.w_decay_out[...])
        q, k, v, g = to_heads(self.w_q), to_heads(self.w_k), to_heads(self.w_v), to_heads(self.w_g)
        log_decay = jax.nn.log_sigmoid(gate.astype(jnp.float32) + self.b_decay[...]) / self.gate_temperature
        o, state = linear_attention(
            q, k, v, log_decay, scale=1 / math.sqrt(q.shape[-1]), initial_state=state, segment_ids=segment_ids
        )
        return project(silu_gate(g, self.norm(o)), self.w_o[...], inputs=2), state

    def initial_state(self, batch: int, capacity: int) -> MatrixState:
        return jnp.zeros((batch, *self.sizes), jnp.float32)

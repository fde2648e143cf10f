"""HGRN2, the hierarchically gated recurrent network with an outer-product state."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import head_size
from models.lower_bounds import LowerBounds
from models.mixer import Context, Ids, MatrixState, Mixer, Tokens
from models.norms import RMSNorm
from models.params import dense, residual_output
from models.partitioning import constrain
from ops.elementwise import silu
from ops.linear_attention import linear_attention
from ops.projection import project


class LowerBoundsOfHeads(LowerBounds):
    """The same, where channels belong to heads."""

    axis = "heads"


class HGRN2(Mixer):
    """S_t = Diag(f_t) S_{t-1} + (1 - f_t) v_t^T, o_t = S_t^T q_t, y = W_o RMSNorm(o) (arXiv 2404.07904, section 3).

    q = silu(W_q x), v = W_v x and f_t = gamma^k + (1 - gamma^k) sigmoid(W_f x_t) in layer k, a forget gate per key channel;
    the lower bounds gamma rise with depth and are learned for all layers together, as in HGRN. The size of a head is the
    paper's expansion ratio (128 there). There is no output gate, as in flash-linear-attention's layer.

    Args:
      heads: number of heads.
    """

    uses_context = True
    Shared: ClassVar[type[nnx.Module]] = LowerBoundsOfHeads
    paper = "HGRN2, arXiv 2404.07904"
    primitive = "linear_attention"

    def __init__(self, width: int, *, rngs: nnx.Rngs, depth: int = 1, heads: int = 4):
        size = head_size(width, heads, "width")
        self.sizes = (heads, size, size)
        self.w_q = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_f = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_v = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.norm = RMSNorm(width, rngs=rngs, axis="heads")
        self.w_o = residual_output(rngs, (width, width), ("heads", "embed"), depth)

    def mix(
        self, x: Tokens, state: MatrixState | None, *, segment_ids: Ids | None, positions: Ids, context: Context
    ) -> tuple[Tokens, MatrixState | None, Any]:
        to_heads = lambda w: constrain(project(x, w[...]), "batch", "length", "heads", None)
        q, v = silu(to_heads(self.w_q)), to_heads(self.w_v)
        z = to_heads(self.w_f).astype(jnp.float32)
        bound = context.stream[context.layer].reshape(z.shape[2:])
        # f = (1 + gamma e^-z) / (1 + e^-z); the floor keeps log gamma and its gradient finite in the first layer.
        log_f = jax.nn.softplus(jnp.log(jnp.maximum(bound, 1e-30)) - z) - jax.nn.softplus(-z)
        k = (1 - bound) * jax.nn.sigmoid(-z)
        o, state = linear_attention(q, k, v, log_f, initial_state=state, segment_ids=segment_ids)
        return project(self.norm(o.reshape(x.shape)), self.w_o[...]), state, context.stream

    def initial_state(self, batch: int, capacity: int) -> MatrixState:
        return jnp.zeros((batch, *self.sizes), jnp.float32)

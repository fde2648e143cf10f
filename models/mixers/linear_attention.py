"""Linear attention with the feature map elu + 1."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.checks import at_least, head_size
from models.kernel_attention import kernel_attention
from models.mixer import Ids, MatrixState, Mixer, Tokens
from models.params import dense, residual_output
from models.partitioning import constrain
from ops.projection import project, project_each


class LinearAttention(Mixer):
    """y_t = phi(q_t)^T S_t / (phi(q_t)^T z_t + eps), S_t = sum_{s<=t} phi(k_s) v_s^T, z_t = sum_{s<=t} phi(k_s),
    phi(x) = elu(x) + 1 (Transformers are RNNs, arXiv 2006.16236, equations 7, 9, 18-20). Two-sided: the sums run over all s.

    There is no 1/sqrt(K): phi is not homogeneous, so a scale would not cancel.

    Args:
      heads: number of heads.
      eps: added to the denominator.
    """

    bidirectional = True
    position_aware = False
    paper = "Transformers are RNNs, arXiv 2006.16236"
    primitive = "linear_attention"

    def __init__(
        self, width: int, *, rngs: nnx.Rngs, causal: bool = True, depth: int = 1, heads: int = 4, eps: float = 1e-6
    ):
        at_least(0, eps=eps)
        size = head_size(width, heads, "width")
        self.causal = causal
        self.eps = eps
        self.sizes = (heads, size, size + 1)
        self.w_qkv = dense(rngs, (width, 3, heads, size), ("embed", None, "heads", None))
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: MatrixState | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, MatrixState | None]:
        q, k, v = (constrain(a, "batch", "length", "heads", None) for a in project_each(x, self.w_qkv[...]))
        q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
        y, state = kernel_attention(
            q, k, v, causal=self.causal, eps=self.eps, initial_state=state, segment_ids=segment_ids
        )
        return project(y, self.w_o[...], inputs=2), state

    def attention_scores(
        self, x: Tokens, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Float[Array, "B H T T"], str]:
        """How every query scores every key, for diagnostics; see `evaluation.diagnostics.measures.score_gradients`."""
        q, k = (jax.nn.elu(a) + 1 for a in project_each(x, self.w_qkv[:, :2]))
        return jnp.einsum("bthk,bshk->bhts", q, k), "sum"

    def initial_state(self, batch: int, capacity: int) -> MatrixState:
        return jnp.zeros((batch, *self.sizes), jnp.float32)

"""cosFormer."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.checks import head_size, positive
from models.kernel_attention import kernel_attention
from models.mixer import Ids, MatrixState, Mixer, Tokens
from models.params import dense, residual_output
from models.partitioning import constrain
from ops.projection import project, project_each


class CosFormer(Mixer):
    """y_i = sum_j s_ij v_j / sum_j s_ij, s_ij = relu(q_i) . relu(k_j) cos(pi/2 (i - j) / M), over j <= i or all j
    (arXiv 2202.08791, equations 9 to 12).

    By Ptolemy's theorem s_ij is a product of features: phi(q_i) = [relu(q_i) cos(pi i / 2M), relu(q_i) sin(pi i / 2M)], the
    same for k_j with j. Positions count from 1, and the denominator is at least `eps`, as in the authors' code.

    The authors' M is the length of the sequence at hand, so that what a prefix gives changes as the sequence grows. Here M
    is the length that the model is built for. Tokens beyond it take the position M: further apart than M the cosine would
    be negative, and the denominator with it.

    Args:
      heads: number of heads.
      eps: least denominator.
    """

    bidirectional = True
    paper = "cosFormer, arXiv 2202.08791"
    primitive = "linear_attention"

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = True,
        depth: int = 1,
        length: int = 512,
        heads: int = 4,
        eps: float = 1e-6,
    ):
        positive(eps=eps)
        size = head_size(width, heads, "width")
        self.causal = causal
        self.length = length
        self.eps = eps
        self.sizes = (heads, 2 * size, size + 1)
        self.w_qkv = dense(rngs, (width, 3, heads, size), ("embed", None, "heads", None))
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: MatrixState | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, MatrixState | None]:
        q, k, v = (constrain(a, "batch", "length", "heads", None) for a in project_each(x, self.w_qkv[...]))
        angle = math.pi / (2 * self.length) * jnp.minimum(positions + 1, self.length).astype(jnp.float32)
        cos, sin = (f(angle)[:, :, None, None] for f in (jnp.cos, jnp.sin))
        phi = lambda a: jnp.concatenate([jax.nn.relu(a) * cos, jax.nn.relu(a) * sin], -1)
        y, state = kernel_attention(
            phi(q), phi(k), v, causal=self.causal, floor=self.eps, initial_state=state, segment_ids=segment_ids
        )
        return project(y, self.w_o[...], inputs=2), state

    def attention_scores(
        self, x: Tokens, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Float[Array, "B H T T"], str]:
        """How every query scores every key, for diagnostics; see `evaluation.diagnostics.measures.score_gradients`."""
        q, k = (jax.nn.relu(a) for a in project_each(x, self.w_qkv[:, :2]))
        place = jnp.minimum(positions + 1, self.length)
        angle = math.pi / (2 * self.length) * (place[:, :, None] - place[:, None])
        return jnp.einsum("bthk,bshk->bhts", q, k) * jnp.cos(angle)[:, None], "sum"

    def initial_state(self, batch: int, capacity: int) -> MatrixState:
        return jnp.zeros((batch, *self.sizes), jnp.float32)

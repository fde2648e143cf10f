"""Hedgehog: linear attention with a learned feature map of spikes."""

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import at_least, head_size
from models.kernel_attention import kernel_attention
from models.mixer import Ids, MatrixState, Mixer, Tokens
from models.params import constant, dense, param, residual_output
from models.partitioning import constrain
from ops.projection import project, project_blocks, project_each


class Hedgehog(Mixer):
    """y_t = sum_{s<=t} (phi(q_t) . phi(k_s)) v_s / (sum_{s<=t} phi(q_t) . phi(k_s) + eps), phi(x) = softmax([M x, -M x])
    (The Hedgehog and the Porcupine, arXiv 2402.04347, section 4). Two-sided: the sums run over all s.

    M is [K, K], starts as the identity, and is learned for each head, one for queries and one for keys. The softmax over the
    2K features is the paper's [exp(M x), exp(-M x)], normalised for stability; the authors' later code normalises the two halves
    apart instead. Maps have no bias, as in that code. This is the mixer trained from scratch; the paper's distillation of a
    softmax attention is a loss, and not here.

    Args:
      heads: number of heads.
      eps: added to the denominator.
    """

    bidirectional = True
    position_aware = False
    paper = "Hedgehog, arXiv 2402.04347"
    primitive = "linear_attention"

    def __init__(
        self, width: int, *, rngs: nnx.Rngs, causal: bool = True, depth: int = 1, heads: int = 4, eps: float = 1e-6
    ):
        at_least(0, eps=eps)
        size = head_size(width, heads, "width")
        self.causal = causal
        self.eps = eps
        self.sizes = (heads, 2 * size, size + 1)
        self.w_qkv = dense(rngs, (width, 3, heads, size), ("embed", None, "heads", None))
        self.map = param(
            rngs, constant(jnp.eye(size)), (2, heads, size, size), (None, "heads", None, None), inputs=(2,)
        )
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: MatrixState | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, MatrixState | None]:
        *qk, v = (constrain(a, "batch", "length", "heads", None) for a in project_each(x, self.w_qkv[...]))
        qk = (project_blocks(a, w).astype(jnp.float32) for a, w in zip(qk, self.map[...], strict=True))
        q, k = (jax.nn.softmax(jnp.concatenate([a, -a], -1), axis=-1) for a in qk)
        y, state = kernel_attention(
            q,
            k,
            v,
            causal=self.causal,
            eps=self.eps,
            initial_state=state,
            segment_ids=segment_ids,
        )
        return project(y, self.w_o[...], inputs=2), state

    def initial_state(self, batch: int, capacity: int) -> MatrixState:
        return jnp.zeros((batch, *self.sizes), jnp.float32)

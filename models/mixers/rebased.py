"""ReBased: linear attention with a learned quadratic kernel."""

import math

import jax.numpy as jnp
from flax import nnx

from models.checks import at_least, head_size
from models.kernel_attention import kernel_attention
from models.mixer import Ids, MatrixState, Mixer, Tokens
from models.norms import LayerNorm
from models.params import dense, residual_output
from models.partitioning import constrain
from ops.polynomial_attention import SQUARE, feature_count
from ops.projection import project, project_each


class ReBased(Mixer):
    """y_t = sum_{s<=t} a_ts v_s / (sum_{s<=t} a_ts + eps), a_ts = (q_t . k_s)^2 / F, q = layernorm(W_q x), k = layernorm(W_k x)
    (Linear Transformers with Learnable Kernel Functions, arXiv 2402.10644). Two-sided: the sums run over all s.

    The norms' weights and biases are the paper's gamma and beta: they place the minimum of the parabola, which lets a token
    be ignored, as Based's kernel (at least 1/2) does not. As in the authors' code a norm spans all heads. It is a linear
    attention with the F (F + 1) / 2 products of components as features.

    Args:
      heads: number of heads.
      feature_size: F, components of a query or key.
      eps: added to the denominator, which can vanish; a_ts is about 1 on average. The authors' 1e-12 needs scores that are
        squared one by one: as a sum over features, with its cancellations, a small a_ts has an error near 1e-6.
    """

    bidirectional = True
    position_aware = False
    paper = "ReBased, arXiv 2402.10644"
    primitive = "polynomial_attention"
    tiny = {"feature_size": 6, "eps": 0.1}  # smaller denominators, as first tokens have, amplify rounding errors

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = True,
        depth: int = 1,
        heads: int = 4,
        feature_size: int = 16,
        eps: float = 1e-3,
    ):
        at_least(1, feature_size=feature_size)
        at_least(0, eps=eps)
        size = head_size(width, heads, "width")
        self.causal = causal
        self.eps = eps
        self.feature_size = feature_size
        self.sizes = (heads, feature_count(feature_size, SQUARE), size + 1)
        self.w_qk = dense(rngs, (width, 2, heads * feature_size), ("embed", None, "heads"))
        self.norm_q = LayerNorm(heads * feature_size, rngs=rngs, axis="heads")
        self.norm_k = LayerNorm(heads * feature_size, rngs=rngs, axis="heads")
        self.w_v = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: MatrixState | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, MatrixState | None]:
        heads = self.sizes[0]
        q, k = (constrain(a, "batch", "length", "heads") for a in project_each(x, self.w_qk[...]))
        split = lambda a: a.astype(jnp.float32).reshape(*a.shape[:2], heads, self.feature_size)
        q, k = split(self.norm_q(q)), split(self.norm_k(k))
        v = constrain(project(x, self.w_v[...]), "batch", "length", "heads", None)
        y, state = kernel_attention(
            q / math.sqrt(self.feature_size),
            k,
            v,
            causal=self.causal,
            polynomial=SQUARE,
            eps=self.eps,
            initial_state=state,
            segment_ids=segment_ids,
        )
        return project(y, self.w_o[...], inputs=2), state

    def initial_state(self, batch: int, capacity: int) -> MatrixState:
        return jnp.zeros((batch, *self.sizes), jnp.float32)

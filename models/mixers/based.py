"""Based's linear attention with the Taylor expansion of the exponential."""

import jax.numpy as jnp
from flax import nnx

from models.checks import at_least, head_size
from models.kernel_attention import kernel_attention
from models.mixer import Ids, MatrixState, Mixer, Tokens
from models.params import dense, residual_output
from models.partitioning import constrain
from ops.polynomial_attention import feature_count
from ops.projection import project, project_each

TAYLOR = (1.0, 1.0, 0.5)


class Based(Mixer):
    """y_t = sum_{s<=t} f(q_t . k_s / sqrt(F)) v_s / sum_{s<=t} f(q_t . k_s / sqrt(F)), f(a) = 1 + a + a^2 / 2 (Based, arXiv
    2402.18668, section 4.1): softmax attention with the exponential's expansion of second order, as a linear attention with
    the features phi(x) = [1, x / F^(1/4), (x x^T) / sqrt(2 F)]. Two-sided: the sums run over all s.

    Queries and keys have few components, F; of the symmetric x x^T only one half is kept, so phi has 1 + F + F (F + 1) / 2
    components. As f >= 1/2 the denominator needs no epsilon (the authors' code adds 1e-12).

    The paper's model has this mixer in one layer of five, and sliding-window attention and short gated convolutions in the
    others: use a pattern with `local_attention`.

    Args:
      heads: number of heads.
      feature_size: F.
    """

    bidirectional = True
    position_aware = False
    paper = "Based, arXiv 2402.18668"
    primitive = "polynomial_attention"
    tiny = {"feature_size": 6}

    def __init__(
        self, width: int, *, rngs: nnx.Rngs, causal: bool = True, depth: int = 1, heads: int = 4, feature_size: int = 16
    ):
        at_least(1, feature_size=feature_size)
        size = head_size(width, heads, "width")
        self.causal = causal
        self.sizes = (heads, feature_count(feature_size, TAYLOR), size + 1)
        self.w_qk = dense(rngs, (width, 2, heads, feature_size), ("embed", None, "heads", None))
        self.w_v = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: MatrixState | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, MatrixState | None]:
        q, k = (
            constrain(a, "batch", "length", "heads", None).astype(jnp.float32) for a in project_each(x, self.w_qk[...])
        )
        q, k = (a * a.shape[-1] ** -0.25 for a in (q, k))
        v = constrain(project(x, self.w_v[...]), "batch", "length", "heads", None)
        # The floor is f's minimum: it binds only where rounding errors of large terms leave less.
        y, state = kernel_attention(
            q,
            k,
            v,
            causal=self.causal,
            polynomial=TAYLOR,
            floor=0.5,
            initial_state=state,
            segment_ids=segment_ids,
        )
        return project(y, self.w_o[...], inputs=2), state

    def initial_state(self, batch: int, capacity: int) -> MatrixState:
        return jnp.zeros((batch, *self.sizes), jnp.float32)

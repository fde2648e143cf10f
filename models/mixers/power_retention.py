"""Power retention: linear attention with the square of the score, and a gate."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import at_least, check_rotated, head_size, positive
from models.kernel_attention import kernel_attention
from models.mixer import Ids, MatrixState, Mixer, Tokens
from models.params import constant, dense, residual_output, time_scale
from models.partitioning import constrain
from ops.polynomial_attention import SQUARE, feature_count
from ops.projection import project, project_each
from ops.rotary import rotary


class PowerRetention(Mixer):
    """y_t = W_o sum_{s<=t} a_ts v_s / (sum_{s<=t} a_ts + eps), a_ts = (q_t . k_s)^2 / F exp(sum_{s<r<=t} log g_r), with
    g_t = sigmoid(W_g x_t + b) of each head, and rotated q and k (Scaling Context Requires Rethinking Attention, arXiv
    2507.04239).

    It is a linear attention whose features are the F (F + 1) / 2 products of components; the larger F, the larger the state and
    the nearer to attention. b starts at 6.907, where g is 0.999.

    Departures: of the powers only 2; rotary frequencies are those of a base, where the authors' training code takes the length
    of the sequence for it. F is 32 by default (theirs is 64, with 2080 features). Their 1e-6, inside of the logarithm of a score,
    is here `eps`, see `rebased`.

    Args:
      heads: number of heads.
      feature_size: F, components of a query or key.
      eps: added to the denominator, which can vanish; a_ts is about 1 on average.
      rotary_base: base of the rotary frequencies.
    """

    paper = "Power retention, arXiv 2507.04239"
    primitive = "polynomial_attention"
    tiny = {"feature_size": 6, "eps": 0.1}  # smaller denominators, as first tokens have, amplify rounding errors

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        feature_size: int = 32,
        eps: float = 1e-3,
        rotary_base: float = 10000.0,
    ):
        at_least(1, feature_size=feature_size)
        at_least(0, eps=eps)
        positive(rotary_base=rotary_base)
        check_rotated(feature_size, "the size of a query", "feature_size")
        size = head_size(width, heads, "width")
        self.eps, self.rotary_base, self.feature_size = eps, rotary_base, feature_size
        self.sizes = (heads, feature_count(feature_size, SQUARE), size + 1)
        self.w_qk = dense(rngs, (width, 2, heads, feature_size), ("embed", None, "heads", None))
        self.w_v = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_g = dense(rngs, (width, heads), ("embed", None))
        self.b_g = time_scale(rngs, constant(6.906768), (heads,), (None,))
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: MatrixState | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, MatrixState | None]:
        q, k = (constrain(a, "batch", "length", "heads", None) for a in project_each(x, self.w_qk[...]))
        q, k = (rotary(a.astype(jnp.float32), positions, base=self.rotary_base) for a in (q, k))
        v = constrain(project(x, self.w_v[...]), "batch", "length", "heads", None)
        log_g = jax.nn.log_sigmoid(project(x, self.w_g[...]).astype(jnp.float32) + self.b_g[...])
        y, state = kernel_attention(
            q / math.sqrt(self.feature_size),
            k,
            v,
            log_g,
            causal=True,
            polynomial=SQUARE,
            eps=self.eps,
            initial_state=state,
            segment_ids=segment_ids,
        )
        return project(y, self.w_o[...], inputs=2), state

    def initial_state(self, batch: int, capacity: int) -> MatrixState:
        return jnp.zeros((batch, *self.sizes), jnp.float32)

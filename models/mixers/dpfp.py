"""Fast weight programmer with the deterministic parameter-free projection."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError, check_choice
from models.checks import head_size
from models.kernel_attention import kernel_attention
from models.mixer import Ids, MatrixState, Mixer, Tokens
from models.params import dense, residual_output
from models.partitioning import constrain
from ops.delta_rule import delta_rule
from ops.projection import project, project_each


class FastWeights(Mixer):
    """S_t = S_{t-1} + beta_t phi(k_t) (v_t - S_{t-1}^T phi(k_t))^T, y_t = S_t^T phi(q_t) / sqrt(K), beta = sigmoid(W_b x)
    (Linear Transformers Are Secretly Fast Weight Programmers, arXiv 2102.11174, sections 4.2 and 5).

    phi is DPFP: with r = [relu(x), relu(-x)] in R^2K, phi(x) = concat_{j=1..nu} r * roll(r, j), divided by the sum of its
    components (plus 1e-6 here: a vector can have no two neighbours that are both positive). As the paper recommends
    there is no other normalisation.

    `update="sum"` is the paper's baseline: S_t = S_{t-1} + phi(k_t) v_t^T with the denominator of linear attention,
    y_t = S_t^T phi(q_t) / (sqrt(K) (phi(q_t) . sum_{s<=t} phi(k_s) + 1e-5)). It knows nothing of order.

    The default nu is 2; the authors' is 3.

    Args:
      heads: number of heads.
      nu: capacity of the map: features over 2K.
      update: "delta" or "sum".
    """

    paper = "Fast weight programmers (DPFP), arXiv 2102.11174"
    primitive = "delta_rule"

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        nu: int = 2,
        update: str = "delta",
    ):
        check_choice("update", update, ("delta", "sum"))
        size = head_size(width, heads, "width")
        if not 1 <= nu < 2 * size:
            raise UserError(f"`nu` must be between 1 and {2 * size - 1} for heads of size {size}, got {nu}")
        self.nu = nu
        self.sizes = (heads, 2 * nu * size, size if update == "delta" else size + 1)
        self.w_qkv = dense(rngs, (width, 3, heads, size), ("embed", None, "heads", None))
        self.w_b = dense(rngs, (width, heads), ("embed", None)) if update == "delta" else None
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: MatrixState | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, MatrixState | None]:
        q, k, v = (constrain(a, "batch", "length", "heads", None) for a in project_each(x, self.w_qkv[...]))
        q, k = dpfp(q.astype(jnp.float32), self.nu), dpfp(k.astype(jnp.float32), self.nu)
        where = {"initial_state": state, "segment_ids": segment_ids}
        if self.w_b is None:
            y, state = kernel_attention(q, k, v, causal=True, eps=1e-5, **where)
        else:
            beta = jax.nn.sigmoid(project(x, self.w_b[...]).astype(jnp.float32))
            y, state = delta_rule(q, k, v, beta, **where)
        return project(y / math.sqrt(v.shape[-1]), self.w_o[...], inputs=2), state

    def initial_state(self, batch: int, capacity: int) -> MatrixState:
        return jnp.zeros((batch, *self.sizes), jnp.float32)


def dpfp(x, nu: int):
    """The map of x [..., K] to [..., 2K nu], non-negative and of sum 1."""
    r = jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], -1)
    phi = jnp.concatenate([r * jnp.roll(r, j, -1) for j in range(1, nu + 1)], -1)
    return phi / (jnp.sum(phi, -1, keepdims=True) + 1e-6)

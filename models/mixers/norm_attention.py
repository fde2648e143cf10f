"""TransNormer's linear attention, NormAttention."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from common.errors import UserError
from models.checks import check_rotated, head_size
from models.kernel_attention import kernel_attention
from models.mixer import Ids, MatrixState, Mixer, Tokens
from models.norms import rms_normalize
from models.params import normal, param, xavier_uniform
from models.partitioning import constrain
from ops.products import product
from ops.projection import project, project_each
from ops.rotary import rotary


class NormAttention(Mixer):
    """y = W_o norm(sum_j (q_i . k_j) v_j), over j <= i or all j (The Devil in Linear Transformer, arXiv 2210.10340,
    section 4.1): a norm over the width in place of the denominator, whose gradients are unbounded.

    q and k are f(W x), f = elu + 1 (version 2) or elu (version 1), then LRPE: a fixed reflection I - 2 u u^T and rotations of
    interleaved pairs by learned angles, one for each pair and the same in all heads. The norm is x / rms(x) without a
    weight, and there is no 1/sqrt(K).

    TransNormer's layers are `diag_attention` in the first half of the depth and `norm_attention` in the second: for twelve
    layers, the pattern of six times the one, then six times the other. Its layers for the Long Range Arena alternate instead.
    The biases of the authors' projections are left out.

    Args:
      heads: number of heads.
      version: 1 or 2, as above (T1 and T2 of the paper).
    """

    bidirectional = True
    paper = "TransNormer (NormAttention), arXiv 2210.10340"
    primitive = "linear_attention"

    def __init__(self, width: int, *, rngs: nnx.Rngs, causal: bool = True, heads: int = 4, version: int = 2):
        size = head_size(width, heads, "width")
        check_rotated(size)
        if version not in (1, 2):
            raise UserError(f"`version` must be 1 or 2, got {version}")
        self.causal = causal
        self.version = version
        self.sizes = (heads, size, size)
        init = xavier_uniform(width, width, gain=0.5**0.5)
        self.w_qkv = param(rngs, init, (width, 3, heads, size), ("embed", None, "heads", None))
        frequencies = 10000.0 ** (-np.arange(0, size, 2) / size)
        angles = lambda key, shape, dtype: jnp.asarray(frequencies, dtype)
        self.theta = param(rngs, angles, (size // 2,), (None,), decay=False, keep_float32=True)
        self.u = param(rngs, normal(1.0), (size,), (None,), decay=False, keep_float32=True, group="fixed")
        self.w_o = param(rngs, xavier_uniform(width, width), (heads, size, width), ("heads", None, "embed"))

    def mix(
        self, x: Tokens, state: MatrixState | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, MatrixState | None]:
        q, k, v = (constrain(a, "batch", "length", "heads", None) for a in project_each(x, self.w_qkv[...]))
        y, state = kernel_attention(
            self.feature(q, positions),
            self.feature(k, positions),
            v.astype(jnp.float32),
            causal=self.causal,
            normalize=False,
            initial_state=state,
            segment_ids=segment_ids,
        )
        # The authors add an eps of 1e-8 outside of the root.
        y = rms_normalize(y.reshape(x.shape), eps=1e-16).reshape(y.shape).astype(x.dtype)
        return project(y, self.w_o[...], inputs=2), state

    def feature(self, a, positions):
        """f and LRPE of queries or keys [B, T, H, K]."""
        u = jax.lax.stop_gradient(self.u[...])
        u = u / jnp.linalg.norm(u)
        a = jax.nn.elu(a.astype(jnp.float32)) + (self.version - 1)
        along = product("bthk,k->bth", a, u)
        a = a - 2 * along[..., None] * u
        return rotary(a, positions, frequencies=self.theta[...], layout="interleaved")

    def attention_scores(
        self, x: Tokens, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Float[Array, "B H T T"], str]:
        """How every query scores every key, for diagnostics; see `evaluation.diagnostics.measures.score_gradients`."""
        q, k = (self.feature(a, positions) for a in project_each(x, self.w_qkv[:, :2]))
        return jnp.einsum("bthk,bshk->bhts", q, k), "none"

    def initial_state(self, batch: int, capacity: int) -> MatrixState:
        return jnp.zeros((batch, *self.sizes), jnp.float32)

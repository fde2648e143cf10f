"""TransNormer's block-diagonal attention, DiagAttention."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.errors import UserError
from models.checks import at_least, check_rotated, head_size
from models.mixer import Ids, Mixer, Tokens
from models.norms import rms_normalize
from models.params import normal, param, xavier_uniform
from models.partitioning import constrain
from ops.block_attention import block_attention, empty_block
from ops.products import product
from ops.projection import project, project_each
from ops.rotary import rotary


class DiagAttention(Mixer):
    """y = W_o (P v), P_ij = f(q_i . k_j / sqrt(K)) inside blocks of `block` tokens, 0 outside (The Devil in Linear
    Transformer, arXiv 2210.10340, section 4.2).

    Version 2: f is the softmax over the visible keys of the block. Version 1: f = relu without a denominator, and P v is
    normalised to x / rms(x) over the width, without a weight. q and k carry LRPE: a fixed reflection I - 2 u u^T and
    rotations of interleaved pairs by learned angles, one for each pair and the same in all heads.

    TransNormer's first half of layers, see `norm_attention`; nothing passes from block to block in this one.
    The biases of the authors' projections are left out.

    The default block has 64 tokens; the authors' has 32.

    Args:
      heads: number of heads.
      block: tokens of a block.
      version: 1 or 2, as above (T1 and T2 of the paper).
    """

    bidirectional = True
    paper = "TransNormer (DiagAttention), arXiv 2210.10340"
    primitive = "block_attention"
    sequence_parallel = ()  # blocks are cut along the length
    complexity = "T block"
    tiny = {"block": 7}

    def __init__(
        self, width: int, *, rngs: nnx.Rngs, causal: bool = True, heads: int = 4, block: int = 64, version: int = 2
    ):
        size = head_size(width, heads, "width")
        check_rotated(size)
        if version not in (1, 2):
            raise UserError(f"`version` must be 1 or 2, got {version}")
        at_least(1, block=block)
        self.causal = causal
        self.block = block
        self.version = version
        self.sizes = (heads, size)
        init = xavier_uniform(width, width)
        self.w_qkv = param(rngs, init, (width, 3, heads, size), ("embed", None, "heads", None))
        frequencies = 10000.0 ** (-np.arange(0, size, 2) / size)
        angles = lambda key, shape, dtype: jnp.asarray(frequencies, dtype)
        self.theta = param(rngs, angles, (size // 2,), (None,), decay=False, keep_float32=True)
        self.u = param(rngs, normal(1.0), (size,), (None,), decay=False, keep_float32=True, group="fixed")
        self.w_o = param(rngs, init, (heads, size, width), ("heads", None, "embed"))

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        q, k, v = (constrain(a, "batch", "length", "heads", None) for a in project_each(x, self.w_qkv[...]))
        u = jax.lax.stop_gradient(self.u[...])
        u = u / jnp.linalg.norm(u)

        def place(a):
            along = product("bthk,k->bth", a, u)
            a = (a - 2 * along[..., None] * u).astype(x.dtype)
            return rotary(a, positions, frequencies=self.theta[...], layout="interleaved")

        y, state = block_attention(
            place(q),
            place(k),
            v if self.version == 2 else v.astype(jnp.float32),
            size=self.block,
            positions=positions,
            segment_ids=segment_ids,
            causal=self.causal,
            activation="softmax" if self.version == 2 else "relu",
            initial_state=state,
        )
        if self.version == 1:
            # The authors add an eps of 1e-8 outside of the root.
            y = rms_normalize(y.reshape(x.shape), eps=1e-16).reshape(y.shape).astype(x.dtype)
        return project(y, self.w_o[...], inputs=2), state

    def initial_state(self, batch: int, capacity: int) -> dict:
        return empty_block(batch, self.block, self.sizes, self.sizes)

"""Hydra, the two-sided state space of Mamba-2."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from common.errors import UserError
from models.checks import at_least, head_size, scaled
from models.mixer import Ids, Mixer, Tokens
from models.norms import RMSNorm
from models.params import conv_taps, dense, ones, param, residual_output, step_bias, time_scale, zeros
from models.partitioning import constrain
from ops import segments
from ops.elementwise import silu, silu_gate
from ops.linear_attention import linear_attention
from ops.projection import project
from ops.token_shift import token_shift


class Hydra(Mixer):
    """o = shift(SSD(u; B, C, dt)) + shift'(SSD'(u; B', C', dt')) + (D + W_D u) u, y = W_out (norm(o) * silu(z))
    (arXiv 2407.09941, section 4).

    SSD is Mamba-2's S_t = exp(dt_t A) S_{t-1} + dt_t B_t u_t^T, o_t = S_t^T C_t. The primed ones run from the last token to the
    first with B, C and dt of their own, and the same A. shift moves by one token in the direction of each, so that what a
    direction says of a token comes from the others alone: together with the diagonal D + W_D u, one number for each head, this is
    the product with a quasiseparable matrix. u and all B and C are silu(conv(W x)), where the convolution is centred; dt =
    softplus(W_dt x + b_dt), A = -exp(A_log).

    The maps of the input, and W_D, start 1.73 times as large as in the authors' code, and the convolution's bias at 0; see
    `models.params.dense`. A starts at -1 and D at 1, as there. Their code turns whole rows, so that padding behind a document
    comes before it; here each document is turned by itself.

    Args:
      state: N, size of B and C.
      expand: channels over the width.
      heads: number of heads; by default one for every 64 channels.
      groups: number of groups of heads that share B and C.
      conv_size: taps of the centred convolution, an odd number.
      dt_min, dt_max: range of the step size at initialisation.
      eps: of the norm.
    """

    causal = False
    bidirectional = True
    streaming = False
    replaces_channel_mixer = True
    paper = "Hydra, arXiv 2407.09941"
    primitive = "linear_attention"
    tiny = {"state": 8, "heads": 2}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        state: int = 64,
        expand: float = 2.0,
        heads: int | None = None,
        groups: int = 1,
        conv_size: int = 7,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        eps: float = 1e-5,
    ):
        at_least(1, state=state, heads=heads, groups=groups)
        at_least(0, eps=eps)
        if conv_size < 1 or conv_size % 2 == 0:
            raise UserError(f"`conv_size` must be an odd number of taps, got {conv_size}")
        inner = scaled(width, expand=expand)
        heads = max(1, inner // 64) if heads is None else heads
        self.heads = heads
        self.sizes = (heads, head_size(inner, heads, "the number of channels"))
        head_size(heads, groups, "the number of heads", "groups")
        self.groups = groups
        self.w_z = dense(rngs, (width, inner), ("embed", "heads"))
        self.w_u = dense(rngs, (width, inner), ("embed", "heads"))
        self.w_bc = dense(rngs, (width, 4 * groups * state), ("embed", None))
        self.w_dt = dense(rngs, (width, 2, heads), ("embed", None, None))
        self.conv_u = conv_taps(rngs, conv_size, inner, "heads")
        self.conv_u_bias = param(rngs, zeros, (inner,), ("heads",))
        self.conv_bc = conv_taps(rngs, conv_size, 4 * groups * state, None)
        self.conv_bc_bias = param(rngs, zeros, (4 * groups * state,), (None,))
        self.dt_bias = time_scale(rngs, step_bias(dt_min, dt_max), (heads,), (None,))
        self.a_log = time_scale(rngs, zeros, (heads,), (None,))
        self.d = param(rngs, ones, (heads,), (None,), decay=False, keep_float32=True)
        self.w_d = dense(rngs, (inner, heads), ("heads", None))
        self.norm = RMSNorm(inner, rngs=rngs, axis="heads", eps=eps)
        self.w_out = residual_output(rngs, (inner, width), ("heads", "embed"), depth, branches=1)

    def mix(self, x: Tokens, state: None, *, segment_ids: Ids | None, positions: Ids) -> tuple[Tokens, None]:
        by_head = lambda a: jnp.repeat(a, self.heads // self.groups, axis=2)
        z = constrain(project(x, self.w_z[...]), "batch", "length", "heads")
        u = centred_convolution(project(x, self.w_u[...]), self.conv_u[...], self.conv_u_bias[...], segment_ids)
        u = constrain(silu(u), "batch", "length", "heads")
        bc = centred_convolution(project(x, self.w_bc[...]), self.conv_bc[...], self.conv_bc_bias[...], segment_ids)
        b, c = jnp.moveaxis(silu(bc).reshape(*x.shape[:2], 2, 2, self.groups, -1), 3, 0)
        dt = jax.nn.softplus(project(x, self.w_dt[...]).astype(jnp.float32) + self.dt_bias[...])
        values = u.reshape(*u.shape[:2], *self.sizes)

        def others(direction):
            """What the tokens on one side of each token say to it."""
            step = dt[:, :, direction]
            turn = lambda a: segments.reverse(a, segment_ids) if direction else a
            o, _ = linear_attention(
                turn(by_head(c[:, :, direction])),
                turn(by_head(b[:, :, direction])),
                turn((step[..., None] * values).astype(u.dtype)),
                turn(-jnp.exp(self.a_log[...]) * step),
                segment_ids=segment_ids,
            )
            return turn(token_shift(o, segment_ids=segment_ids)[0])

        diagonal = self.d[...] + project(u, self.w_d[...]).astype(jnp.float32)
        o = others(0) + others(1) + diagonal[..., None] * values
        o = self.norm(o.astype(x.dtype).reshape(z.shape))
        return project(silu_gate(z, o), self.w_out[...]), None


@jax.checkpoint  # or the backward pass would keep every shifted copy
def centred_convolution(
    x: Float[Array, "B T C"], taps: Float[Array, "W C"], bias: Float[Array, "C"], segment_ids: Ids | None
) -> Float[Array, "B T C"]:
    """y_t = sum_j taps_j x_{t + j - W // 2} + bias over the tokens of t's document, in x's dtype; zero at padding."""
    half, length = len(taps) // 2, x.shape[1]
    around = lambda a: jnp.pad(a, ((0, 0), (half, half)) + ((0, 0),) * (a.ndim - 2))
    padded = around(x).astype(jnp.promote_types(x.dtype, jnp.float32))
    ids = None if segment_ids is None else around(segment_ids)
    y = bias
    for j, tap in enumerate(taps):
        there = padded[:, j : j + length]
        if ids is not None:
            there = jnp.where((ids[:, j : j + length] == segment_ids)[..., None], there, 0)
        y = y + tap * there
    return segments.zero_padding(y.astype(x.dtype), segment_ids)

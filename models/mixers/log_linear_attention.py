"""Log-linear attention: Mamba-2 with a state for each scale of the past."""

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import at_least, head_size, scaled
from models.kv_cache import check_capacity
from models.mixer import Ids, Mixer, Tokens
from models.norms import RMSNorm
from models.params import conv_taps, dense, log_of, ones, param, residual_output, step_bias, time_scale, uniform, zeros
from models.partitioning import constrain
from ops.elementwise import silu, silu_gate
from ops.log_linear_attention import log_linear_attention
from ops.projection import project
from ops.short_convolution import short_convolution


class LogLinearAttention(Mixer):
    """o_t = sum_l lambda_t^l (S_t^l)^T C_t + D u_t, y = W_out norm(o * silu(z)), S_t^l = sum_{s in bucket l of t}
    exp(sum_{s<r<=t} dt_r A) dt_s B_s u_s^T (arXiv 2506.04761, section 3: log-linear Mamba-2).

    The buckets are those of a Fenwick tree: level 0 is the token itself, level l the 2^(l-1) tokens before those of the lower
    levels where t has bit l - 1, else nothing. lambda = softplus(Lambda * W_lambda x), one for each head and level. With all
    lambda equal this is Mamba-2: u, B, C = silu(conv(W x)), dt = softplus(W_dt x + b_dt), A = -exp(A_log), and B and C are
    shared by all heads. The carry holds one state for each bit of the position.

    Departure: levels beyond the last lambda share it, where the authors' code ends at 2^(levels - 1) tokens.

    Args:
      state: size of B and C.
      expand: channels over the width.
      heads: number of heads; by default one for every 64 channels.
      levels: number of lambdas of a head, which tells apart the buckets of 2^(levels - 1) tokens.
      conv_size: taps of the short convolutions.
      dt_min, dt_max: range of the step size at initialisation.
      eps: of the norm.
    """

    constant_carry = False
    replaces_channel_mixer = True
    paper = "Log-Linear Attention, arXiv 2506.04761"
    primitive = "log_linear_attention"
    sequence_parallel = ()  # its states are as many as the length has levels
    complexity = "T log T"
    tiny = {"state": 8, "heads": 2, "levels": 4}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        state: int = 128,
        expand: float = 2.0,
        heads: int | None = None,
        levels: int = 15,
        conv_size: int = 4,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        eps: float = 1e-5,
    ):
        at_least(1, state=state, heads=heads)
        at_least(2, levels=levels)  # the token itself and its past
        at_least(0, eps=eps)
        inner = scaled(width, expand=expand)
        heads = max(1, inner // 64) if heads is None else heads
        self.heads = heads
        self.sizes = (heads, state, head_size(inner, heads, "the number of channels"))
        self.conv_size = conv_size
        self.w_z = dense(rngs, (width, inner), ("embed", "heads"))
        self.w_u = dense(rngs, (width, inner), ("embed", "heads"))
        self.w_bc = dense(rngs, (width, 2 * state), ("embed", None))
        self.w_dt = dense(rngs, (width, heads), ("embed", None))
        self.w_lambda = dense(rngs, (width, heads, levels), ("embed", "heads", None))
        self.scale_lambda = param(rngs, ones, (heads, levels), ("heads", None), decay=False, keep_float32=True)
        self.conv_u = conv_taps(rngs, conv_size, inner, "heads")
        self.conv_u_bias = param(rngs, zeros, (inner,), ("heads",))
        self.conv_bc = conv_taps(rngs, conv_size, 2 * state, None)
        self.conv_bc_bias = param(rngs, zeros, (2 * state,), (None,))
        self.dt_bias = time_scale(rngs, step_bias(dt_min, dt_max), (heads,), (None,))
        self.a_log = time_scale(rngs, log_of(uniform(1.0, 16.0)), (heads,), (None,))
        self.d = param(rngs, ones, (heads,), (None,), decay=False, keep_float32=True)
        self.norm = RMSNorm(inner, rngs=rngs, axis="heads", eps=eps)
        self.w_out = residual_output(rngs, (inner, width), ("heads", "embed"), depth, branches=1)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        heads, _, channels = self.sizes
        new = {}
        if state is not None:  # a carry that grows is restarted here
            fresh = positions[:, 0] == 0
            state = jax.tree.map(lambda a: jnp.where(fresh.reshape(-1, *[1] * (a.ndim - 1)), 0, a), state)

        def branch(name, w, taps, bias):
            initial = None if state is None else state[name]
            u = project(x, w[...])
            u, new[name] = short_convolution(u, taps[...], bias[...], initial_state=initial, segment_ids=segment_ids)
            return silu(u)

        z = constrain(project(x, self.w_z[...]), "batch", "length", "heads")
        u = constrain(branch("conv_u", self.w_u, self.conv_u, self.conv_u_bias), "batch", "length", "heads")
        u = u.reshape(*u.shape[:2], heads, channels)
        bc = branch("conv_bc", self.w_bc, self.conv_bc, self.conv_bc_bias)
        b, c = (jnp.repeat(a[:, :, None], heads, axis=2) for a in jnp.split(bc, 2, axis=-1))
        dt = jax.nn.softplus(project(x, self.w_dt[...]).astype(jnp.float32) + self.dt_bias[...])
        logits = project(x, self.w_lambda[...]).astype(jnp.float32)
        o, new["buckets"] = log_linear_attention(
            c,
            b,
            (dt[..., None] * u).astype(u.dtype),
            -jnp.exp(self.a_log[...]) * dt,
            jax.nn.softplus(self.scale_lambda[...] * logits),
            positions=None if state is None else positions,
            initial_state=None if state is None else state["buckets"],
            segment_ids=segment_ids,
        )
        o = (o + self.d[...][:, None] * u).astype(x.dtype)
        return project(self.norm(silu_gate(z, o.reshape(z.shape))), self.w_out[...]), new

    def initial_state(self, batch: int, capacity: int) -> dict:
        check_capacity(capacity)
        heads, size, channels = self.sizes
        taps = lambda width: jnp.zeros((batch, self.conv_size - 1, width), jnp.float32)
        # Buckets for the bits of the positions 0..capacity - 1.
        buckets = jnp.zeros((batch, max(1, (capacity - 1).bit_length()), heads, size, channels), jnp.float32)
        return {"conv_u": taps(heads * channels), "conv_bc": taps(2 * size), "buckets": buckets}

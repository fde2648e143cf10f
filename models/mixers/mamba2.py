"""Mamba-2, state space duality."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from common.errors import UserError, check_choice
from models.checks import at_least, head_size, scaled
from models.mixer import Ids, Mixer, Tokens
from models.norms import rms_normalize
from models.params import conv_taps, dense, log_of, ones, param, residual_output, step_bias, time_scale, uniform, zeros
from models.partitioning import constrain
from ops.elementwise import silu, silu_gate
from ops.linear_attention import linear_attention
from ops.projection import project
from ops.short_convolution import short_convolution


class Mamba2(Mixer):
    """S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T, o_t = S_t^T C_t + D x_t, y = W_out norm(o * silu(z))
    (arXiv 2405.21060, section 7).

    u, B, C = silu(conv(W x)), dt = softplus(W_dt x + b_dt), and A = -exp(A_log), D and dt are one number for each head. B and C
    are shared by the heads of a group, like keys in grouped-query attention. This is linear attention with keys B, values
    dt * u, queries C and log-decays dt * A.

    The maps of the input start 1.73 times as large as in the authors' code, and the convolutions' biases at 0, not within ±1/2;
    see `models.params.dense`.

    Args:
      state: N, size of B and C.
      expand: channels over the width.
      heads: number of heads; by default one for every 64 channels.
      groups: number of groups of heads that share B and C; the norm is within groups.
      conv_size: taps of the short convolutions.
      dt_min, dt_max: range of the step size at initialisation.
      dt_limit: the least step size that a token may have, and the largest, where there is a second number (`dt_limit` of the
        authors' code); () for no limit.
      eps: of the norm.
      output_norm: "gated", norm(o * silu(z)); "ungated", norm(o) * silu(z); or "none", o * silu(z) (Falcon-H1, arXiv 2507.22448).
      scales: factors of what the input's maps make, z, u, B, C and dt (Falcon-H1); () for none.
    """

    replaces_channel_mixer = True
    paper = "Mamba-2, arXiv 2405.21060"
    primitive = "linear_attention"
    tiny = {"state": 8, "heads": 2}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        state: int = 128,
        expand: float = 2.0,
        heads: int | None = None,
        groups: int = 1,
        conv_size: int = 4,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_limit: tuple[float, ...] = (),
        eps: float = 1e-5,
        output_norm: str = "gated",
        scales: tuple[float, ...] = (),
    ):
        check_choice("output_norm", output_norm, ("gated", "ungated", "none"))
        if len(scales) not in (0, 5):
            raise UserError(f"`scales` must be 5 factors, of z, u, B, C and dt, or () for none; got {len(scales)}")
        if len(dt_limit) > 2 or list(dt_limit) != sorted(max(0.0, dt) for dt in dt_limit):
            raise UserError(
                f"`dt_limit` must be a least step size and perhaps a largest, or () for none; got {dt_limit}"
            )
        at_least(1, state=state, heads=heads, groups=groups)
        at_least(0, eps=eps)
        inner = scaled(width, expand=expand)
        heads = max(1, inner // 64) if heads is None else heads
        self.heads = heads
        self.sizes = (heads, state, head_size(inner, heads, "the number of channels"))
        head_size(heads, groups, "the number of heads", "groups")
        self.conv_size = conv_size
        self.groups = groups
        self.w_z = dense(rngs, (width, inner), ("embed", "heads"))
        self.w_u = dense(rngs, (width, inner), ("embed", "heads"))
        self.w_bc = dense(rngs, (width, 2 * groups * state), ("embed", None))
        self.w_dt = dense(rngs, (width, heads), ("embed", None))
        self.conv_u = conv_taps(rngs, conv_size, inner, "heads")
        self.conv_u_bias = param(rngs, zeros, (inner,), ("heads",))
        self.conv_bc = conv_taps(rngs, conv_size, 2 * groups * state, None)
        self.conv_bc_bias = param(rngs, zeros, (2 * groups * state,), (None,))
        self.dt_bias = time_scale(rngs, step_bias(dt_min, dt_max), (heads,), (None,))
        self.a_log = time_scale(rngs, log_of(uniform(1.0, 16.0)), (heads,), (None,))
        self.d = param(rngs, ones, (heads,), (None,), decay=False, keep_float32=True)
        self.eps = eps
        self.output_norm, self.scales, self.dt_limit = output_norm, tuple(scales), tuple(dt_limit)
        has_norm = output_norm != "none"
        self.norm = param(rngs, ones, (inner,), ("heads",), keep_float32=True) if has_norm else None
        self.w_out = residual_output(rngs, (inner, width), ("heads", "embed"), depth, branches=1)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        heads, size, channels = self.sizes
        new = {}

        def scaled_by(a, *places):
            """a, in as many parts as there are places, times the factors at these places."""
            if not self.scales:
                return a
            return a * np.repeat(np.float32([self.scales[i] for i in places]), a.shape[-1] // len(places)).astype(
                a.dtype
            )

        def branch(name, w, taps, bias, *places):
            initial = None if state is None else state[name]
            u = scaled_by(project(x, w[...]), *places)
            u, new[name] = short_convolution(u, taps[...], bias[...], initial_state=initial, segment_ids=segment_ids)
            return silu(u)

        # First what `tensor` does not split: the others' gradients of x are then one sum over its devices.
        bc = branch("conv_bc", self.w_bc, self.conv_bc, self.conv_bc_bias, 2, 3)
        b, c = jnp.moveaxis(bc.reshape(*bc.shape[:2], 2, self.groups, size), 2, 0)
        b, c = (jnp.repeat(a, heads // self.groups, axis=2) for a in (b, c))
        dt = scaled_by(project(x, self.w_dt[...]), 4).astype(jnp.float32)
        z = constrain(scaled_by(project(x, self.w_z[...]), 0), "batch", "length", "heads")
        u = constrain(branch("conv_u", self.w_u, self.conv_u, self.conv_u_bias, 1), "batch", "length", "heads")
        u = u.reshape(*u.shape[:2], heads, channels)
        dt = jax.nn.softplus(dt + self.dt_bias[...])
        dt = jnp.clip(dt, *self.dt_limit) if self.dt_limit else dt
        o, new["ssm"] = linear_attention(
            c,
            b,
            (dt[..., None] * u).astype(u.dtype),
            -jnp.exp(self.a_log[...]) * dt,
            initial_state=None if state is None else state["ssm"],
            segment_ids=segment_ids,
        )
        o = (o + self.d[...][:, None] * u).astype(x.dtype)
        o = o.reshape(z.shape)
        if self.output_norm == "ungated":
            o = silu_gate(z, self.normalized(o))
        else:
            o = silu_gate(z, o)
            o = o if self.norm is None else self.normalized(o)
        return project(o, self.w_out[...]), new

    def normalized(self, o: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        """The norm within groups of heads."""
        y = rms_normalize(o.astype(jnp.float32).reshape(*o.shape[:2], self.groups, -1), self.eps).reshape(o.shape)
        return (self.norm[...] * y).astype(o.dtype)

    def initial_state(self, batch: int, capacity: int) -> dict:
        heads, size, channels = self.sizes
        taps = lambda width: jnp.zeros((batch, self.conv_size - 1, width), jnp.float32)
        memory = jnp.zeros((batch, heads, size, channels), jnp.float32)
        return {"conv_u": taps(heads * channels), "conv_bc": taps(2 * self.groups * size), "ssm": memory}

"""Mamba, the selective state space."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import check_choice
from models.checks import at_least, scaled
from models.mixer import Ids, Mixer, Tokens
from models.norms import RMSNorm, rms_normalize
from models.params import (
    constant,
    conv_taps,
    dense,
    fan_in_uniform,
    ones,
    param,
    residual_output,
    step_bias,
    time_scale,
    zeros,
)
from models.partitioning import constrain
from ops.elementwise import silu, silu_gate
from ops.projection import project, project_each
from ops.selective_scan import selective_scan
from ops.short_convolution import short_convolution


class Mamba(Mixer):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, o_t = C_t . h_t + D u_t, y = W_out (o * silu(z))
    (arXiv 2312.00752, algorithm 2 and section 3.4).

    [u, z] = W_in x, u = silu(conv(u)), [r, B, C] = W_x u, dt = softplus(W_dt r + b_dt), A = -exp(A_log): N states for each of
    `expand` * width channels, with A_log = log(1..N). B is discretised by dt B, as in the authors' code. With a `norm`, r, B and
    C are each divided by their root mean square first (its eps is 1e-6).

    The maps W_in and W_x start 1.73 times as large as in the authors' code, and the convolution's bias at 0, not within ±1/2; see
    `models.params.dense`.

    Args:
      state: N.
      expand: channels over the width.
      conv_size: taps of the short convolution.
      dt_rank: rank of the step size's map; by default ceil(width / 16).
      dt_min, dt_max: range of the step size at initialisation.
      norm: of r, B and C: "none", "rms" with weights (Jamba, arXiv 2403.19887) or "weightless" (Falcon Mamba, arXiv 2410.05355).
    """

    replaces_channel_mixer = True
    paper = "Mamba, arXiv 2312.00752"
    primitive = "selective_scan"
    tiny = {"state": 4}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        state: int = 16,
        expand: float = 2.0,
        conv_size: int = 4,
        dt_rank: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        norm: str = "none",
    ):
        at_least(1, state=state, dt_rank=dt_rank)
        check_choice("norm", norm, ("none", "rms", "weightless"))
        inner = scaled(width, expand=expand)
        rank = math.ceil(width / 16) if dt_rank is None else dt_rank
        self.dt_rank = rank
        self.sizes = (rank, state, inner)
        self.conv_size = conv_size
        self.w_in = dense(rngs, (width, 2, inner), ("embed", None, "mlp"))
        self.conv = conv_taps(rngs, conv_size, inner, "mlp")
        self.conv_bias = param(rngs, zeros, (inner,), ("mlp",))
        self.w_x = dense(rngs, (inner, rank + 2 * state), ("mlp", None))
        self.w_dt = param(rngs, fan_in_uniform(rank), (rank, inner), (None, "mlp"))
        self.dt_bias = time_scale(rngs, step_bias(dt_min, dt_max), (inner,), ("mlp",))
        log_n = constant(jnp.log(jnp.arange(1.0, state + 1)))
        self.a_log = time_scale(rngs, log_n, (inner, state), ("mlp", None))
        self.d = param(rngs, ones, (inner,), ("mlp",), decay=False, keep_float32=True)
        self.w_out = residual_output(rngs, (inner, width), ("mlp", "embed"), depth, branches=1)
        self.norm = norm
        if norm == "rms":
            self.r_norm, self.b_norm, self.c_norm = (RMSNorm(size, rngs=rngs) for size in (rank, state, state))

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        rank, size, _ = self.sizes
        u, z = project_each(x, self.w_in[...])
        u, z = (constrain(a, "batch", "length", "mlp") for a in (u, z))
        u, taps = short_convolution(
            u,
            self.conv[...],
            self.conv_bias[...],
            initial_state=None if state is None else state["conv"],
            segment_ids=segment_ids,
        )
        u = silu(u)
        r, b, c = jnp.split(project(u, self.w_x[...]), (rank, rank + size), axis=-1)
        if self.norm == "weightless":
            r, b, c = (rms_normalize(a) for a in (r, b, c))
        elif self.norm == "rms":
            r, b, c = self.r_norm(r), self.b_norm(b), self.c_norm(c)
        dt = jax.nn.softplus(project(r, self.w_dt[...]).astype(jnp.float32) + self.dt_bias[...])
        o, h = selective_scan(
            u,
            dt,
            -jnp.exp(self.a_log[...]),
            b,
            c,
            self.d[...],
            initial_state=None if state is None else state["ssm"],
            segment_ids=segment_ids,
            axis="mlp",
        )
        return project(silu_gate(z, o), self.w_out[...]), {"conv": taps, "ssm": h}

    def initial_state(self, batch: int, capacity: int) -> dict:
        _, size, inner = self.sizes
        return {
            "conv": jnp.zeros((batch, self.conv_size - 1, inner), jnp.float32),
            "ssm": jnp.zeros((batch, size, inner), jnp.float32),
        }

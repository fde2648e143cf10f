"""LRU, the linear recurrent unit."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from common.errors import UserError
from models.checks import at_least, positive
from models.mixer import Ids, Mixer, Tokens
from models.params import constant, dense, normal, param, time_scale
from models.partitioning import constrain
from ops.elementwise import gelu
from ops.linear_recurrence import linear_recurrence
from ops.projection import project, project_each

State = tuple[Float[Array, "B N"], Float[Array, "B N"]]


class LRU(Mixer):
    """h_t = lambda h_{t-1} + gamma * (B x_t), y_t = Re(C h_t) + D x_t (arXiv 2303.06349, section 3), then GELU and a gated
    linear map as in the paper's block.

    lambda = exp(-exp(nu) + i exp(theta)), uniform on a ring of the unit disk at initialisation; gamma starts as
    sqrt(1 - |lambda|^2). Complex numbers are kept as real pairs.

    The gated map of the authors' code has biases.

    Args:
      state: size of h; by default the width.
      r_min, r_max: radii of the ring.
      max_phase: largest angle at initialisation.
    """

    paper = "LRU, arXiv 2303.06349"
    primitive = "linear_recurrence"

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        state: int | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
    ):
        at_least(1, state=state)
        positive(max_phase=max_phase)
        if not 0 <= r_min < r_max <= 1:
            raise UserError(f"0 <= `r_min` < `r_max` <= 1 must hold, got r_min={r_min} and r_max={r_max}")
        size = width if state is None else state
        self.state = size

        def nu(key, shape, dtype):
            u = jax.random.uniform(key, shape, dtype, minval=1e-7)
            return jnp.log(-0.5 * jnp.log(u * (r_max**2 - r_min**2) + r_min**2))

        def theta(key, shape, dtype):
            return jnp.log(max_phase * jax.random.uniform(key, shape, dtype, minval=1e-7))

        self.nu_log = time_scale(rngs, nu, (size,), ("state",), group="ssm")
        self.theta_log = time_scale(rngs, theta, (size,), ("state",), group="ssm")
        decay = jnp.exp(-2 * jnp.exp(self.nu_log[...]))
        self.gamma_log = time_scale(rngs, constant(0.5 * jnp.log1p(-decay)), (size,), ("state",), group="ssm")
        b_init, c_init = normal((2 * width) ** -0.5), normal(size**-0.5)
        self.b = param(rngs, b_init, (width, 2, size), ("embed", None, "state"), decay=False, group="ssm")
        self.c = param(rngs, c_init, (2, size, width), (None, "state", "embed"))
        self.d = param(rngs, normal(1.0), (width,), (None,), decay=False)
        self.w_out = dense(rngs, (width, 2, width), ("embed", None, "mlp"))

    def mix(
        self, x: Tokens, state: State | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, State | None]:
        radius = jnp.exp(-jnp.exp(self.nu_log[...]))
        phase = jnp.exp(self.theta_log[...])
        a = (radius * jnp.cos(phase), radius * jnp.sin(phase))
        gamma = jnp.exp(self.gamma_log[...])
        b = tuple(
            constrain(gamma * part.astype(jnp.float32), "batch", "length", "state")
            for part in project_each(x, self.b[...])
        )
        (real, imag), state = linear_recurrence(a, b, initial_state=state, segment_ids=segment_ids)
        real, imag = real.astype(x.dtype), imag.astype(x.dtype)
        y = gelu(project(real, self.c[0]) - project(imag, self.c[1]) + self.d[...] * x)
        value, gate = project_each(y, self.w_out[...])
        return value * jax.nn.sigmoid(gate), state

    def initial_state(self, batch: int, capacity: int) -> State:
        size = self.nu_log.shape[-1]
        return (jnp.zeros((batch, size), jnp.float32), jnp.zeros((batch, size), jnp.float32))

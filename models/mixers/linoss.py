"""LinOSS, a state space of oscillators."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from common.errors import check_choice
from models.checks import at_least
from models.mixer import Ids, Mixer, Tokens
from models.params import dense, fan_in_uniform, normal, param, time_scale, uniform
from models.partitioning import constrain
from ops.block_recurrence import block_recurrence
from ops.elementwise import gelu
from ops.projection import project, project_each


class LinOSS(Mixer):
    """Forced oscillators p'' = -A p + B x, y = Re(C p) + D x (arXiv 2410.03943, section 2), then GELU and a gated linear map.

    Each state is a place p and a velocity v, with A = relu(a) >= 0 and its own step dt = sigmoid(s). It is
    discretised in one of two ways:

      im (implicit):            v_t = v_{t-1} + dt (B x_t - A p_t),      p_t = p_{t-1} + dt v_t
      imex (implicit-explicit): v_t = v_{t-1} + dt (B x_t - A p_{t-1}),  p_t = p_{t-1} + dt v_t

    "im" forgets; "imex" keeps the oscillators' energy (eigenvalues of modulus 1), for long conservative dynamics. B and C are
    complex.

    The gated map of the authors' code has biases.

    Args:
      state: number of oscillators.
      discretization: "im" or "imex".
    """

    paper = "LinOSS, arXiv 2410.03943"
    primitive = "block_recurrence"
    sequence_parallel = ()  # no function of `ops` passes blocks of states on

    def __init__(self, width: int, *, rngs: nnx.Rngs, state: int = 64, discretization: str = "im"):
        check_choice("discretization", discretization, ("im", "imex"))
        at_least(1, state=state)
        self.discretization = discretization
        self.a = time_scale(rngs, uniform(0.0, 1.0), (state,), ("state",), group="ssm")
        self.s = time_scale(rngs, uniform(0.0, 1.0), (state,), ("state",), group="ssm")
        b_init, c_init = fan_in_uniform(width), fan_in_uniform(state)
        self.b = param(rngs, b_init, (width, 2, state), ("embed", None, "state"), decay=False, group="ssm")
        self.c = param(rngs, c_init, (2, state, width), (None, "state", "embed"))
        self.d = param(rngs, normal(1.0), (width,), (None,), decay=False)
        self.w_out = dense(rngs, (width, 2, width), ("embed", None, "mlp"))

    def discretize(self):
        """M [2, 2, N] and F [2, N] of (v, p)_t = M (v, p)_{t-1} + F B x_t."""
        a, dt = jax.nn.relu(self.a[...]), jax.nn.sigmoid(self.s[...])
        one = jnp.ones_like(a)
        if self.discretization == "imex":
            return jnp.stack([jnp.stack([one, -dt * a]), jnp.stack([dt, 1 - dt**2 * a])]), jnp.stack([dt, dt**2])
        inverse = 1 / (1 + dt**2 * a)
        return inverse * jnp.stack([jnp.stack([one, -dt * a]), jnp.stack([dt, one])]), inverse * jnp.stack([dt, dt**2])

    def mix(
        self, x: Tokens, state: Float[Array, "B 2 N"] | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, Float[Array, "B 2 N"] | None]:
        m, f = self.discretize()
        force = project(x, self.b[...]).astype(jnp.float32)
        # The real and the imaginary parts do not mix: they are states of their own.
        force = constrain(force[:, :, None] * f[:, None], "batch", "length", None, None, "state")
        both = lambda z: z.reshape(*z.shape[:-2], -1)
        h, state = block_recurrence(
            jnp.concatenate([m, m], -1), both(force), initial_state=state, segment_ids=segment_ids
        )
        real, imag = jnp.split(h[:, :, 1].astype(x.dtype), 2, axis=-1)
        y = gelu(project(real, self.c[0]) - project(imag, self.c[1]) + self.d[...] * x)
        value, gate = project_each(y, self.w_out[...])
        return value * jax.nn.sigmoid(gate), state

    def initial_state(self, batch: int, capacity: int) -> Float[Array, "B 2 N"]:
        return jnp.zeros((batch, 2, 2 * self.a.shape[0]), jnp.float32)

"""S5, one state space for all channels."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import nnx
from jaxtyping import Array, Float

from common.errors import UserError
from models.checks import head_size
from models.mixer import Ids, Mixer, Tokens
from models.params import constant, dense, log_step, normal, param, time_scale
from models.partitioning import constrain
from ops import segments
from ops.elementwise import gelu
from ops.hippo import normal_plus_low_rank
from ops.linear_recurrence import linear_recurrence
from ops.projection import project, project_each

State = tuple[Float[Array, "B N"], Float[Array, "B N"]]


class S5(Mixer):
    """h_t = e^{dt Lambda} h_{t-1} + (e^{dt Lambda} - 1) / Lambda B x_t, y_t = 2 Re(C h_t) + D x_t (arXiv 2208.04933, section 3),
    then u = gelu(y) and u * sigmoid(W u).

    P states, of which the P/2 with positive frequencies are kept, each with its own dt. Lambda starts as the eigenvalues of
    `blocks` equal HiPPO-LegS normal parts, B and C as random maps in the basis of their eigenvectors, both N(0, 1/P) (the
    authors' call takes P for B's fan-in, too; their normal is truncated). Re Lambda is kept below -1e-4 (the authors' option
    `clip_eigs`). Two-sided: a second recurrence runs backwards and is read by its own C; both see the token itself, as in the
    authors' code.

    Args:
      state: P.
      blocks: number of HiPPO blocks at initialisation.
      dt_min, dt_max: range of the step size at initialisation.
    """

    bidirectional = True
    paper = "S5, arXiv 2208.04933"
    primitive = "linear_recurrence"
    tiny = {"state": 16, "blocks": 2}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        base_width: int,
        causal: bool = True,
        state: int = 256,
        blocks: int = 8,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ):
        size = head_size(state, blocks, "s5's state", "blocks")
        if size % 2:
            raise UserError(f"`state` / `blocks` must be even, got {state} / {blocks}")
        self.causal = causal
        half = state // 2
        eigenvalues, vectors, _, _ = normal_plus_low_rank("legs", size)
        eigenvalues = np.tile(eigenvalues[size // 2 :], blocks)
        V = scipy.linalg.block_diag(*[vectors[:, size // 2 :]] * blocks)  # [P, P/2]

        def b_init(key, shape, dtype):
            # It sums over the width, which the authors' deviation leaves out: that holds where a wider model is scaled from.
            real = jax.random.normal(key, (width, state), dtype) * (state**-0.5 * (base_width / width) ** 0.5)
            return jnp.stack([real @ jnp.asarray(part, dtype) for part in (V.real, -V.imag)], 1)  # B^T conj(V)

        def c_init(key, shape, dtype):
            real, imag = jax.random.normal(key, (2, shape[0], state, width), dtype) * state**-0.5
            v_real, v_imag = jnp.asarray(V.real.T, dtype), jnp.asarray(V.imag.T, dtype)
            return jnp.stack([v_real @ real - v_imag @ imag, v_real @ imag + v_imag @ real], 1)  # V^T C^T

        facts = {"decay": False, "group": "ssm"}
        self.a_real = param(rngs, constant(eigenvalues.real), (half,), ("state",), keep_float32=True, **facts)
        self.a_imag = param(rngs, constant(eigenvalues.imag), (half,), ("state",), keep_float32=True, **facts)
        self.log_dt = time_scale(rngs, log_step(dt_min, dt_max), (half,), ("state",), group="ssm")
        self.b = param(rngs, b_init, (width, 2, half), ("embed", None, "state"), **facts)
        # Real and imaginary parts of C, for each direction.
        c_shape, c_axes = (1 if causal else 2, 2, half, width), (None, None, "state", "embed")
        self.c = param(rngs, c_init, c_shape, c_axes)
        self.d = param(rngs, normal(1.0), (width,), (None,), decay=False)
        self.w = dense(rngs, (width, width), ("embed", "mlp"))

    def mix(
        self, x: Tokens, state: State | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, State | None]:
        eigenvalue = jax.lax.complex(jnp.minimum(self.a_real[...], -1e-4), self.a_imag[...])
        step = jnp.exp(self.log_dt[...]) * eigenvalue
        gain = jnp.expm1(step) / eigenvalue
        real, imag = (a.astype(jnp.float32) for a in project_each(x, self.b[...]))
        real, imag = real * gain.real - imag * gain.imag, real * gain.imag + imag * gain.real
        b = tuple(constrain(part, "batch", "length", "state") for part in (real, imag))
        a = jnp.exp(step)
        a = (a.real, a.imag)
        h, state = linear_recurrence(a, b, initial_state=state, segment_ids=segment_ids)
        y = self.read(h, 0, x.dtype) + self.d[...] * x
        if not self.causal:
            backwards = tuple(segments.reverse(part, segment_ids) for part in b)
            h, _ = linear_recurrence(a, backwards, segment_ids=segment_ids)
            y = y + self.read(tuple(segments.reverse(part, segment_ids) for part in h), 1, x.dtype)
        y = gelu(y)
        return y * jax.nn.sigmoid(project(y, self.w[...])), state

    def read(self, h, direction, dtype):
        """2 Re(C h)."""
        real, imag = (part.astype(dtype) for part in h)
        return 2 * (project(real, self.c[direction, 0]) - project(imag, self.c[direction, 1]))

    def initial_state(self, batch: int, capacity: int) -> State:
        size = self.a_real.shape[0]
        return (jnp.zeros((batch, size), jnp.float32), jnp.zeros((batch, size), jnp.float32))

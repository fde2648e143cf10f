"""S4, the structured state space."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models.checks import even
from models.mixer import Ids, Mixer, Tokens
from models.params import constant, dense, log_step, normal, param, time_scale
from models.partitioning import constrain
from models.state_space import from_lag_one, look_ahead
from ops import segments
from ops.dplr import dplr_kernel, dplr_scan
from ops.elementwise import gelu
from ops.hippo import normal_plus_low_rank
from ops.long_convolution import long_convolution
from ops.projection import project_each

State = tuple[Float[Array, "B D N"], Float[Array, "B D N"]]


class S4(Mixer):
    """h' = A h + B x, y = C h + D x for each channel, with A = Diag(Lambda) - P P* (arXiv 2111.00396, section 3), then GELU and
    a gated linear map.

    Discretised by the bilinear rule, the layer is a convolution, whose kernel comes from its generating function by Cauchy sums
    and Woodbury's identity (whole sequences, algorithm 1), or a recurrence (streams and packed rows). Lambda, P and B
    start as HiPPO-LegS' matrices in the basis where its normal part is diagonal; every channel has its own copy. Two-sided:
    a second kernel with its own C acts on the future, from lag 1 on.

    Departures: the parameter is C itself and not C (1 - Abar^L), so that every length L is exact (see `ops.dplr`); Q = P, as
    in the authors' later code, which keeps A stable whatever is learned (arXiv 2202.09729); B is not clipped at
    initialisation.

    The gated map starts 1.73 times as large as in the authors' code; see `models.params.dense`.

    Args:
      state: N; N/2 conjugate pairs are kept.
      dt_min, dt_max: range of the step size at initialisation.
    """

    bidirectional = True
    paper = "S4, arXiv 2111.00396"
    primitive = "long_convolution"
    sequence_parallel = ()  # a Fourier transform is of the whole length
    complexity = "T log T"
    tiny = {"state": 8}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = True,
        state: int = 64,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ):
        even(state=state)
        self.causal = causal
        half = state // 2
        eigenvalues, _, p, b = normal_plus_low_rank("legs", state)
        # The second half of the states has one of each conjugate pair. All channels start alike, but for dt and C.
        eigenvalues, p, b = eigenvalues[half:], p[half:, 0], b[half:]
        parts = lambda z: constant(np.stack([z.real, z.imag])[:, None])
        # Channels are split over no device: XLA's partitioner cannot cut the batch of a Fourier transform.
        self.log_dt = time_scale(rngs, log_step(dt_min, dt_max), (width,), (None,), group="ssm")
        self.log_a_real = time_scale(
            rngs, constant(np.log(-eigenvalues.real)), (width, half), (None, None), group="ssm"
        )
        self.a_imag = time_scale(rngs, constant(eigenvalues.imag), (width, half), (None, None), group="ssm")
        self.p = time_scale(rngs, parts(p), (2, width, half), (None, None, None), group="ssm")
        self.b = time_scale(rngs, parts(b), (2, width, half), (None, None, None), group="ssm")
        # Real and imaginary parts of C, for each direction.
        directions = 1 if causal else 2
        c_shape, c_axes = (directions, 2, width, half), (None, None, None, None)
        self.c = param(rngs, normal(0.5**0.5), c_shape, c_axes, decay=False, keep_float32=True)
        self.d = param(rngs, normal(1.0), (width,), (None,), decay=False, keep_float32=True)
        self.w_out = dense(rngs, (width, 2, width), ("embed", None, "mlp"))

    def mix(
        self, x: Tokens, state: State | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, State | None]:
        dt = jnp.exp(self.log_dt[...])
        system = (-jnp.exp(self.log_a_real[...]), self.a_imag[...]), tuple(self.p[...]), tuple(self.b[...])
        x32 = constrain(x.astype(jnp.float32), "batch", None, "activation")
        if state is None and segment_ids is None:
            kernels = dplr_kernel(*system, (self.c[:, 0], self.c[:, 1]), dt, x.shape[1])
            future = None if self.causal else from_lag_one(kernels[1])
            y = long_convolution(x32, kernels[0], bidirectional_kernel=future)
        else:
            y, state = dplr_scan(x32, *system, tuple(self.c[0]), dt, initial_state=state, segment_ids=segment_ids)
            if not self.causal:
                z, _ = dplr_scan(
                    segments.reverse(x32, segment_ids), *system, tuple(self.c[1]), dt, segment_ids=segment_ids
                )
                y = y + look_ahead(z, segment_ids)
        y = gelu(constrain(y, "batch", None, "activation") + self.d[...] * x32).astype(x.dtype)
        value, gate = project_each(y, self.w_out[...])
        return value * jax.nn.sigmoid(gate), state

    def initial_state(self, batch: int, capacity: int) -> State:
        zeros = jnp.zeros((batch, *self.a_imag.shape), jnp.float32)
        return (zeros, zeros)

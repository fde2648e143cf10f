"""S4D, the diagonal state space."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from common.errors import check_choice
from models.checks import even
from models.mixer import Ids, Mixer, Tokens
from models.params import Initializer, constant, dense, log_step, normal, param, time_scale
from models.partitioning import constrain
from models.state_space import from_lag_one, look_ahead, pair, unit
from ops import segments
from ops.elementwise import gelu
from ops.hippo import normal_plus_low_rank
from ops.long_convolution import long_convolution, vandermonde_kernel
from ops.projection import project_each
from ops.state_space_scan import state_space_scan

State = tuple[Float[Array, "B N D"], Float[Array, "B N D"]]


class S4D(Mixer):
    """h' = A h + x, y = 2 Re(C . h) + D x for each channel, with diagonal A (arXiv 2206.11893), then GELU and a gated linear map.

    Discretised by zero-order hold or the bilinear rule, the layer is a convolution with K_l = 2 Re sum_n C_n Bbar_n Abar_n^l
    (whole sequences) or a recurrence (streams and packed rows). C stands for C B, with C complex normal of unit
    variance and B = 1 at first; for "legs" B is HiPPO's in the basis of the eigenvectors, its size clipped at 2. The authors'
    code starts alike and trains both factors. Two-sided: a second kernel with its own C acts on the future, from lag 1.

    The gated map starts 1.73 times as large as in the authors' code; see `models.params.dense`.

    Args:
      state: N; N/2 conjugate pairs are kept.
      init: eigenvalues at initialisation: "lin" (-1/2 + i pi n), "inv" (-1/2 + i N/pi (N/(2n+1) - 1)) or "legs" (of
        HiPPO-LegS' normal part).
      discretization: "zoh" or "bilinear".
      dt_min, dt_max: range of the step size at initialisation.
    """

    bidirectional = True
    paper = "S4D, arXiv 2206.11893"
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
        init: str = "lin",
        discretization: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ):
        check_choice("init", init, ("lin", "inv", "legs"))
        check_choice("discretization", discretization, ("zoh", "bilinear"))
        even(state=state)
        real, imag = eigenvalues(init, state)
        self.causal = causal
        self.discretization = discretization
        half = state // 2
        # Channels are split over no device: XLA's partitioner cannot cut the batch of a Fourier transform.
        self.log_dt = time_scale(rngs, log_step(dt_min, dt_max), (width,), (None,), group="ssm")
        self.log_a_real = time_scale(rngs, constant(np.log(-real)), (width, half), (None, None), group="ssm")
        self.a_imag = time_scale(rngs, constant(imag), (width, half), (None, None), group="ssm")
        # Real and imaginary parts of C, for each direction.
        directions = 1 if causal else 2
        c_shape, c_axes = (directions, 2, width, half), (None, None, None, None)
        c_init = legs_output(state) if init == "legs" else normal(0.5**0.5)
        self.c = param(rngs, c_init, c_shape, c_axes, decay=False, keep_float32=True)
        self.d = param(rngs, normal(1.0), (width,), (None,), decay=False, keep_float32=True)
        self.w_out = dense(rngs, (width, 2, width), ("embed", None, "mlp"))

    def discretize(self):
        """log(Abar) and Bbar, complex [width, N/2]."""
        dt = jnp.exp(self.log_dt[...])[:, None]
        a = jax.lax.complex(-jnp.exp(self.log_a_real[...]), self.a_imag[...])
        if self.discretization == "zoh":
            return dt * a, jnp.expm1(dt * a) / a
        return jnp.log((1 + dt * a / 2) / (1 - dt * a / 2)), dt / (1 - dt * a / 2)

    def mix(
        self, x: Tokens, state: State | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, State | None]:
        log_a, b = self.discretize()
        c = [jax.lax.complex(self.c[i, 0], self.c[i, 1]) * b for i in range(self.c.shape[0])]
        x32 = constrain(x.astype(jnp.float32), "batch", None, "activation")
        if state is None and segment_ids is None:
            kernels = [vandermonde_kernel(pair(log_a), pair(c_i), x.shape[1]) for c_i in c]
            future = None if self.causal else from_lag_one(kernels[1])
            y = long_convolution(x32, kernels[0], bidirectional_kernel=future)
        else:
            a, one = pair(jnp.exp(log_a)), unit(log_a)
            y, state = state_space_scan(x32, a, one, pair(c[0]), initial_state=state, segment_ids=segment_ids)
            if not self.causal:
                backwards = segments.reverse(x32, segment_ids)
                z, _ = state_space_scan(backwards, a, one, pair(c[1]), segment_ids=segment_ids)
                y = y + look_ahead(z, segment_ids)
        y = gelu(constrain(y, "batch", None, "activation") + self.d[...] * x32).astype(x.dtype)
        value, gate = project_each(y, self.w_out[...])
        return value * jax.nn.sigmoid(gate), state

    def initial_state(self, batch: int, capacity: int) -> State:
        width, half = self.a_imag.shape
        return (jnp.zeros((batch, half, width), jnp.float32), jnp.zeros((batch, half, width), jnp.float32))


def legs_output(state: int) -> Initializer:
    """C B, where C is complex normal of unit variance and B that of HiPPO-LegS, clipped; C's phase is even, so that B's is of no
    effect."""
    size = np.minimum(np.abs(normal_plus_low_rank("legs", state)[3][state // 2 :]), 2.0)
    return lambda key, shape, dtype: normal(0.5**0.5)(key, shape, dtype) * jnp.asarray(size, dtype)


def eigenvalues(init: str, state: int) -> tuple[np.ndarray, np.ndarray]:
    """Real (negative) and imaginary (positive) parts of the N/2 eigenvalues at initialisation."""
    n = np.arange(state // 2)
    real = np.full(state // 2, -0.5)
    if init == "lin":
        return real, np.pi * n
    if init == "inv":
        return real, state / np.pi * (state / (2 * n + 1) - 1)
    return real, normal_plus_low_rank("legs", state)[0].imag[state // 2 :]

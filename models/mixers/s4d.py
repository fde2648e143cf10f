"""S4D, the diagonal state space."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.errors import UserError
from models.mixer import Mixer
from models.params import dense, log_uniform, normal, param
from models.partitioning import constrain
from ops import segments
from ops.hippo import normal_plus_low_rank
from ops.long_convolution import long_convolution, vandermonde_kernel
from ops.state_space_scan import state_space_scan


class S4D(Mixer):
    """h' = A h + x, y = 2 Re(C . h) + D x for each channel, with diagonal A (arXiv 2206.11893), then GELU and a gated linear map.

    Discretised by zero-order hold or the bilinear rule, the layer is a convolution with K_l = 2 Re sum_n C_n Bbar_n Abar_n^l
    (whole sequences) or a recurrence (streams and packed rows). B is 1, as in the authors' code. Two-sided: a second kernel
    with its own C acts on the future, from lag 1 on.

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
        if discretization not in ("zoh", "bilinear"):
            raise UserError(f"s4d's discretization must be 'zoh' or 'bilinear', got {discretization!r}")
        if state < 2 or state % 2:
            raise UserError(f"s4d's state must be even, got {state}")
        real, imag = eigenvalues(init, state)
        self.causal = causal
        self.discretization = discretization
        facts = {"decay": False, "group": "ssm", "keep_float32": True}
        half = state // 2
        log_dt = lambda *args: jnp.log(log_uniform(dt_min, dt_max)(*args))
        fixed = lambda value: lambda key, shape, dtype: jnp.broadcast_to(jnp.asarray(value, dtype), shape)
        # Channels are split over no device: XLA's partitioner cannot cut the batch of a Fourier transform.
        self.log_dt = param(rngs, log_dt, (width,), (None,), **facts)
        self.log_a_real = param(rngs, fixed(np.log(-real)), (width, half), (None, None), **facts)
        self.a_imag = param(rngs, fixed(imag), (width, half), (None, None), **facts)
        # Real and imaginary parts of C, for each direction.
        directions = 1 if causal else 2
        c_shape, c_axes = (directions, 2, width, half), (None, None, None, None)
        self.c = param(rngs, normal(0.5**0.5), c_shape, c_axes, decay=False, keep_float32=True)
        self.d = param(rngs, normal(1.0), (width,), (None,), decay=False, keep_float32=True)
        self.w_out = dense(rngs, (width, 2, width), ("embed", None, "mlp"))

    def discretize(self):
        """log(Abar) and Bbar, complex [width, N/2]."""
        dt = jnp.exp(self.log_dt[...])[:, None]
        a = jax.lax.complex(-jnp.exp(self.log_a_real[...]), self.a_imag[...])
        if self.discretization == "zoh":
            return dt * a, jnp.expm1(dt * a) / a
        return jnp.log((1 + dt * a / 2) / (1 - dt * a / 2)), dt / (1 - dt * a / 2)

    def mix(self, x, state, *, segment_ids, positions):
        log_a, b = self.discretize()
        c = [jax.lax.complex(self.c[i, 0], self.c[i, 1]) * b for i in range(self.c.shape[0])]
        x32 = constrain(x.astype(jnp.float32), "batch", None, "activation")
        if state is None and segment_ids is None:
            kernels = [vandermonde_kernel(pair(log_a), pair(c_i), x.shape[1]) for c_i in c]
            # Lag l of the second kernel acts on the token l + 1 ahead.
            future = None if self.causal else jnp.pad(kernels[1], ((0, 0), (1, 0)))[:, :-1]
            y = long_convolution(x32, kernels[0], bidirectional_kernel=future)
        else:
            a, one = pair(jnp.exp(log_a)), pair(jnp.ones_like(log_a))
            y, state = state_space_scan(x32, a, one, pair(c[0]), initial_state=state, segment_ids=segment_ids)
            if not self.causal:
                backwards = segments.reverse(x32, segment_ids)
                z, _ = state_space_scan(backwards, a, one, pair(c[1]), segment_ids=segment_ids)
                z = jnp.pad(z, ((0, 0), (1, 0), (0, 0)))[:, :-1]
                z = jnp.where(segments.is_start(segment_ids)[..., None], 0, z)
                y = y + segments.reverse(z, segment_ids)
        y = jax.nn.gelu(constrain(y, "batch", None, "activation") + self.d[...] * x32).astype(x.dtype)
        value, gate = jnp.moveaxis(jnp.einsum("btd,dge->btge", y, self.w_out[...]), 2, 0)
        return value * jax.nn.sigmoid(gate), state

    def initial_state(self, batch, capacity):
        width, half = self.a_imag.shape
        return (jnp.zeros((batch, half, width), jnp.float32), jnp.zeros((batch, half, width), jnp.float32))


def pair(z):
    """(real, imaginary)."""
    return jnp.real(z), jnp.imag(z)


def eigenvalues(init: str, state: int) -> tuple[np.ndarray, np.ndarray]:
    """Real (negative) and imaginary (positive) parts of the N/2 eigenvalues at initialisation.

    Raises:
      UserError: for an unknown `init`.
    """
    n = np.arange(state // 2)
    real = np.full(state // 2, -0.5)
    if init == "lin":
        return real, np.pi * n
    if init == "inv":
        return real, state / np.pi * (state / (2 * n + 1) - 1)
    if init == "legs":
        return real, normal_plus_low_rank("legs", state)[0].imag[state // 2 :]
    raise UserError(f"s4d's init must be 'lin', 'inv' or 'legs', got {init!r}")

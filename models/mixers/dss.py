"""DSS, the diagonal state space with complex read-outs."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from common.errors import UserError, check_choice
from models.checks import at_least
from models.mixer import Ids, Mixer, Tokens
from models.params import constant, dense, log_step, normal, param, time_scale
from models.partitioning import constrain
from models.state_space import from_lag_one, look_ahead, pair, unit
from ops import segments
from ops.elementwise import gelu
from ops.hippo import normal_plus_low_rank
from ops.long_convolution import long_convolution, vandermonde_kernel
from ops.projection import project
from ops.state_space_scan import state_space_scan

State = tuple[Float[Array, "B N D"], Float[Array, "B N D"]]

MAX_GROWTH = 40.0


class DSS(Mixer):
    """y = K * x + D x for each channel, K_l = Re sum_n W_n k_n(l), then GELU and a linear map (arXiv 2203.14343, proposition 1),
    with N eigenvalues Lambda_n that the channels share, steps dt and complex W of each channel, and

      exp:      k_n(l) = (e^{dt Lambda_n} - 1) / Lambda_n e^{l dt Lambda_n},            Re Lambda < 0
      softmax:  k_n(l) = 1 / Lambda_n e^{l dt Lambda_n} / sum_{r < L} e^{r dt Lambda_n},   any Lambda.

    L is the length of the sequence in the paper; it is the model's `length` here, whatever the sequence's, so that K is one
    kernel and its recurrence exists; under "softmax" sequences may not be longer, and a stream that runs beyond it turns NaN. For
    that recurrence to stay in float32's range, Re(dt Lambda) L is cut off at 40. 1/z is conj(z) / max(|z|^2, 1e-7) there (the
    authors add the 1e-7). One dt serves the real and the imaginary parts, as in the paper. Two-sided: a second kernel with its
    own W acts on the future, from lag 1 on.

    The gated map starts 1.73 times as large as in the authors' code, see `models.params.dense`; the kernel "exp" is the default
    here, "softmax" there.

    Args:
      kernel: "exp" or "softmax".
      state: N.
      dt_min, dt_max: range of the step size at initialisation.
    """

    bidirectional = True
    paper = "DSS, arXiv 2203.14343"
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
        length: int = 512,
        kernel: str = "exp",
        state: int = 64,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ):
        check_choice("kernel", kernel, ("exp", "softmax"))
        at_least(1, state=state)
        self.causal = causal
        self.kernel = kernel
        self.length = length
        self.fixed_length = kernel == "softmax"
        # Channels are split over no device: XLA's partitioner cannot cut the batch of a Fourier transform.
        self.log_dt = time_scale(rngs, log_step(dt_min, dt_max), (width,), (None,), group="ssm")
        # Re Lambda, which starts at -1/2 as that of HiPPO-LegS' normal part; the logarithm of its negative under "exp".
        self.a_real = time_scale(
            rngs, constant(jnp.log(0.5) if kernel == "exp" else -0.5), (state,), (None,), group="ssm"
        )
        frequencies = normal_plus_low_rank("legs", 2 * state)[0].imag[state:]
        self.a_imag = time_scale(rngs, constant(frequencies), (state,), (None,), group="ssm")
        # Real and imaginary parts of W, for each direction.
        w_shape, w_axes = (1 if causal else 2, 2, width, state), (None, None, None, None)
        self.w = param(rngs, normal(1.0), w_shape, w_axes, decay=False, keep_float32=True)
        self.d = param(rngs, normal(1.0), (width,), (None,), decay=False, keep_float32=True)
        self.w_out = dense(rngs, (width, width), ("embed", "mlp"))

    def modes(self):
        """log k_n(l) / k_n(l - 1) and k_n(0), complex [width, N]."""
        dt = jnp.exp(self.log_dt[...])[:, None]
        if self.kernel == "exp":
            a = jax.lax.complex(-jnp.exp(self.a_real[...]), self.a_imag[...])
            return dt * a, jnp.expm1(dt * a) / a
        a = jax.lax.complex(self.a_real[...], self.a_imag[...])
        step = jax.lax.complex(jnp.minimum(dt * a.real, MAX_GROWTH / self.length), dt * a.imag)
        # A growing mode is normalised from its end: sum_r e^{r s} = e^{(L-1) s} sum_r e^{-r s}.
        grows = step.real > 0
        decaying = jnp.where(grows, -step, step)
        first = jnp.exp(jnp.where(grows, -(self.length - 1) * step, 0))
        return step, first * jnp.expm1(decaying) * reciprocal(a * jnp.expm1(self.length * decaying))

    def mix(
        self, x: Tokens, state: State | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, State | None]:
        if self.fixed_length and x.shape[1] > self.length:
            raise UserError(f"this dss was built for length {self.length}, got {x.shape[1]} tokens; use kernel='exp'")
        step, k = self.modes()
        # The operations take twice the real part, for conjugate pairs; these modes stand alone.
        w = [jax.lax.complex(self.w[i, 0], self.w[i, 1]) * k / 2 for i in range(self.w.shape[0])]
        x32 = constrain(x.astype(jnp.float32), "batch", None, "activation")
        if state is None and segment_ids is None:
            kernels = [vandermonde_kernel(pair(step), pair(w_i), x.shape[1]) for w_i in w]
            future = None if self.causal else from_lag_one(kernels[1])
            y = long_convolution(x32, kernels[0], bidirectional_kernel=future)
        else:
            a = pair(jnp.exp(step))
            y, state = state_space_scan(x32, a, pair(w[0]), unit(step), initial_state=state, segment_ids=segment_ids)
            if self.fixed_length:  # a stream that runs beyond the kernel says so
                y = jnp.where((positions < self.length)[..., None], y, jnp.nan)
            if not self.causal:
                backwards = segments.reverse(x32, segment_ids)
                z, _ = state_space_scan(backwards, a, pair(w[1]), unit(step), segment_ids=segment_ids)
                y = y + look_ahead(z, segment_ids)
        y = gelu(constrain(y, "batch", None, "activation") + self.d[...] * x32).astype(x.dtype)
        return project(y, self.w_out[...]), state

    def initial_state(self, batch: int, capacity: int) -> State:
        width, size = self.w.shape[2:]
        return (jnp.zeros((batch, size, width), jnp.float32), jnp.zeros((batch, size, width), jnp.float32))


def reciprocal(z):
    """1/z, bounded at z = 0."""
    return jnp.conj(z) / jnp.maximum(jnp.real(z) ** 2 + jnp.imag(z) ** 2, 1e-7)

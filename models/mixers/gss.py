"""GSS, the gated state space."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.checks import at_least, scaled
from models.mixer import Ids, Mixer, Tokens
from models.params import dense, normal, param, residual_output, time_scale
from models.partitioning import constrain
from ops.elementwise import gelu
from ops.long_convolution import long_convolution, vandermonde_kernel
from ops.projection import project
from ops.state_space_scan import state_space_scan

State = tuple[Float[Array, "B N C"], Float[Array, "B N C"]]


class GatedStateSpace(Mixer):
    """o = W_o (W_g y * u), u = gelu(W_u x), y = K * v + D v, v = gelu(W_v x) (arXiv 2206.13947, section 3.2).

    The state space runs on few channels; gating brings back the width. K is the simplified exponential kernel of DSS,
    K_l = Re sum_n C_n (e^{Lambda_n} - 1) / Lambda_n e^{l Lambda_n}, without a step size, and with
    Lambda = -exp(Lambda_re) + i exp(Lambda_im), shared by the channels, drawn at random: the paper's finding is that nothing more
    careful is needed. C starts with variance 1/N in each part, so that y is of v's size whatever N.

    Args:
      state: N.
      expand: size of u over the width.
      channels: of the state space; by default a quarter of the width, as in the paper.
    """

    replaces_channel_mixer = True
    paper = "GSS, arXiv 2206.13947"
    primitive = "long_convolution"
    sequence_parallel = ()  # a Fourier transform is of the whole length
    complexity = "T log T"
    tiny = {"state": 8}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        state: int = 512,
        expand: float = 4.0,
        channels: int | None = None,
    ):
        at_least(1, state=state, channels=channels)
        inner = max(1, width // 4) if channels is None else channels
        hidden = scaled(width, expand=expand)
        self.channels = inner
        self.w_u = dense(rngs, (width, hidden), ("embed", "mlp"))
        # Channels are split over no device: XLA's partitioner cannot cut the batch of a Fourier transform.
        self.w_v = dense(rngs, (width, inner), ("embed", None))
        self.log_a_real = time_scale(rngs, normal(1.0), (state,), (None,), group="ssm")
        self.log_a_imag = time_scale(rngs, normal(1.0), (state,), (None,), group="ssm")
        self.c = param(rngs, normal(state**-0.5), (2, inner, state), (None, None, None), decay=False, keep_float32=True)
        self.d = param(rngs, normal(1.0), (inner,), (None,), decay=False, keep_float32=True)
        self.w_g = dense(rngs, (inner, hidden), (None, "mlp"))
        self.w_o = residual_output(rngs, (hidden, width), ("mlp", "embed"), depth, branches=1)

    def mix(
        self, x: Tokens, state: State | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, State | None]:
        u = constrain(gelu(project(x, self.w_u[...])), "batch", "length", "mlp")
        v = gelu(project(x, self.w_v[...])).astype(jnp.float32)
        v = constrain(v, "batch", None, "activation")
        a = jax.lax.complex(-jnp.exp(self.log_a_real[...]), jnp.exp(self.log_a_imag[...]))
        # The operations take twice the real part, for conjugate pairs; these modes stand alone.
        c = jax.lax.complex(self.c[0], self.c[1]) * jnp.expm1(a) / a / 2
        every = lambda z: tuple(jnp.broadcast_to(part, c.shape) for part in (jnp.real(z), jnp.imag(z)))
        if state is None and segment_ids is None:
            y = long_convolution(v, vandermonde_kernel(every(a), every(c), v.shape[1]))
        else:
            one = every(jnp.ones_like(a))
            y, state = state_space_scan(
                v, every(jnp.exp(a)), one, every(c), initial_state=state, segment_ids=segment_ids
            )
        y = (constrain(y, "batch", None, "activation") + self.d[...] * v).astype(x.dtype)
        return project(project(y, self.w_g[...]) * u, self.w_o[...]), state

    def initial_state(self, batch: int, capacity: int) -> State:
        _, inner, size = self.c.shape
        return (jnp.zeros((batch, size, inner), jnp.float32), jnp.zeros((batch, size, inner), jnp.float32))

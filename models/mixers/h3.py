"""H3, Hungry Hungry Hippos."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.errors import UserError
from models.checks import even
from models.mixer import Ids, Mixer, Tokens
from models.params import constant, dense, fan_in_uniform, log_step, normal, param, residual_output, time_scale
from models.partitioning import constrain
from models.state_space import pair, unit
from ops.long_convolution import long_convolution, vandermonde_kernel
from ops.products import product
from ops.projection import project, project_each
from ops.short_convolution import short_convolution
from ops.state_space_scan import state_space_scan


class H3(Mixer):
    """o = q * SSM_diag(SSM_shift(k) * v), y = W_o o (arXiv 2212.14052, section 3.1 and algorithm 1).

    q, k, v = W x. SSM_shift is a convolution with `state` free taps, plus a skip D_k k. With heads of more than one channel
    the product with v is outer, k_t v_t^T, SSM_diag acts on each of its entries, with one system per head (plus a skip), and
    q_t reads the result. SSM_diag is S4D: h' = A h + u, 2 Re(C . h), A_n = -1/2 + i pi n at initialisation, by the bilinear
    rule; its B is 1, which the authors' code learns, and the code's biases are left out.

    Whole sequences are convolved by FFT; streams and packed rows run the two systems as recurrences.

    Args:
      state: N, the taps of the shift and the size of the diagonal system (N/2 conjugate pairs).
      head_size: channels of a head.
      dt_min, dt_max: range of the step size at initialisation.
    """

    paper = "H3, arXiv 2212.14052"
    primitive = "long_convolution"
    sequence_parallel = ()  # a Fourier transform is of the whole length
    complexity = "T log T"
    tiny = {"state": 8, "head_size": 2}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        state: int = 64,
        head_size: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ):
        even(state=state)
        if head_size < 1 or width % head_size:
            raise UserError(f"width {width} cannot be divided into heads of {head_size} channels; change `head_size`")
        heads = width // head_size
        half = state // 2
        self.sizes = (heads, head_size, half)
        # Channels are split over no device: XLA's partitioner cannot cut the batch of a Fourier transform.
        self.w_qkv = dense(rngs, (width, 3, width), ("embed", None, None))
        free = {"decay": False, "keep_float32": True}
        # The last tap weighs the present token.
        self.shift = param(rngs, fan_in_uniform(state), (state, width), (None, None), **free)
        self.d_k = param(rngs, normal(1.0), (width,), (None,), **free)
        self.log_dt = time_scale(rngs, log_step(dt_min, dt_max), (heads,), (None,), group="ssm")
        log_half = constant(np.log(0.5))
        self.log_a_real = time_scale(rngs, log_half, (heads, half), (None, None), group="ssm")
        self.a_imag = param(rngs, constant(np.pi * np.arange(half)), (heads, half), (None, None), group="ssm", **free)
        self.c = param(rngs, normal(0.5**0.5), (2, heads, half), (None, None, None), **free)
        self.d = param(rngs, normal(1.0), (heads,), (None,), **free)
        self.w_o = residual_output(rngs, (width, width), (None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        heads, size, _ = self.sizes
        q, k, v = (
            constrain(a.astype(jnp.float32), "batch", None, "activation") for a in project_each(x, self.w_qkv[...])
        )
        by_head = lambda u: u.reshape(*u.shape[:2], heads, size)
        whole = state is None and segment_ids is None
        new = {}

        if whole:
            shifted = long_convolution(k, jnp.flip(self.shift[...], 0).T)
        else:
            shifted, new["shift"] = short_convolution(
                k,
                self.shift[...],
                initial_state=None if state is None else state["shift"],
                segment_ids=segment_ids,
            )
        k = shifted + self.d_k[...] * k

        kv = product("bthi,bthj->bthij", by_head(k), by_head(v)).reshape(*x.shape[:2], -1)
        kv = constrain(kv, "batch", None, "activation")
        # Every entry of a head's product goes through the head's system.
        spread = lambda p: jax.tree.map(lambda z: jnp.repeat(z, size**2, axis=0), p)
        log_a, c = self.discretize()
        if whole:
            y = long_convolution(kv, spread(vandermonde_kernel(pair(log_a), pair(c), x.shape[1])))
        else:
            y, new["diagonal"] = state_space_scan(
                kv,
                spread(pair(jnp.exp(log_a))),
                spread(unit(c)),
                spread(pair(c)),
                initial_state=None if state is None else state["diagonal"],
                segment_ids=segment_ids,
            )
        y = constrain(y, "batch", None, "activation") + spread(self.d[...]) * kv
        y = y.reshape(*x.shape[:2], heads, size, size)
        o = product("bthi,bthij->bthj", by_head(q), y)
        return project(o.reshape(x.shape).astype(x.dtype), self.w_o[...]), new

    def discretize(self):
        """log(Abar) and C Bbar, complex [heads, N/2]."""
        dt = jnp.exp(self.log_dt[...])[:, None]
        half_step = dt / 2 * jax.lax.complex(-jnp.exp(self.log_a_real[...]), self.a_imag[...])
        c = jax.lax.complex(self.c[0], self.c[1])
        return jnp.log((1 + half_step) / (1 - half_step)), c * dt / (1 - half_step)

    def initial_state(self, batch: int, capacity: int) -> dict:
        heads, size, half = self.sizes
        h = jnp.zeros((batch, half, heads * size**2), jnp.float32)
        taps, width = self.shift.shape
        return {"shift": jnp.zeros((batch, taps - 1, width), jnp.float32), "diagonal": (h, h)}

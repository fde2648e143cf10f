"""Long convolution of a stream: the window of past inputs that the kernel reaches is the state."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ops import dispatch
from ops.long_convolution import long_convolution


def windowed_convolution(
    x: Float[Array, "B T D"], kernel: Float[Array, "D L"], state: Float[Array, "B L-1 D"]
) -> tuple[Float[Array, "B T D"], Float[Array, "B L-1 D"]]:
    """Computes y_t = sum_{j<L} kernel_j x_{t-j} for a piece of a stream.

    For kernels that are no recurrence of small state (`state_space_scan` is better where they are). One token is a dot
    product with the window; longer pieces are convolved by FFT together with it.

    Args:
      x: inputs.
      kernel: one tap for each lag.
      state: the L-1 inputs before the first token, oldest first; zeros at the start of a sequence.

    Returns:
      y in the dtype of `x`; and the last L-1 inputs, in the dtype of `state`.

    Raises:
      ValueError: if the state is not the window of the kernel.
    """
    batch, length, width = x.shape
    if state.shape != (batch, kernel.shape[1] - 1, width):
        raise ValueError(f"state must be {(batch, kernel.shape[1] - 1, width)}; got {state.shape}")
    extended = jnp.concatenate([state, x.astype(state.dtype)], axis=1)
    if length == 1:
        taps = jnp.flip(kernel, 1).astype(state.dtype)
        y = jnp.einsum("bld,dl->bd", extended, taps, precision=dispatch.matmul_precision(state.dtype))[:, None]
    else:
        y = long_convolution(extended, kernel)[:, -length:]
    return y.astype(x.dtype), extended[:, length:]

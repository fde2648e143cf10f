"""SGConv, structured global convolution."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models.checks import ascending, at_least
from models.mixer import Ids, Mixer, Tokens
from models.params import constant, dense, normal, param
from models.partitioning import constrain
from ops.elementwise import gelu
from ops.long_convolution import long_convolution
from ops.projection import project_each
from ops.windowed_convolution import windowed_convolution


class SGConv(Mixer):
    """y_t = sum_l kernel_l x_{t-l} + D x_t, then GELU and a gated linear map (arXiv 2210.09298, section 3).

    kernel = 1/Z [w_0 alpha^(s-1), up_1(w_1) alpha^(s-2), up_2(w_2) alpha^(s-3), up_4(w_3) alpha^(s-4), ...]: s pieces of
    `kernel_size` parameters, each interpolated linearly to twice the length of the one before (the first two are equally
    long) and alpha times smaller. It reaches back `length` tokens, also in longer sequences. Z is the norm of the kernel at
    initialisation, for each channel, and never trained. Two-sided: a second kernel acts on the future, from lag 1 on.

    Streams carry the last `length` - 1 tokens, as the kernel is no recurrence of small state.

    Args:
      kernel_size: parameters of each piece.
      decay_min, decay_max: alpha of the first and the last channel, the others evenly between.
    """

    bidirectional = True
    packing = False
    paper = "SGConv, arXiv 2210.09298"
    primitive = "long_convolution"
    sequence_parallel = ()  # a Fourier transform is of the whole length
    complexity = "T log T"
    tiny = {"kernel_size": 4}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = True,
        length: int = 512,
        kernel_size: int = 64,
        decay_min: float = 2.0,
        decay_max: float = 2.0,
    ):
        at_least(1, kernel_size=kernel_size)
        ascending(decay_min=decay_min, decay_max=decay_max)
        self.causal = causal
        self.length = length
        self.decays = (decay_min, decay_max)
        directions = 1 if causal else 2
        scales = 1 + max(0, math.ceil(math.log2(length / kernel_size)))
        # Channels are split over no device: XLA's partitioner cannot cut the batch of a Fourier transform.
        shape, axes = (directions, scales, width, kernel_size), (None, None, None, None)
        self.pieces = param(rngs, normal(1.0), shape, axes, decay=False, group="ssm", keep_float32=True)
        kernel = multiscale(self.pieces[...], self.decays)
        z = constant(jnp.linalg.norm(kernel, axis=-1))
        self.z = param(rngs, z, (directions, width), (None, None), decay=False, group="fixed", keep_float32=True)
        self.d = param(rngs, normal(1.0), (width,), (None,), decay=False, keep_float32=True)
        self.w_out = dense(rngs, (width, 2, width), ("embed", None, "mlp"))

    def mix(
        self, x: Tokens, state: Float[Array, "B L D"] | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, Float[Array, "B L D"] | None]:
        kernel = multiscale(self.pieces[...], self.decays) / jax.lax.stop_gradient(self.z[...])[..., None]
        kernel = kernel[..., : self.length]
        x32 = constrain(x.astype(jnp.float32), "batch", None, "activation")
        if state is None:
            # Lag l of the second kernel acts on the token l + 1 ahead.
            future = None if self.causal else jnp.pad(kernel[1], ((0, 0), (1, 0)))
            y = long_convolution(x32, kernel[0], bidirectional_kernel=future)
        else:
            y, state = windowed_convolution(x32, kernel[0], state)
        y = gelu(constrain(y, "batch", None, "activation") + self.d[...] * x32).astype(x.dtype)
        value, gate = project_each(y, self.w_out[...])
        return value * jax.nn.sigmoid(gate), state

    def initial_state(self, batch: int, capacity: int) -> Float[Array, "B L D"]:
        return jnp.zeros((batch, self.length - 1, self.d.shape[0]), jnp.float32)


def multiscale(pieces, decays):
    """The kernel before it is divided by Z.

    Args:
      pieces: w, [directions, s, D, kernel_size].
      decays: alpha of the first and the last channel.

    Returns:
      [directions, D, kernel_size * 2^(s-1)].
    """
    directions, scales, width, size = pieces.shape
    alpha = np.linspace(*decays, width)[:, None]
    stretched = [
        jax.image.resize(pieces[:, i], (directions, width, size * 2 ** max(0, i - 1)), "linear")
        * np.float32(alpha ** (scales - 1 - i))
        for i in range(scales)
    ]
    return jnp.concatenate(stretched, axis=-1)

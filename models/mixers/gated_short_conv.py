"""The gated short convolution of LFM2."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.mixer import Ids, Mixer, Tokens
from models.params import conv_taps, dense, param, residual_output, zeros
from models.partitioning import constrain
from ops.projection import project, project_each
from ops.short_convolution import short_convolution

Last = Float[Array, "B past C"]  # inputs of the convolution, the oldest first


class GatedShortConv(Mixer):
    """[B, C, u] = W_in x, y = W_out (C * conv(B * u)) (LFM2, arXiv 2511.23404, section 2).

    The convolution is depthwise and causal, over the last L products B * u. There is no activation, and no memory of more than
    L tokens: it is a mixer to be put between others, as in `gated_short_conv+gated_short_conv+attention`.

    The released code starts all weights, the taps too, as N(0, 0.02^2); here maps start as N(0, 1/fan-in) and taps as in Mamba.

    Args:
      conv_size: L.
      bias: whether W_in, the convolution and W_out have biases.
    """

    paper = "LFM2 (gated short convolution), arXiv 2511.23404"
    primitive = "short_convolution"

    def __init__(self, width: int, *, rngs: nnx.Rngs, depth: int = 1, conv_size: int = 3, bias: bool = False):
        self.sizes = (conv_size, width)
        self.bias = bias
        self.w_in = dense(rngs, (width, 3, width), ("embed", None, "mlp"))
        self.taps = conv_taps(rngs, conv_size, width, "mlp")
        self.w_out = residual_output(rngs, (width, width), ("mlp", "embed"), depth)
        if bias:
            self.b_in = param(rngs, zeros, (3, width), (None, "mlp"), decay=False)
            self.b_conv = param(rngs, zeros, (width,), ("mlp",))
            self.b_out = param(rngs, zeros, (width,), ("embed",))

    def mix(
        self, x: Tokens, state: Last | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, Last | None]:
        parts = project_each(x, self.w_in[...])
        if self.bias:
            parts = [part + bias for part, bias in zip(parts, self.b_in[...].astype(x.dtype), strict=True)]
        b, c, u = (constrain(part, "batch", "length", "mlp") for part in parts)
        bias = self.b_conv[...] if self.bias else None
        o, state = short_convolution(b * u, self.taps[...], bias, initial_state=state, segment_ids=segment_ids)
        y = project(c * o, self.w_out[...])
        return y + self.b_out[...].astype(y.dtype) if self.bias else y, state

    def initial_state(self, batch: int, capacity: int) -> Last:
        conv_size, width = self.sizes
        return jnp.zeros((batch, conv_size - 1, width), jnp.float32)

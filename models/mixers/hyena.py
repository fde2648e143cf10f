"""Hyena, gates and implicit long filters."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.errors import UserError
from models.checks import at_least, finite
from models.mixer import Ids, Mixer, Tokens
from models.params import constant, conv_taps, dense, fan_in_uniform, normal, param, residual_output, zeros
from models.partitioning import constrain
from ops.long_convolution import long_convolution
from ops.projection import project
from ops.short_convolution import short_convolution
from ops.windowed_convolution import windowed_convolution


class Hyena(Mixer):
    """[x_0, ..., x_{N-1}, v] = conv(W_in u + b), v <- h_n * (x_n v) + d_n v for n = N-1, ..., 1, y = W_out (x_0 v) + b_out
    (arXiv 2302.10866, sections 3.1-3.3, in the order of the authors' code, which has N - 1 long filters h).

    The filters are an MLP of time with sines, sin(omega (W z + b)), times a window:
    h_t = MLP([t, cos(2 pi f t), -sin(2 pi f t)]) exp(-|delta| t), with t from 0 to 1 over the model's `length` and decays
    delta between log(0.01) / 1.5 and log(0.01) / 0.3, one for each channel. They reach back `length` tokens, also in longer
    sequences, and building the model for another length stretches them. The features of t are fixed (the code can train
    them).

    Streams carry the last `length` - 1 tokens, as the filters are no recurrences, and evaluate the MLP for every piece.

    Args:
      order: N, number of gates.
      conv_size: taps of the short convolution.
      filter_size: hidden size of the MLP.
      filter_layers: hidden layers of the MLP after the first.
      features: size of the features of t, odd.
      frequency: omega at initialisation.
    """

    packing = False
    paper = "Hyena, arXiv 2302.10866"
    primitive = "long_convolution"
    sequence_parallel = ()  # a Fourier transform is of the whole length
    complexity = "T log T"
    tiny = {"order": 3, "filter_size": 16, "features": 5, "frequency": 1.0}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        length: int = 512,
        order: int = 2,
        conv_size: int = 3,
        filter_size: int = 64,
        filter_layers: int = 2,
        features: int = 33,
        frequency: float = 14.0,
    ):
        at_least(2, order=order)
        at_least(1, filter_size=filter_size)
        at_least(0, filter_layers=filter_layers)
        finite(frequency=frequency)
        if features < 3 or features % 2 == 0:
            raise UserError(f"`features` must be odd and at least 3 (time, cosines, sines), got {features}")
        self.order = order
        self.length = length
        self.features = features
        inner = (order + 1) * width
        # Channels are split over no device: XLA's partitioner cannot cut the batch of a Fourier transform.
        self.w_in = dense(rngs, (width, inner), ("embed", None))
        self.b_in = param(rngs, zeros, (inner,), (None,))
        self.conv = conv_taps(rngs, conv_size, inner, None)
        self.conv_bias = param(rngs, zeros, (inner,), (None,))
        free = {"decay": False, "keep_float32": True}
        hidden, first = fan_in_uniform(filter_size), fan_in_uniform(features)
        self.filter_in = param(rngs, first, (features, filter_size), (None, None), **free)
        self.filter_in_bias = param(rngs, first, (filter_size,), (None,), **free)
        shape = (filter_layers, filter_size, filter_size)
        self.filter_hidden = param(rngs, hidden, shape, (None, None, None), **free)
        self.filter_hidden_bias = param(rngs, hidden, shape[:2], (None, None), **free)
        self.filter_out = param(rngs, hidden, (filter_size, width, order - 1), (None, None, None), **free)
        self.omega = param(rngs, constant(frequency), (filter_size,), (None,), **free)
        self.d = param(rngs, normal(1.0), (order - 1, width), (None, None), **free)
        self.w_out = residual_output(rngs, (width, width), (None, "embed"), depth)
        self.b_out = param(rngs, zeros, (width,), ("embed",))

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        u, taps = short_convolution(
            project(x, self.w_in[...]) + self.b_in[...],
            self.conv[...],
            self.conv_bias[...],
            initial_state=None if state is None else state["conv"],
            segment_ids=segment_ids,
        )
        u = constrain(u.astype(jnp.float32), "batch", None, "activation")
        *gates, v = jnp.split(u, self.order + 1, axis=-1)
        filters = self.filters(min(self.length, x.shape[1]) if state is None else self.length)
        windows = []
        for n, gate in enumerate(reversed(gates[1:])):
            v = v * gate
            if state is None:
                y = long_convolution(v, filters[n])
            else:
                y, window = windowed_convolution(v, filters[n], state["windows"][n])
                windows.append(window)
            v = y + self.d[n] * v
        y = constrain(gates[0] * v, "batch", None, "activation").astype(x.dtype)
        return project(y, self.w_out[...]) + self.b_out[...], {"conv": taps, "windows": windows}

    def filters(self, lags: int):
        """h at the first lags, [order - 1, width, lags]."""
        width = self.d.shape[1]
        t = np.linspace(0, 1, self.length, dtype=np.float32)[:lags, None]
        bands = (self.features - 1) // 2
        phase = 2 * np.pi * np.arange(lags)[:, None] / self.length * np.linspace(1e-4, bands - 1, bands)
        z = jnp.asarray(np.concatenate([t, np.cos(phase), -np.sin(phase)], -1), jnp.float32)
        layer = lambda a, w, b: jnp.sin(self.omega[...] * (project(a, w) + b))
        a = layer(z, self.filter_in[...], self.filter_in_bias[...])
        for w, b in zip(self.filter_hidden[...], self.filter_hidden_bias[...]):
            a = layer(a, w, b)
        h = project(a, self.filter_out[...]).T
        decay = np.linspace(-np.log(0.01) / 1.5, -np.log(0.01) / 0.3, width * (self.order - 1), dtype=np.float32)
        return h * jnp.exp(-decay.reshape(width, -1).T[..., None] * t[:, 0])

    def initial_state(self, batch: int, capacity: int) -> dict:
        taps, inner = self.conv.shape
        orders, width = self.d.shape
        window = jnp.zeros((batch, self.length - 1, width), jnp.float32)
        return {"conv": jnp.zeros((batch, taps - 1, inner), jnp.float32), "windows": [window] * orders}

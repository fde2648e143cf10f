"""sLSTM, the xLSTM layer with memory mixing."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Int

from models.checks import at_least, head_size
from models.mixer import Ids, Mixer, Tokens
from models.norms import layer_normalize
from models.params import conv_taps, normal, ones, param, zeros
from models.partitioning import constrain
from ops import dispatch, kept, segments
from ops.elementwise import silu
from ops.projection import project_blocks
from ops.running_max import NOTHING
from ops.short_convolution import short_convolution
from ops.token_loop import chunking, join, split


class SLSTM(Mixer):
    """c_t = f_t c_{t-1} + i_t z_t, n_t = f_t n_{t-1} + i_t, h_t = o_t c_t / n_t, y = norm(h)
    (xLSTM, arXiv 2405.04517, equations 8-17 and figure 10).

    i = exp(.), f = sigmoid(.), z = tanh(.) and o = sigmoid(.) of W x_t + R h_{t-1} + b, where W and R do not mix heads and i and
    f see silu(conv(x)) in place of x. c and n are kept in units of exp(m_t), m_t = max(log f_t + m_{t-1}, log i_t). The norm
    is a LayerNorm for each head, and as in the authors' code there is no output projection: the MLP follows.

    What a gate gets from h_{t-1} cannot be had in parallel: this is a loop over tokens on every platform.

    Args:
      heads: number of heads.
      conv_size: taps of the short convolution.
      eps: of the norm.
    """

    paper = "xLSTM (sLSTM), arXiv 2405.04517"
    primitive = "lax.scan"
    sequence_parallel = ()  # a nonlinear recurrence goes token by token

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        base_width: int,
        layer: int | Int[Array, ""] = 0,
        layers: int = 1,
        heads: int = 4,
        conv_size: int = 4,
        eps: float = 1e-5,
    ):
        at_least(0, eps=eps)
        size = head_size(width, heads, "width")
        self.sizes = (heads, size)
        self.conv_size = conv_size
        self.eps = eps
        self.conv = conv_taps(rngs, conv_size, width, "heads")
        self.conv_bias = param(rngs, zeros, (width,), ("heads",))
        shape, axes = (heads, size, 2, size), ("heads", None, None, None)
        small = normal(math.sqrt(2 / (5 * base_width)))  # a head's inputs do not grow with the width
        self.w_if = param(rngs, small, shape, axes)
        self.w_zo = param(rngs, small, shape, axes)
        self.r = param(rngs, zeros, (heads, size, 4, size), axes)

        def forget(*_):
            """Biases of i, f, z, o: those of f from 5 down to -7, by a power law that goes by layer."""
            power = 0.3 + 1.3 * layer / max(layers - 1, 1)
            f = 5 - 12 * (jnp.arange(size) / max(size - 1, 1)) ** power
            return jnp.zeros((4, heads, size)).at[1].set(f)

        facts = {"decay": False, "keep_float32": True}
        self.b = param(rngs, forget, (4, heads, size), (None, "heads", None), **facts)
        self.norm_weight = param(rngs, ones, (heads, size), ("heads", None), **facts)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        state = self.initial_state(x.shape[0], 0) if state is None else state
        c, taps = short_convolution(
            x, self.conv[...], self.conv_bias[...], initial_state=state["conv"], segment_ids=segment_ids
        )
        by_head = lambda a: constrain(a.reshape(*a.shape[:2], *self.sizes), "batch", "length", "heads", None)
        gates = lambda a, w: jnp.moveaxis(project_blocks(by_head(a), w[...]), 2, 3)
        gates = jnp.concatenate([gates(silu(c), self.w_if), gates(x, self.w_zo)], 2)
        gates = gates.astype(jnp.float32) + self.b[...]
        r, of_heads = self.r[...].astype(jnp.float32), ("batch", None, "heads")
        run = dispatch.local(
            recurrence,
            [("batch", None, None, "heads"), ("heads",), ("batch", "heads"), ("batch",)],
            (of_heads, ("batch", "heads")),
        )
        h, cell = run(gates, r, state["cell"], segment_ids)
        y = layer_normalize(h, self.eps) * self.norm_weight[...]
        return y.reshape(x.shape).astype(x.dtype), {"conv": taps, "cell": cell}

    def initial_state(self, batch: int, capacity: int) -> dict:
        heads, size = self.sizes
        zero = jnp.zeros((batch, heads, size), jnp.float32)
        return {
            "conv": jnp.zeros((batch, self.conv_size - 1, heads * size), jnp.float32),
            "cell": {"h": zero, "c": zero, "n": zero, "m": jnp.full_like(zero, NOTHING)},
        }


def recurrence(gates, r, cell, segment_ids):
    """h [B, T, H, K] and the last cell, from what the gates i, f, z, o get from elsewhere [B, T, 4, H, K].

    Of a mesh, each device goes over its own rows and heads, and the gradient of r is summed behind the loop.
    """
    length = gates.shape[1]
    if segment_ids is None:
        segment_ids = jnp.ones(gates.shape[:2], jnp.int32)
    fresh = {name: NOTHING if name == "m" else 0.0 for name in cell}

    def step(cell, token):
        gates, valid, start = token
        valid, start = valid[:, None, None], start[:, None, None]
        old = {name: jnp.where(start, fresh[name], cell[name]) for name in cell}
        i, f, z, o = jnp.moveaxis(gates, 1, 0) + jnp.moveaxis(project_blocks(old["h"], r), 2, 0)
        held = jax.nn.log_sigmoid(f) + old["m"]
        m = lax.stop_gradient(jnp.maximum(held, i))  # h does not depend on the unit of c and n
        i, f = jnp.exp(i - m), jnp.exp(held - m)
        c, n = f * old["c"] + i * jnp.tanh(z), f * old["n"] + i
        new = {"h": jax.nn.sigmoid(o) * c / n, "c": c, "n": n, "m": m}
        new = {name: jnp.where(valid, new[name], old[name]) for name in cell}
        return new, new["h"]

    # Of a chunk of tokens only the first cell is kept for the backward pass.
    tokens = (gates, segment_ids != 0, segments.is_start(segment_ids))
    tokens = split(jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tokens), *chunking(length, 64))
    cell, h = kept.scan(lambda cell, tokens: lax.scan(step, cell, tokens), cell, tokens)
    return jnp.moveaxis(join(h, length), 0, 1), cell

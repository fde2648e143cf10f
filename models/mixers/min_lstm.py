"""minLSTM, the LSTM whose gates see the input only."""

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import at_least, finite, scaled
from models.mixer import Ids, Mixer, Tokens
from models.params import constant, conv_taps, dense, param, residual_output
from models.partitioning import constrain
from ops.linear_recurrence import linear_recurrence
from ops.projection import project, project_each
from ops.short_convolution import short_convolution


class MinLSTM(Mixer):
    """h_t = f_t / (f_t + i_t) h_{t-1} + i_t / (f_t + i_t) g(W_h u_t + b_h), y = W_o h
    (Were RNNs All We Needed?, arXiv 2410.01201, section 3.2 and appendix B).

    f_t = sigmoid(W_f u_t + b_f), i_t = sigmoid(W_i u_t + b_i); their ratio is formed from their logarithms. g(a) = a + 1/2
    for a >= 0, else sigmoid(a), as in the paper's log-space form; h is computed by a plain parallel scan instead, which is
    as accurate. h_0 = 0. u = conv(x), as in the paper's language models.

    Args:
      expand: size of h over the width.
      conv_size: taps of the short convolution before the recurrence; 0 for none (u = x).
      forget_bias: b_f at initialisation (the paper finds that a larger one trains faster).
    """

    paper = "minLSTM, arXiv 2410.01201"
    primitive = "linear_recurrence"

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        expand: float = 1.0,
        conv_size: int = 4,
        forget_bias: float = 0.0,
    ):
        finite(forget_bias=forget_bias)
        at_least(0, conv_size=conv_size)
        inner = scaled(width, expand=expand)
        self.conv_size = conv_size
        if conv_size:
            self.conv = conv_taps(rngs, conv_size, width, None)
        self.w_in = dense(rngs, (width, 3, inner), ("embed", None, "mlp"))
        bias = constant([[forget_bias], [0.0], [0.0]])
        self.b_in = param(rngs, bias, (3, inner), (None, "mlp"), decay=False, keep_float32=True)
        self.w_o = residual_output(rngs, (inner, width), ("mlp", "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        state = {} if state is None else state
        u, new = x, {}
        if self.conv_size:
            u, new["conv"] = short_convolution(
                x, self.conv[...], initial_state=state.get("conv"), segment_ids=segment_ids
            )
        f, i, candidate = (
            constrain(a.astype(jnp.float32) + b, "batch", "length", "mlp")
            for a, b in zip(project_each(u, self.w_in[...]), self.b_in[...], strict=True)
        )
        log_ratio = jax.nn.log_sigmoid(f) - jax.nn.log_sigmoid(i)
        h, new["memory"] = linear_recurrence(
            jax.nn.sigmoid(log_ratio),
            jax.nn.sigmoid(-log_ratio) * positive(candidate),
            initial_state=state.get("memory"),
            segment_ids=segment_ids,
            axis="mlp",
        )
        return project(h.astype(x.dtype), self.w_o[...]), new

    def initial_state(self, batch: int, capacity: int) -> dict:
        inner, width = self.w_o.shape
        state = {"memory": jnp.zeros((batch, inner), jnp.float32)}
        if self.conv_size:
            state["conv"] = jnp.zeros((batch, self.conv_size - 1, width), jnp.float32)
        return state


def positive(a):
    """g: a + 1/2 for a >= 0, else sigmoid(a)."""
    return jnp.where(a >= 0, a + 0.5, jax.nn.sigmoid(a))

"""HGRN, the hierarchically gated recurrent network."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.lower_bounds import LowerBounds
from models.mixer import Context, Ids, Mixer, Tokens
from models.norms import LayerNorm
from models.params import dense, param, residual_output, zeros
from models.partitioning import constrain
from ops.elementwise import silu
from ops.linear_recurrence import linear_recurrence
from ops.projection import project, project_each

State = tuple[Float[Array, "B D"], Float[Array, "B D"]] | Float[Array, "B D"]


class HGRN(Mixer):
    """h_t = lambda_t exp(i theta) h_{t-1} + (1 - lambda_t) c_t, y = W_o LayerNorm(g_t * [Re h_t, Im h_t]) + b_o
    (arXiv 2311.04823, section 3).

    lambda_t = gamma^k + (1 - gamma^k) sigmoid(W_mu x_t + b_mu) in layer k; the lower bounds gamma rise with depth and are
    learned for all layers together. Re c_t and Im c_t are silu(W x_t + b), g_t = sigmoid(W_g x_t + b_g), and theta is
    learned, 10000^(-2d/D) for channel d at initialisation as in the authors' code.

    Args:
      complex_state: False for a real h (no theta, no imaginary parts).
    """

    uses_context = True
    Shared: ClassVar[type[nnx.Module]] = LowerBounds
    paper = "HGRN, arXiv 2311.04823"
    primitive = "linear_recurrence"

    def __init__(self, width: int, *, rngs: nnx.Rngs, depth: int = 1, complex_state: bool = True):
        parts = 2 if complex_state else 1
        self.parts = parts
        # Rows: the parts of c, mu, the parts of g.
        self.w_in = dense(rngs, (width, 2 * parts + 1, width), ("embed", None, "mlp"))
        self.b_in = param(rngs, zeros, (2 * parts + 1, width), (None, "mlp"), decay=False, keep_float32=True)
        if complex_state:
            theta = lambda key, shape, dtype: 10000.0 ** (-2 * jnp.arange(width, dtype=dtype) / width)
            self.theta = param(rngs, theta, (width,), ("mlp",), decay=False, keep_float32=True)
        self.norm = LayerNorm(parts * width, rngs=rngs, axis="mlp")
        self.w_o = residual_output(rngs, (parts * width, width), ("mlp", "embed"), depth)
        self.b_o = param(rngs, zeros, (width,), ("embed",))

    def mix(
        self, x: Tokens, state: State | None, *, segment_ids: Ids | None, positions: Ids, context: Context
    ) -> tuple[Tokens, State | None, Any]:
        bound = context.stream[context.layer]
        maps = [
            constrain(a.astype(jnp.float32) + b, "batch", "length", "mlp")
            for a, b in zip(project_each(x, self.w_in[...]), self.b_in[...], strict=True)
        ]
        mu, gates = maps[self.parts], maps[self.parts + 1 :]
        decay = bound + (1 - bound) * jax.nn.sigmoid(mu)
        c = [(1 - bound) * jax.nn.sigmoid(-mu) * silu(a) for a in maps[: self.parts]]
        where = {"initial_state": state, "segment_ids": segment_ids}
        if self.parts == 2:
            a = (decay * jnp.cos(self.theta[...]), decay * jnp.sin(self.theta[...]))
            h, state = linear_recurrence(a, (c[0], c[1]), **where)
        else:
            h, state = linear_recurrence(decay, c[0], **where)
            h = (h,)
        h = jnp.concatenate([jax.nn.sigmoid(g) * h for g, h in zip(gates, h, strict=True)], -1).astype(x.dtype)
        return project(self.norm(h), self.w_o[...]) + self.b_o[...], state, context.stream

    def initial_state(self, batch: int, capacity: int) -> State:
        h = jnp.zeros((batch, self.w_o.shape[1]), jnp.float32)
        return (h, h) if self.parts == 2 else h

"""RG-LRU, the recurrent block of Griffin, Hawk and RecurrentGemma."""

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from models.checks import at_least, head_size, scaled
from models.mixer import Ids, Mixer, Tokens
from models.params import dense, normal, param, residual_output, time_scale, zeros
from models.partitioning import constrain
from ops.elementwise import gelu
from ops.linear_recurrence import linear_recurrence
from ops.projection import project, project_blocks
from ops.short_convolution import short_convolution


class RGLRU(Mixer):
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t * u_t), y_t = W_o (gelu(W_y x_t) * h_t), u = conv(W_x x)
    (Griffin, arXiv 2402.19427, equations 1-4 and sections 2.3, 2.4).

    r_t = sigmoid(W_r u_t + b_r) and i_t = sigmoid(W_i u_t + b_i) with block-diagonal W_r, W_i, and
    log a_t = -c r_t softplus(Lambda), c = 8. As in RecurrentGemma's code: the first token of a segment enters with factor 1
    instead of sqrt(1 - a^2), the gradient of the root is clipped, and a = exp(-softplus(Lambda)) starts uniform on a ring
    (the paper says a^c). The code also has biases on W_x, W_y and W_o, see `bias`.

    Args:
      heads: number of diagonal blocks of the gates.
      expand: size of the recurrence over the width (the paper: 4/3; RecurrentGemma: 1).
      conv_size: taps of the short convolution.
      r_min, r_max: radii of the ring.
      bias: whether the maps of the input and the output have biases.
    """

    paper = "Griffin (RG-LRU), arXiv 2402.19427"
    primitive = "linear_recurrence"

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        expand: float = 1.0,
        conv_size: int = 4,
        r_min: float = 0.9,
        r_max: float = 0.999,
        bias: bool = False,
    ):
        if not 0 < r_min < r_max < 1:
            raise UserError(f"0 < `r_min` < `r_max` < 1 must hold, got r_min={r_min} and r_max={r_max}")
        at_least(1, conv_size=conv_size)
        inner = scaled(width, expand=expand)
        size = head_size(inner, heads, "the size of the recurrence")
        self.w_x = dense(rngs, (width, inner), ("embed", "mlp"))
        self.w_y = dense(rngs, (width, inner), ("embed", "mlp"))
        self.conv = param(rngs, normal(0.1 * conv_size**-0.5), (conv_size, inner), (None, "mlp"), decay=False)
        self.conv_bias = param(rngs, zeros, (inner,), ("mlp",))
        gate = normal(size**-0.5)
        self.w_r = param(rngs, gate, (heads, size, size), ("heads", None, None))
        self.w_i = param(rngs, gate, (heads, size, size), ("heads", None, None))
        self.b_r = param(rngs, zeros, (heads, size), ("heads", None), decay=False, keep_float32=True)
        self.b_i = param(rngs, zeros, (heads, size), ("heads", None), decay=False, keep_float32=True)

        def ring(key, shape, dtype):
            square = jax.random.uniform(key, shape, dtype, r_min**2, r_max**2)
            return jnp.log(jnp.expm1(-0.5 * jnp.log(square)))

        self.lambda_ = time_scale(rngs, ring, (inner,), ("mlp",))
        self.w_o = residual_output(rngs, (inner, width), ("mlp", "embed"), depth)
        self.b_x = param(rngs, zeros, (inner,), ("mlp",)) if bias else None
        self.b_y = param(rngs, zeros, (inner,), ("mlp",)) if bias else None
        self.b_o = param(rngs, zeros, (width,), (None,)) if bias else None

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        u = constrain(linear(x, self.w_x, self.b_x), "batch", "length", "mlp")
        y = gelu(constrain(linear(x, self.w_y, self.b_y), "batch", "length", "mlp"))
        u, taps = short_convolution(
            u,
            self.conv[...],
            self.conv_bias[...],
            initial_state=None if state is None else state["conv"],
            segment_ids=segment_ids,
        )
        r = jax.nn.sigmoid(blocks(u, self.w_r[...], self.b_r[...]))
        i = jax.nn.sigmoid(blocks(u, self.w_i[...], self.b_i[...]))
        log_a = -8 * r * jax.nn.softplus(self.lambda_[...])
        scale = jnp.where(positions[..., None] == 0, 1.0, bounded_sqrt(-jnp.expm1(2 * log_a)))
        h, memory = linear_recurrence(
            jnp.exp(log_a),
            scale * i * u.astype(jnp.float32),
            initial_state=None if state is None else state["memory"],
            segment_ids=segment_ids,
            axis="mlp",
        )
        return linear(y * h.astype(x.dtype), self.w_o, self.b_o), {"conv": taps, "memory": memory}

    def initial_state(self, batch: int, capacity: int) -> dict:
        conv_size, inner = self.conv.shape
        return {
            "conv": jnp.zeros((batch, conv_size - 1, inner), jnp.float32),
            "memory": jnp.zeros((batch, inner), jnp.float32),
        }


def linear(x, w, bias):
    """x w + bias, where there is one."""
    return project(x, w[...]) if bias is None else project(x, w[...]) + bias[...]


def blocks(u, w, bias):
    """Block-diagonal linear map of u [B, T, D] by w [H, D/H, D/H], plus bias [H, D/H], in float32."""
    y = project_blocks(u.reshape(*u.shape[:2], *w.shape[:2]), w).astype(jnp.float32) + bias
    return y.reshape(u.shape)


@jax.custom_jvp
def bounded_sqrt(x):
    """sqrt(x) whose derivative is cut at 1000, where a decay of almost 1 would make it infinite."""
    return jnp.sqrt(x)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return jnp.sqrt(x), dx * jax.lax.rsqrt(jnp.maximum(4 * x, 1e-6))

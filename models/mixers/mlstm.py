"""mLSTM, the xLSTM layer with a matrix memory."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from models.checks import at_least, head_size, scaled
from models.mixer import Ids, Mixer, Tokens
from models.norms import layer_normalize
from models.params import constant, conv_taps, normal, ones, param, zeros
from models.partitioning import constrain
from ops.elementwise import silu, silu_gate
from ops.linear_attention import linear_attention
from ops.projection import project, project_blocks, project_each
from ops.running_max import NOTHING, running_max
from ops.short_convolution import short_convolution


class MLSTM(Mixer):
    """C_t = f_t C_{t-1} + i_t k_t v_t^T, n_t = f_t n_{t-1} + i_t k_t, h_t = C_t^T q_t / max(|n_t . q_t|, 1),
    y = W_down (silu(z) * (norm(h) + s * c)) (xLSTM, arXiv 2405.04517, equations 19-27 and figure 11).

    [u, z] = W_up x, c = silu(conv(u)), q = W_q c, k = W_k c / sqrt(K), v = W_v u with weights in diagonal blocks, and
    i = exp(w_i . [q, k, v] + b_i), f = sigmoid(w_f . [q, k, v] + b_f) for each head. C and n are kept in units of exp(m_t), with
    m_t the running maximum of the exponents. The norm is a LayerNorm for each head.

    As in the authors' code, W_q, W_k and W_v have blocks of 4, and the gates are at first only their biases. That code adds 1e-6
    to the denominator in units of exp(m_t), which is not small beside 1 where m_t is large; here it is a lower bound, so
    that h does not depend on m_t above it.

    Args:
      heads: number of heads.
      expand: channels over the width.
      block_size: size of the diagonal blocks of W_q, W_k and W_v.
      conv_size: taps of the short convolution.
      eps: of the norm.
    """

    replaces_channel_mixer = True
    paper = "xLSTM (mLSTM), arXiv 2405.04517"
    primitive = "linear_attention"

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        base_width: int,
        depth: int = 1,
        heads: int = 4,
        expand: float = 2.0,
        block_size: int = 4,
        conv_size: int = 4,
        eps: float = 1e-5,
    ):
        at_least(0, eps=eps)
        inner = scaled(width, expand=expand)
        size = head_size(inner, heads, "the number of channels")
        if block_size < 1 or inner % block_size:
            raise UserError(f"{inner} channels cannot be divided into blocks of {block_size}; change `block_size`")
        self.sizes = (heads, size)
        self.conv_size = conv_size
        self.eps = eps
        small = normal(math.sqrt(2 / (5 * width)))
        self.w_up = param(rngs, small, (width, 2, inner), ("embed", None, "mlp"))
        self.conv = conv_taps(rngs, conv_size, inner, "mlp")
        self.conv_bias = param(rngs, zeros, (inner,), ("mlp",))
        blocks = normal(math.sqrt(2 / (5 * base_width)))  # whose inputs do not grow with the width
        self.w_qkv = param(rngs, blocks, (3, inner // block_size, block_size, block_size), (None, "mlp", None, None))
        axes = (None, "mlp", None, None)
        self.w_gates = param(rngs, zeros, (3, inner, 2, heads), axes, keep_float32=True, inputs=(0, 1))
        facts = {"decay": False, "keep_float32": True}
        self.b_i = param(rngs, normal(0.1), (heads,), (None,), **facts)
        self.b_f = param(rngs, constant(jnp.linspace(3.0, 6.0, heads)), (heads,), (None,), **facts)
        self.norm_weight = param(rngs, ones, (heads, size), ("heads", None), **facts)
        self.skip = param(rngs, ones, (inner,), ("mlp",))
        self.w_down = param(rngs, normal(2 / (depth * math.sqrt(width))), (inner, width), ("mlp", "embed"))

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        initial = {"conv": None, "memory": None, "maximum": None} if state is None else state
        u, z = project_each(x, self.w_up[...])
        u, z = (constrain(a, "batch", "length", "mlp") for a in (u, z))
        c, taps = short_convolution(
            u, self.conv[...], self.conv_bias[...], initial_state=initial["conv"], segment_ids=segment_ids
        )
        c = silu(c)
        q, k, v = (blockwise(a, w) for a, w in zip((c, c, u), self.w_qkv[...], strict=True))
        gates = sum(project(a.astype(jnp.float32), w) for a, w in zip((q, k, v), self.w_gates[...], strict=True))
        scaled = running_max(
            jax.nn.log_sigmoid(gates[:, :, 1] + self.b_f[...]),
            gates[:, :, 0] + self.b_i[...],
            initial_state=initial["maximum"],
            segment_ids=segment_ids,
        )
        q, k, v = (a.reshape(*a.shape[:2], *self.sizes) for a in (q, k, v))
        # A column of ones in v makes n the last column of C.
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1) * jnp.exp(scaled.log_weight)[..., None]
        h, memory = linear_attention(
            q,
            k,
            v,
            scaled.log_decay,
            scale=1 / math.sqrt(q.shape[-1]),
            initial_state=initial["memory"],
            segment_ids=segment_ids,
        )
        bound = jnp.maximum(jnp.exp(-scaled.maximum), 1e-6)[..., None]
        h = h[..., :-1] / jnp.maximum(jnp.abs(h[..., -1:]), bound)
        h = layer_normalize(h, self.eps) * self.norm_weight[...]
        h = h.reshape(u.shape).astype(x.dtype)
        y = silu_gate(z, h + self.skip[...] * c)
        return project(y, self.w_down[...]), {"conv": taps, "memory": memory, "maximum": scaled.final}

    def initial_state(self, batch: int, capacity: int) -> dict:
        heads, size = self.sizes
        return {
            "conv": jnp.zeros((batch, self.conv_size - 1, heads * size), jnp.float32),
            "memory": jnp.zeros((batch, heads, size, size + 1), jnp.float32),
            "maximum": jnp.full((batch, heads), NOTHING, jnp.float32),
        }


def blockwise(x, w):
    """x times a block-diagonal matrix w [blocks, inputs, outputs]."""
    return project_blocks(x.reshape(*x.shape[:2], *w.shape[:2]), w).reshape(x.shape)

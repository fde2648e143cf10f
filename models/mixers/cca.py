"""Compressed convolutional attention (CCA)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from common.errors import UserError
from models.checks import at_least, grouped_heads, positive
from models.kv_cache import buffers, extend, held, of_document
from models.mixer import Ids, Mixer, Tokens
from models.norms import l2_normalize
from models.params import conv_taps, dense, ones, param, residual_output, zeros
from models.partitioning import constrain
from ops.attention import attention
from ops.products import factor_dtype, product
from ops.projection import project
from ops.rotary import rotary
from ops.short_convolution import short_convolution
from ops.token_shift import token_shift


class CCA(Mixer):
    """y_t = W_o softmax(q_t k^T / sqrt(K)) v in fewer channels than the width, whose queries and keys are mixed along the length
    and with each other (arXiv 2510.04476; here as in ZAYA).

        u = [q', k'] = [W_q x, W_k x];   c_t = M_0 u'_{t-1} + M_1 u'_t + b',   u'_t = a_0 * u_{t-1} + a_1 * u_t + b

    with matrices M of each head, and, G being the key heads and g(h) that of query head h,

        q_h = norm(c_h + m_h),   k_g = temperature_g norm(c_g + mean of m_h over g's heads),   m_h = (q'_h + k'_g(h)) / 2

    where norm makes the length sqrt(K). Both are rotated in a share of the channels. Of the channels of all key heads together,
    the first half of v is W_v x_t and the second half W_v' x_{t-1}.

    Before a document, u and x are 0 (and u' is b). transformers' class starts the temperatures at 0, which is attention to all
    keys alike; here they start at 1. The matrices of the convolution start by their fan-in.

    Args:
      heads: H.
      kv_heads: G, a divisor of H; by default H.
      head_channels: K; by default half of width / H, as the paper compresses queries twofold.
      rotary_fraction: share of the channels that are rotated, the first ones, in pairs.
      rotary_base: base of the rotary frequencies.
    """

    constant_carry = False
    paper = "Compressed convolutional attention (CCA), arXiv 2510.04476"
    primitive = "attention"
    complexity = "T^2"
    tiny = {"kv_heads": 2}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        kv_heads: int | None = None,
        head_channels: int | None = None,
        rotary_fraction: float = 0.5,
        rotary_base: float = 10000.0,
    ):
        at_least(1, heads=heads, head_channels=head_channels)
        positive(rotary_base=rotary_base)
        size, kv_heads = grouped_heads(width, heads, kv_heads, head_channels)
        size = size // 2 if head_channels is None else size
        if not 0 <= rotary_fraction <= 1:
            raise UserError(f"`rotary_fraction` must be from 0 to 1, got {rotary_fraction}")
        if kv_heads * size % 2 or not size:
            raise UserError(
                f"`kv_heads` {kv_heads} times `head_channels` {size} must be even, for two halves of values"
            )
        self.kv_heads, self.head_channels = kv_heads, size
        pairs = int(rotary_fraction * size / 2)
        self.frequencies = tuple(float(rotary_base ** (-i / pairs)) for i in range(pairs))
        both = heads + kv_heads
        self.w_q = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_k = dense(rngs, (width, kv_heads, size), ("embed", "kv_heads", None))
        self.w_v = dense(rngs, (width, 2, kv_heads * size // 2), ("embed", None, "kv_heads"))
        self.taps = conv_taps(rngs, 2, both * size, None)
        self.taps_bias = param(rngs, zeros, (both * size,), (None,), decay=False)
        self.matrices = dense(rngs, (2, size, both, size), (None, None, None, None), inputs=2)
        self.matrices_bias = param(rngs, zeros, (both, size), (None, None), decay=False)
        self.temperature = param(rngs, ones, (kv_heads,), (None,), decay=False, keep_float32=True)
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        q = constrain(project(x, self.w_q[...]), "batch", "length", "heads", None)
        k = constrain(project(x, self.w_k[...]), "batch", "length", "kv_heads", None)
        initial = lambda name: None if state is None else of_document(state, name, segment_ids)
        mixed, last = self.convolved(jnp.concatenate([q, k], 2), initial, segment_ids)
        heads, groups = q.shape[2], self.kv_heads
        mean = (q.reshape(*q.shape[:2], groups, heads // groups, -1) + k[:, :, :, None]) / 2
        q = mixed[:, :, :heads] + mean.reshape(q.shape)
        k = mixed[:, :, heads:] + jnp.mean(mean, 3)
        q, k = (l2_normalize(a.astype(jnp.float32)) * self.head_channels**0.5 for a in (q, k))
        k = k * self.temperature[...][:, None]
        turn = lambda a: rotary(a, positions, frequencies=jnp.asarray(self.frequencies)).astype(x.dtype)
        q, k = turn(q), turn(k)
        values = project(x, self.w_v[...])
        before, last["value"] = token_shift(
            values[:, :, 1], initial_state=initial("last_value"), segment_ids=segment_ids
        )
        v = jnp.concatenate([values[:, :, 0], before], -1).reshape(k.shape)
        v = constrain(v, "batch", "length", "kv_heads", None)
        if state is None:
            return project(attention(q, k, v, segment_ids=segment_ids), self.w_o[...], inputs=2), None
        offset = state["length"]
        state = extend(state, {"key": k, "value": v, "segment": segment_ids})
        state |= {f"last_{name}": a for name, a in last.items()}
        y = attention(
            q,
            held(state, "key", q.dtype),
            held(state, "value", v.dtype),
            segment_ids=segment_ids,
            key_segment_ids=state["segment"],
            query_offset=offset,
        )
        return project(y, self.w_o[...], inputs=2), state

    def convolved(
        self, u: Float[Array, "B T J K"], initial, segment_ids
    ) -> tuple[Float[Array, "B T J K"], dict[str, Array]]:
        """c of queries and keys together, and what the next piece needs."""
        flat = u.reshape(*u.shape[:2], -1)
        # The bias is added after the shift, so that it is there before a document, too.
        once, last = short_convolution(
            flat, self.taps[...], initial_state=initial("last_taps"), segment_ids=segment_ids
        )
        once = once.reshape(u.shape)
        shifted, last_once = token_shift(once, initial_state=initial("last_matrices"), segment_ids=segment_ids)
        matrices = self.matrices[...].astype(u.dtype)
        taken = jnp.stack([shifted, once], 2) + self.taps_bias[...].reshape(u.shape[2:]).astype(u.dtype)
        twice = product("btsjk,skjl->btjl", taken, matrices, factor_dtype(taken, matrices))
        return (twice + self.matrices_bias[...]).astype(u.dtype), {"taps": last, "matrices": last_once}

    def initial_state(self, batch: int, capacity: int) -> dict:
        sizes = (self.kv_heads, self.head_channels)
        both = self.matrices.shape[2]
        zeros_of = lambda *shape: jnp.zeros((batch, *shape), jnp.float32)
        return buffers(batch, capacity, key=sizes, value=sizes) | {
            "last_taps": zeros_of(1, both * self.head_channels),
            "last_matrices": zeros_of(both, self.head_channels),
            "last_value": zeros_of(self.w_v.shape[2]),
        }

"""Forgetting attention (FoX)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.checks import at_least, check_rotated, grouped_heads, positive, unused
from models.kv_cache import buffers, extend, held, of_document
from models.mixer import Ids, Mixer, Tokens
from models.norms import rms_normalize
from models.params import dense, ones, param, residual_output, time_scale, zeros
from models.partitioning import constrain
from ops import sequence
from ops.attention import attention
from ops.elementwise import gate
from ops.projection import project
from ops.rotary import rotary
from ops.token_shift import token_shift

sigmoid_gate = functools.partial(gate, jax.nn.sigmoid)


class ForgettingAttention(Mixer):
    """y_i = W_o (sigmoid(W_g x_i) * norm(o_i)), o_i = sum_j softmax_j(q_i . k_j / sqrt(K) + c_i - c_j) v_j, where c is the
    running sum of log f_t = log sigmoid(W_f x_t + b_f), one for each head (arXiv 2503.02130).

    In the paper's "Pro" layer, the default, keys and values are mixed with those of the token before,
    k_t <- a_t k_{t-1} + (1 - a_t) k_t with a_t = sigmoid(W_a x_t) for each head, queries and keys are normalised with a weight
    for each of their channels, and the output of each head is normalised, with a weight for each channel, and gated. All of these
    off is its "LLaMA" layer.

    Query head h reads key-value head floor(h G / H). Maps start as elsewhere here; the authors start all as N(0, 0.02^2). As
    theirs, b_f starts at 0, where a token weighs half as much for each token behind it.

    Args:
      heads: H.
      kv_heads: G, a divisor of H; by default H.
      head_channels: K; by default width / H.
      shift: whether keys and values are mixed with the ones before.
      qk_norm: whether queries and keys are normalised.
      output_norm: whether the output of each head is normalised.
      output_gate: whether it is gated.
      rotary: whether queries and keys are rotated; the decay tells positions without it.
      rotary_base: base of the rotary frequencies; 500,000 in the authors' code.
    """

    constant_carry = False
    paper = "Forgetting Transformer (FoX), arXiv 2503.02130"
    primitive = "attention"
    complexity = "T^2"
    tiny = {"kv_heads": 2, "rotary": True}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        kv_heads: int | None = None,
        head_channels: int | None = None,
        shift: bool = True,
        qk_norm: bool = True,
        output_norm: bool = True,
        output_gate: bool = True,
        rotary: bool = False,
        rotary_base: float = 10000.0,
    ):
        at_least(1, heads=heads, head_channels=head_channels)
        positive(rotary_base=rotary_base)
        size, kv_heads = grouped_heads(width, heads, kv_heads, head_channels)
        if rotary:
            check_rotated(size, key="heads" if head_channels is None else "head_channels")
        else:
            unused("set `rotary`, too", rotary_base=rotary_base != 10000)
        self.kv_heads, self.head_channels = kv_heads, size
        self.rotary_base = rotary_base if rotary else None
        self.w_q = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_k = dense(rngs, (width, kv_heads, size), ("embed", "kv_heads", None))
        self.w_v = dense(rngs, (width, kv_heads, size), ("embed", "kv_heads", None))
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)
        self.w_f = dense(rngs, (width, heads), ("embed", "heads"))
        self.b_f = time_scale(rngs, zeros, (heads,), ("heads",))
        of_heads = lambda on, heads, axis: dense(rngs, (width, heads), ("embed", axis)) if on else None
        self.w_ak, self.w_av = of_heads(shift, kv_heads, "kv_heads"), of_heads(shift, kv_heads, "kv_heads")
        weight = lambda on, count, axis: (
            param(rngs, ones, (count, size), (axis, None), decay=False, keep_float32=True) if on else None
        )
        self.q_weight, self.k_weight = weight(qk_norm, heads, "heads"), weight(qk_norm, kv_heads, "kv_heads")
        self.o_weight = weight(output_norm, heads, "heads")
        self.w_g = dense(rngs, (width, heads, size), ("embed", "heads", None)) if output_gate else None

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        q = constrain(project(x, self.w_q[...]), "batch", "length", "heads", None)
        k = constrain(project(x, self.w_k[...]), "batch", "length", "kv_heads", None)
        v = constrain(project(x, self.w_v[...]), "batch", "length", "kv_heads", None)
        k, v, last = self.shifted(x, k, v, state, segment_ids)
        if self.q_weight is not None:
            q, k = normalized(q, self.q_weight), normalized(k, self.k_weight)
        if self.rotary_base is not None:
            q, k = (rotary(a, positions, base=self.rotary_base) for a in (q, k))
        log_f = jax.nn.log_sigmoid(project(x, self.w_f[...]).astype(jnp.float32) + self.b_f[...])
        decay = sequence.cumulative(jax.lax.cumsum, jnp.add, log_f)
        if state is None:
            y = attention(q, k, v, decay=decay, segment_ids=segment_ids)
        else:
            decay = state["sum"][:, None] + decay
            offset = state["length"]
            state = extend(state, {"key": k, "value": v, "decay": decay, "segment": segment_ids})
            state |= {"sum": decay[:, -1], **last}
            y = attention(
                q,
                held(state, "key", q.dtype),
                held(state, "value", v.dtype),
                decay=decay,
                key_decay=held(state, "decay", jnp.float32),
                segment_ids=segment_ids,
                key_segment_ids=state["segment"],
                query_offset=offset,
            )
        if self.o_weight is not None:
            y = normalized(y, self.o_weight)
        if self.w_g is not None:
            y = sigmoid_gate(constrain(project(x, self.w_g[...]), "batch", "length", "heads", None), y)
        return project(y, self.w_o[...], inputs=2), state

    def shifted(self, x, k, v, state, segment_ids):
        """Keys and values, mixed with those of the token before in the document, and what they were of the last token."""
        if self.w_ak is None:
            return k, v, {}
        mixed, last = [], {}
        for name, a, w in (("last_key", k, self.w_ak), ("last_value", v, self.w_av)):
            before = None if state is None else of_document(state, name, segment_ids)
            shifted, last[name] = token_shift(a, initial_state=before, segment_ids=segment_ids)
            share = jax.nn.sigmoid(project(x, w[...]))[..., None]
            mixed.append(share * shifted + (1 - share) * a)
        return *mixed, last

    def initial_state(self, batch: int, capacity: int) -> dict:
        heads, sizes = self.w_q.shape[1], (self.kv_heads, self.head_channels)
        state = buffers(batch, capacity, key=sizes, value=sizes, decay=(heads,))
        state["sum"] = jnp.zeros((batch, heads), jnp.float32)
        if self.w_ak is not None:
            state |= {name: jnp.zeros((batch, *sizes), jnp.float32) for name in ("last_key", "last_value")}
        return state


def normalized(a: Float[Array, "B T H K"], weight: nnx.Param) -> Float[Array, "B T H K"]:
    """a over its root mean square in each head, times the weight [H, K] of each channel."""
    return (rms_normalize(a) * weight[...]).astype(a.dtype)

"""Stick-breaking attention."""

import jax.numpy as jnp
from flax import nnx

from models.checks import at_least, grouped_heads
from models.kv_cache import buffers, extend, held
from models.mixer import Ids, Mixer, Tokens
from models.norms import RMSNorm
from models.params import dense, residual_output
from models.partitioning import constrain
from ops.projection import project
from ops.stick_breaking import stick_breaking_attention


class StickBreakingAttention(Mixer):
    """y_i = W_o (sum_{j<i} A_ij v_j + r_i v_i), A_ij = sigmoid(z_ij) prod_{j<l<i} (1 - sigmoid(z_il)),
    r_i = prod_{j<i} (1 - sigmoid(z_ij)), z_ij = q_i . k_j / sqrt(K) (arXiv 2410.17980, section 2).

    A query gives its nearest key a share of its weight, the next nearest a share of what that one left, and so on: the order of
    tokens, and a preference for what is near, come without positions and hold for any length. What all keys leave, r_i, goes to
    the token's own value, as in the authors' tests; without it (`remainder` off, as in their model of 3 billion parameters) the
    first token of a document has output 0.

    Query head h reads key-value head floor(h G / H). Streams like softmax attention, from a buffer of keys and values.

    Args:
      heads: H.
      kv_heads: G, a divisor of H; by default H.
      head_channels: K; by default width / H.
      remainder: whether the token's own value takes what is left.
      attend_current: whether j = i is among the keys, the nearest of them.
      qk_norm: RMS-normalise queries and keys per head.
    """

    constant_carry = False
    paper = "Stick-breaking Attention, arXiv 2410.17980"
    primitive = "stick_breaking_attention"
    sequence_parallel = ()  # sums of scores go along the keys
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
        remainder: bool = True,
        attend_current: bool = False,
        qk_norm: bool = False,
    ):
        at_least(1, heads=heads, head_channels=head_channels)
        size, kv_heads = grouped_heads(width, heads, kv_heads, head_channels)
        self.kv_heads, self.head_channels = kv_heads, size
        self.remainder, self.attend_current = remainder, attend_current
        self.w_q = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_k = dense(rngs, (width, kv_heads, size), ("embed", "kv_heads", None))
        self.w_v = dense(rngs, (width, kv_heads, size), ("embed", "kv_heads", None))
        self.q_norm = RMSNorm(size, rngs=rngs) if qk_norm else None
        self.k_norm = RMSNorm(size, rngs=rngs) if qk_norm else None
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        q = constrain(project(x, self.w_q[...]), "batch", "length", "heads", None)
        k = constrain(project(x, self.w_k[...]), "batch", "length", "kv_heads", None)
        v = constrain(project(x, self.w_v[...]), "batch", "length", "kv_heads", None)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        where = {"attend_current": self.attend_current, "segment_ids": segment_ids}
        if state is None:
            y, rest = stick_breaking_attention(q, k, v, **where)
        else:
            where["query_offset"] = state["length"]
            state = extend(state, {"key": k, "value": v, "segment": segment_ids})
            where["key_segment_ids"] = state["segment"]
            y, rest = stick_breaking_attention(q, held(state, "key", q.dtype), held(state, "value", v.dtype), **where)
        if self.remainder:
            y = y + rest[..., None].astype(y.dtype) * jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
        return project(y, self.w_o[...], inputs=2), state

    def initial_state(self, batch: int, capacity: int) -> dict:
        sizes = (self.kv_heads, self.head_channels)
        return buffers(batch, capacity, key=sizes, value=sizes)

"""Softmax attention: multi-head, grouped-query or multi-query."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from common.errors import check_choice
from models.checks import at_least, positive
from models.kv_cache import buffers, extend, held
from models.mixer import Ids, Mixer, Tokens, check_rotated, head_size
from models.norms import RMSNorm
from models.params import dense, residual_output
from models.partitioning import constrain
from ops.attention import attention
from ops.projection import project
from ops.rotary import alibi_slopes, rotary


class Attention(Mixer):
    """y_i = sum_j softmax_j(q_i . k_j / sqrt(K) + bias_ij) v_j (arXiv 1706.03762).

    Query head h reads key-value head floor(h G / H) (grouped queries, arXiv 2305.13245). Positions enter by rotary
    embedding (arXiv 2104.09864), by ALiBi (arXiv 2108.12409) or not at all.

    Args:
      heads: H.
      kv_heads: G, a divisor of H; by default H. 1 is multi-query attention.
      head_channels: K; by default width / H.
      positions: "rotary", "alibi" or "none".
      rotary_base: base of the rotary frequencies.
      qk_norm: RMS-normalise queries and keys per head, before the rotation.
    """

    bidirectional = True
    constant_carry = False
    paper = "Attention Is All You Need, arXiv 1706.03762"
    primitive = "attention"
    complexity = "T^2"
    tiny = {"kv_heads": 2, "qk_norm": True}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = True,
        depth: int = 1,
        heads: int = 4,
        kv_heads: int | None = None,
        head_channels: int | None = None,
        positions: str = "rotary",
        rotary_base: float = 10000.0,
        qk_norm: bool = False,
    ):
        at_least(1, heads=heads, head_channels=head_channels)
        positive(rotary_base=rotary_base)
        check_choice("positions", positions, ("rotary", "alibi", "none"))
        size = head_size(width, heads, "width") if head_channels is None else head_channels
        kv_heads = heads if kv_heads is None else kv_heads
        head_size(heads, kv_heads, "the number of query heads", "kv_heads")
        if positions == "rotary":
            check_rotated(size, key="heads" if head_channels is None else "head_channels")
        self.causal = causal
        self.positions = positions
        self.position_aware = positions != "none"
        self.rotary_base = rotary_base
        self.kv_heads = kv_heads
        self.head_channels = size
        self.sizes = (kv_heads, size)
        self.w_q = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_k = dense(rngs, (width, kv_heads, size), ("embed", "kv_heads", None))
        self.w_v = dense(rngs, (width, kv_heads, size), ("embed", "kv_heads", None))
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)
        self.q_norm = RMSNorm(size, rngs=rngs) if qk_norm else None
        self.k_norm = RMSNorm(size, rngs=rngs) if qk_norm else None

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        q, k = self.queries_and_keys(x, positions)
        v = constrain(project(x, self.w_v[...]), "batch", "length", "kv_heads", None)
        slopes = self.slopes()
        if state is None:
            y = attention(q, k, v, causal=self.causal, slopes=slopes, segment_ids=segment_ids)
        else:
            offset = state["length"]
            state = extend(state, {"key": k, "value": v, "segment": segment_ids})
            y = attention(
                q,
                held(state, "key", q.dtype),
                held(state, "value", v.dtype),
                slopes=slopes,
                segment_ids=segment_ids,
                key_segment_ids=state["segment"],
                query_offset=offset,
            )
        return project(y, self.w_o[...], inputs=2), state

    def slopes(self) -> Float[Array, "H"] | None:
        """ALiBi's slopes of the query heads, where positions enter by it."""
        return alibi_slopes(self.w_q.shape[1]) if self.positions == "alibi" else None

    def queries_and_keys(self, x, positions):
        """[B, T, H, K] and [B, T, G, K], normalised and rotated as the hyperparameters say."""
        q = constrain(project(x, self.w_q[...]), "batch", "length", "heads", None)
        k = constrain(project(x, self.w_k[...]), "batch", "length", "kv_heads", None)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.positions == "rotary":
            q, k = (rotary(a, positions, base=self.rotary_base) for a in (q, k))
        return q, k

    def attention_scores(
        self, x: Tokens, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Float[Array, "B H T T"], str]:
        """How every query scores every key, for diagnostics; see `evaluation.diagnostics.measures.score_gradients`."""
        q, k = self.queries_and_keys(x, positions)
        k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
        scores = jnp.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
        if (slopes := self.slopes()) is not None:
            distance = jnp.abs(positions[:, :, None] - positions[:, None])
            scores = scores - slopes[:, None, None] * distance[:, None]
        return scores, "softmax"

    def initial_state(self, batch: int, capacity: int) -> dict:
        return buffers(batch, capacity, key=self.sizes, value=self.sizes)

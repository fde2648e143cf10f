"""Sliding-window softmax attention."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from common.errors import UserError
from models.checks import at_least, positive
from models.mixer import Ids, Mixer, Tokens, head_size
from models.params import dense, param, residual_output, zeros
from models.partitioning import constrain
from ops.attention import attention
from ops.projection import project
from ops.rotary import rotary


class LocalAttention(Mixer):
    """y_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j over a window (arXiv 2004.05150, section 3.1).

    Causal: j in (i - window, i], that is `window` keys, the token's own included. Two-sided: |i - j| <= window / 2.
    The window is exact (each query sees as many keys as any other), not made of blocks. Positions are rotary.

    Args:
      heads: number of query heads.
      kv_heads: number of key-value heads, a divisor of `heads`; by default `heads`.
      window: size of the window.
      rotary_base: base of the rotary frequencies.
      rotary_fraction: share of each head's channels that are rotated.
      bias: whether the output map has a bias.
    """

    bidirectional = True
    paper = "Longformer (sliding window), arXiv 2004.05150"
    primitive = "attention"
    complexity = "T window"
    tiny = {"window": 5}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = True,
        depth: int = 1,
        heads: int = 4,
        kv_heads: int | None = None,
        window: int = 128,
        rotary_base: float = 10000.0,
        rotary_fraction: float = 1.0,
        bias: bool = False,
    ):
        size = head_size(width, heads, "width")
        kv_heads = heads if kv_heads is None else kv_heads
        head_size(heads, kv_heads, "the number of query heads", "kv_heads")
        at_least(1, window=window)
        positive(rotary_base=rotary_base)
        if not 0 <= rotary_fraction <= 1:
            raise UserError(f"`rotary_fraction` must be between 0 and 1, got {rotary_fraction}")
        self.causal = causal
        self.window = window
        self.rotary_base = rotary_base
        self.rotated = 2 * int(size * rotary_fraction / 2)
        self.position_aware = self.rotated > 0
        self.kv_heads = kv_heads
        self.sizes = (kv_heads, size)
        self.w_q = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_k = dense(rngs, (width, kv_heads, size), ("embed", "kv_heads", None))
        self.w_v = dense(rngs, (width, kv_heads, size), ("embed", "kv_heads", None))
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)
        self.b_o = param(rngs, zeros, (width,), (None,)) if bias else None

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        q, k = self.queries_and_keys(x, positions)
        v = constrain(project(x, self.w_v[...]), "batch", "length", "kv_heads", None)
        key_segments = segment_ids
        if state is not None:
            new = {"key": k, "value": v, "segment": segment_ids}
            # The keys that the first tokens of this piece still see, then the piece's own.
            joined = {name: jnp.concatenate([state[name].astype(new[name].dtype), new[name]], 1) for name in new}
            k, v, key_segments = joined["key"], joined["value"], joined["segment"]
            state = {name: array[:, array.shape[1] - (self.window - 1) :] for name, array in joined.items()}
        y = attention(
            q,
            k,
            v,
            causal=self.causal,
            window=self.window,
            segment_ids=segment_ids,
            key_segment_ids=key_segments,
            query_offset=k.shape[1] - q.shape[1],
        )
        y = project(y, self.w_o[...], inputs=2)
        return (y if self.b_o is None else y + self.b_o[...]), state

    def queries_and_keys(self, x, positions):
        """[B, T, H, K] and [B, T, G, K], rotated."""
        q = constrain(project(x, self.w_q[...]), "batch", "length", "heads", None)
        k = constrain(project(x, self.w_k[...]), "batch", "length", "kv_heads", None)
        frequencies = self.rotary_base ** (-jnp.arange(0, self.rotated, 2) / self.rotated)
        return tuple(rotary(a, positions, frequencies=frequencies) for a in (q, k))

    def attention_scores(
        self, x: Tokens, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Float[Array, "B H T T"], str]:
        """How every query scores every key, for diagnostics; see `evaluation.diagnostics.measures.score_gradients`."""
        q, k = self.queries_and_keys(x, positions)
        k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
        scores = jnp.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
        distance = jnp.abs(positions[:, :, None] - positions[:, None])
        near = distance < self.window if self.causal else distance <= self.window // 2
        return jnp.where(near[:, None], scores, -jnp.inf), "softmax"

    def initial_state(self, batch: int, capacity: int) -> dict:
        slots = (batch, self.window - 1)
        return {
            "key": jnp.zeros((*slots, *self.sizes), jnp.float32),
            "value": jnp.zeros((*slots, *self.sizes), jnp.float32),
            "segment": jnp.zeros(slots, jnp.int32),
        }

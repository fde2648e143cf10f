"""Indexed attention: DeepSeek sparse attention (DSA) with its lightning indexer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from models.checks import at_least, check_rotated, grouped_heads, positive
from models.kv_cache import buffers, extend, held
from models.lightning_indexer import index_divergence, index_scores
from models.mixer import Context, Ids, Mixer, Tokens
from models.norms import LayerNorm
from models.params import dense, residual_output
from models.partitioning import constrain
from ops.projection import project
from ops.rotary import rotary
from ops.selected_attention import select, selected_attention


class IndexedAttention(Mixer):
    """y_t = W_o softmax_s(q_t . k_s / sqrt(K)) v_s over the `top_k` keys s, not behind t, of the greatest index scores

        I_ts = sum_j w_tj relu(q^I_tj . k^I_s / sqrt(D_I)),   w_t = W_w x_t / sqrt(H_I)   (arXiv 2512.02556, equations 1 and 2),

    with H_I index queries of each token and one index key, k^I = LayerNorm(W_k^I x), both rotated in their first channels. All
    heads see the same keys. Of equal scores, such as the zeros that relu gives, the earlier key is taken. With no more tokens
    than `top_k` it is `attention`.

    The choice has no gradient, and the indexer reads x without one: it learns from a loss of its own only, in training

        mean over t of KL( p_t || softmax of I_ts over the chosen s )   times `index_loss`   (equation 4),

    where p_t is the mean of the heads' attention to these s, without a gradient. It is a part of the objective, over all layers,
    and is recorded as "index_kl". The authors sum over t. They first train the indexer alone beside dense attention (equation
    3); a `top_k` of at least the length does that, with all parameters in training.

    The main attention is that of grouped queries; DeepSeek's is `mla`, whose query latent their indexer reads. Their index
    scores are in fp8, after a Hadamard rotation that changes no product.

    Args:
      heads: H.
      kv_heads: G, a divisor of H; by default H.
      head_channels: K; by default width / H.
      top_k: keys that a query sees.
      index_heads: H_I.
      index_channels: D_I.
      index_rotated: channels of index queries and keys that are rotated, the first ones, in the layout "half".
      index_loss: weight of the indexer's loss; 0 for an indexer that does not learn.
      rotary_base: base of the rotary frequencies.
    """

    constant_carry = False
    uses_context = True
    random = True
    paper = "DeepSeek-V3.2 (DSA), arXiv 2512.02556"
    primitive = "selected_attention"
    sequence_parallel = ()  # keys are chosen along the length
    complexity = "T top_k + T^2 index_heads index_channels"
    tiny = {"kv_heads": 2, "top_k": 10, "index_heads": 3, "index_channels": 4, "index_rotated": 2}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        kv_heads: int | None = None,
        head_channels: int | None = None,
        top_k: int = 128,
        index_heads: int = 4,
        index_channels: int = 32,
        index_rotated: int = 16,
        index_loss: float = 1.0,
        rotary_base: float = 10000.0,
    ):
        at_least(1, heads=heads, head_channels=head_channels, top_k=top_k)
        at_least(1, index_heads=index_heads, index_channels=index_channels)
        at_least(0, index_rotated=index_rotated, index_loss=index_loss)
        positive(rotary_base=rotary_base)
        size, kv_heads = grouped_heads(width, heads, kv_heads, head_channels)
        check_rotated(size, key="heads" if head_channels is None else "head_channels")
        check_rotated(index_rotated, "the rotated part of an index key", "index_rotated")
        if index_rotated > index_channels:
            raise UserError(f"`index_rotated` {index_rotated} must be at most `index_channels`, {index_channels}")
        self.kv_heads, self.head_channels, self.scale = kv_heads, size, size**-0.5
        self.top_k, self.index_rotated, self.index_loss = top_k, index_rotated, index_loss
        self.rotary_base = rotary_base
        self.random = index_loss > 0  # so that it is told of training
        self.w_q = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_k = dense(rngs, (width, kv_heads, size), ("embed", "kv_heads", None))
        self.w_v = dense(rngs, (width, kv_heads, size), ("embed", "kv_heads", None))
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)
        self.w_qi = dense(rngs, (width, index_heads, index_channels), ("embed", None, None))
        self.w_ki = dense(rngs, (width, index_channels), ("embed", None))
        self.ki_norm = LayerNorm(index_channels, rngs=rngs)
        self.w_w = dense(rngs, (width, index_heads), ("embed", None))

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids, context: Context
    ) -> tuple[Any, ...]:
        q = constrain(project(x, self.w_q[...]), "batch", "length", "heads", None)
        k = constrain(project(x, self.w_k[...]), "batch", "length", "kv_heads", None)
        v = constrain(project(x, self.w_v[...]), "batch", "length", "kv_heads", None)
        q, k = (rotary(a, positions, base=self.rotary_base) for a in (q, k))
        qi, ki, w = self.index(jax.lax.stop_gradient(x), positions)
        offset, keys = 0, segment_ids
        if state is not None:
            offset = state["length"]
            state = extend(state, {"key": k, "value": v, "index": ki, "segment": segment_ids})
            k, v, ki = (held(state, name, a.dtype) for name, a in (("key", k), ("value", v), ("index", ki)))
            keys = state["segment"]
        (B, T), S = positions.shape, k.shape[1]
        ids = jnp.ones_like(positions) if segment_ids is None else segment_ids
        chosen = select(
            lambda queries, keys: index_scores(*queries, keys)[:, :, None],
            (qi, w),
            ki,
            self.top_k,
            places=jnp.broadcast_to(offset + jnp.arange(T, dtype=jnp.int32), (B, T)),
            key_places=jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S)),
            segment_ids=ids,
            key_segment_ids=jnp.ones((B, S), jnp.int32) if keys is None else keys,
            block_size=max(1, min(128, 2**22 // (B * S * w.shape[-1]))),
        )
        where = {"segment_ids": segment_ids, "key_segment_ids": keys, "query_offset": offset}
        y, log = selected_attention(q, k, v, chosen, scale=self.scale, **where)
        found = (project(y, self.w_o[...], inputs=2), state, context.stream)
        if context.key is None or not self.index_loss:
            return found
        divergence = index_divergence(q, k, log, qi, ki, w, chosen[:, :, 0], ids != 0, scale=self.scale)
        return *found, {"objective": self.index_loss * divergence, "index_kl": divergence}

    def index(self, x, positions):
        """Index queries [B, T, H_I, D_I], keys [B, T, D_I] and weights [B, T, H_I], which have all factors."""
        qi, ki = project(x, self.w_qi[...]), self.ki_norm(project(x, self.w_ki[...]))
        theta = self.rotary_base ** (-jnp.arange(0, self.index_rotated, 2) / max(1, self.index_rotated))
        qi, ki = (rotary(a, positions, frequencies=theta) for a in (qi, ki[:, :, None]))
        heads, channels = qi.shape[2:]
        w = project(x, self.w_w[...], dtype=jnp.float32) * (heads * channels) ** -0.5
        return qi, ki[:, :, 0], w

    def initial_state(self, batch: int, capacity: int) -> dict:
        sizes = (self.kv_heads, self.head_channels)
        return buffers(batch, capacity, key=sizes, value=sizes, index=(self.w_ki.shape[1],))

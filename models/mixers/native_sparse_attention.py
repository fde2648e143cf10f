"""Native sparse attention (NSA)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.checks import at_least, check_rotated, grouped_heads, positive
from models.key_blocks import block_buffers, complete_blocks
from models.kv_cache import buffers, extend, held
from models.mixer import Ids, Mixer, Tokens
from models.params import dense, residual_output
from models.partitioning import constrain
from ops.attention import attention
from ops.projection import project
from ops.rotary import rotary
from ops.selected_attention import chosen_starts, group_scores, select, selected_attention


class NativeSparseAttention(Mixer):
    """y_t = W_o sum_c sigmoid(w_c x_t) A_c(t) over three softmax attentions of the same queries (arXiv 2502.11089, equation 5):

        cmp  to the means of keys and of values in each block of `block` tokens whose last token is not behind t
        slc  to the keys and values themselves in `count` of these blocks
        win  to the last `window` of them

    The gates w_c are one for each head. The blocks of slc are that of t, the one before it, the first of the document, and those
    to which cmp, summed over the query heads of a key head, gives the most weight (equations 8 to 10); these heads read the same
    blocks. Of equal weights the earlier block is taken. No gradient goes through the choice.

    As in flash-linear-attention, and other than in the paper: blocks of cmp do not overlap and are those of slc (in the paper, 32
    tokens at a stride of 16, and 64); their summary is a mean, of rotated keys (an MLP); all branches read the same keys and
    values (each its own). With a `count` of 2 the first block is kept and not the one before.

    Args:
      heads: H.
      kv_heads: G, a divisor of H; by default H.
      head_channels: K; by default width / H.
      block: tokens of a block.
      count: blocks that slc reads, the three that it always reads among them.
      window: keys that win reads, the token's own included.
      rotary_base: base of the rotary frequencies.
    """

    constant_carry = False
    paper = "Native Sparse Attention (NSA), arXiv 2502.11089"
    primitive = "selected_attention"
    sequence_parallel = ()  # keys are chosen along the length
    complexity = "T (T / block + block count + window)"
    tiny = {"kv_heads": 2, "block": 3, "count": 5, "window": 4}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        kv_heads: int | None = None,
        head_channels: int | None = None,
        block: int = 64,
        count: int = 16,
        window: int = 512,
        rotary_base: float = 10000.0,
    ):
        at_least(1, heads=heads, head_channels=head_channels, block=block, count=count, window=window)
        positive(rotary_base=rotary_base)
        size, kv_heads = grouped_heads(width, heads, kv_heads, head_channels)
        check_rotated(size, key="heads" if head_channels is None else "head_channels")
        self.kv_heads, self.head_channels = kv_heads, size
        self.block, self.count, self.window, self.rotary_base = block, count, window, rotary_base
        self.w_q = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_k = dense(rngs, (width, kv_heads, size), ("embed", "kv_heads", None))
        self.w_v = dense(rngs, (width, kv_heads, size), ("embed", "kv_heads", None))
        self.w_g = dense(rngs, (width, heads, 3), ("embed", "heads", None))
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        q = constrain(project(x, self.w_q[...]), "batch", "length", "heads", None)
        k = constrain(project(x, self.w_k[...]), "batch", "length", "kv_heads", None)
        v = constrain(project(x, self.w_v[...]), "batch", "length", "kv_heads", None)
        q, k = (rotary(a, positions, base=self.rotary_base) for a in (q, k))
        offset = 0 if state is None else state["tokens"]["length"]
        blocks, carried = complete_blocks(
            state,
            {"key": k, "value": v},
            lambda tokens, _: {name: jnp.mean(a.astype(jnp.float32), 2) for name, a in tokens.items()},
            size=self.block,
            segment_ids=segment_ids,
            positions=positions,
            offset=offset,
        )
        keys = segment_ids
        if state is not None:
            tokens = extend(state["tokens"], {"key": k, "value": v, "segment": segment_ids})
            k, v, keys = held(tokens, "key", k.dtype), held(tokens, "value", v.dtype), tokens["segment"]
            state = {"tokens": tokens, **carried}
        ids = jnp.ones_like(positions) if segment_ids is None else segment_ids
        slots = jnp.broadcast_to(offset + jnp.arange(x.shape[1], dtype=jnp.int32), positions.shape)
        where = {"segment_ids": segment_ids, "key_segment_ids": keys, "query_offset": offset}
        branches = (
            self.compressed(q, blocks, slots, ids),
            selected_attention(q, k, v, self.starts(q, blocks, slots, ids, positions), size=self.block, **where)[0],
            self.near(q, k, v, **where),
        )
        gates = jax.nn.sigmoid(constrain(project(x, self.w_g[...]), "batch", "length", "heads", None))
        y = sum(gates[..., c : c + 1] * branch for c, branch in enumerate(branches))
        return project(y, self.w_o[...], inputs=2), state

    def compressed(self, q, blocks, slots, ids) -> Float[Array, "B T H K"]:
        """Attention to the blocks' means."""
        return attention(
            q,
            blocks["key"].astype(q.dtype),
            blocks["value"].astype(q.dtype),
            causal=False,  # by the places of tokens, and not of blocks
            mask=lambda query, last: last <= query,
            query_labels=slots,
            key_labels=blocks["start"] + self.block - 1,
            segment_ids=ids,
            key_segment_ids=blocks["segment"],
        )

    def starts(self, q, blocks, slots, ids, positions):
        """Where the blocks begin that each query reads, [B, T, G, count] or fewer: its own and those chosen."""
        own = slots - positions % self.block

        def weights(queries, keys):
            q, slot, own, first, ids = queries
            k, start, segment = keys
            seen = (start[:, None] + self.block - 1 <= slot[..., None]) & (segment[:, None] == ids[..., None])
            s = jnp.where(seen[:, :, None], q.shape[-1] ** -0.5 * group_scores(q, k), -1e30)
            p = jnp.where(seen[:, :, None], jax.nn.softmax(s), 0)
            p = jnp.sum(p.reshape(*p.shape[:2], self.kv_heads, -1, p.shape[-1]), 3)
            always = (start[:, None] == first[..., None]) | (start[:, None] == own[..., None] - self.block)
            return jnp.where(always[:, :, None], jnp.inf, p)

        chosen = select(
            weights,
            (q, slots, own, slots - positions, ids),
            (blocks["key"], blocks["start"], blocks["segment"]),
            self.count - 1,
            places=own - 1,
            key_places=blocks["start"],
            segment_ids=ids,
            key_segment_ids=blocks["segment"],
        )
        chosen = chosen_starts(blocks["start"], chosen)
        own = jnp.broadcast_to(jnp.maximum(own, 0)[:, :, None, None], (*chosen.shape[:3], 1))
        return jnp.concatenate([own, chosen], -1)

    def near(self, q, k, v, *, segment_ids, key_segment_ids, query_offset) -> Float[Array, "B T H K"]:
        """Attention to the window. Of the keys of a stream only those that the piece may see are read."""
        size = min(k.shape[1], self.window - 1 + q.shape[1])
        if size < k.shape[1]:
            first = jnp.clip(query_offset + 1 - self.window, 0, k.shape[1] - size)
            cut = lambda a: jax.lax.dynamic_slice_in_dim(a, first, size, 1)
            k, v, key_segment_ids = cut(k), cut(v), cut(key_segment_ids)
            query_offset = query_offset - first
        where = {"segment_ids": segment_ids, "key_segment_ids": key_segment_ids, "query_offset": query_offset}
        return attention(q, k, v, window=self.window, **where)

    def initial_state(self, batch: int, capacity: int) -> dict:
        sizes = dict.fromkeys(("key", "value"), (self.kv_heads, self.head_channels))
        blocks = block_buffers(batch, capacity, self.block, tokens=sizes, blocks=sizes)
        return {"tokens": buffers(batch, capacity, **sizes), **blocks}

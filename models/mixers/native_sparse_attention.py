"""Native sparse attention (NSA)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from common.errors import UserError
from models.checks import at_least, check_rotated, grouped_heads, positive
from models.key_blocks import block_buffers, complete_blocks
from models.kv_cache import buffers, extend, held
from models.mixer import Ids, Mixer, Tokens
from models.params import dense, residual_output
from models.partitioning import constrain
from ops.attention import attention
from ops.projection import project
from ops.rotary import rotary
from ops.selected_attention import chosen_starts, group_scores, select, selected_attention, top_k


class NativeSparseAttention(Mixer):
    """y_t = W_o sum_c sigmoid(w_c x_t) A_c(t) over three softmax attentions of the same queries (arXiv 2502.11089, equation 5):

        cmp  to the means of keys and of values in each block of `summary` tokens, one every `stride`, whose last is not behind t
        slc  to the keys and values themselves in `count` blocks of `block` tokens
        win  to the last `window` of them

    The gates w_c are one for each head. The blocks of slc are that of t, the one before it, the first of the document, and those
    to which cmp, summed over the query heads of a key head, gives the most weight (equations 8 to 10); these heads read the same
    blocks. A block of cmp counts for each block of slc by their common tokens, in strides, which is what the sums of equation 9
    come to, whose indices are counted from 1. Of equal weights the earlier block is taken. No gradient goes through the choice.

    As in flash-linear-attention, and other than in the paper: by default blocks of cmp do not overlap and are those of slc (the
    paper has summary=32, stride=16, block=64); their summary is a mean, of rotated keys (an MLP); all branches read the same keys
    and values (each its own). With a `count` of 2 the first block is kept and not the one before.

    Args:
      heads: H.
      kv_heads: G, a divisor of H; by default H.
      head_channels: K; by default width / H.
      block: tokens of a block of slc.
      count: blocks that slc reads, the three that it always reads among them.
      summary: tokens of a block of cmp; by default those of a block of slc.
      stride: tokens between the beginnings of two blocks of cmp, at most `summary`; by default that.
      window: keys that win reads, the token's own included.
      rotary_base: base of the rotary frequencies.
    """

    constant_carry = False
    paper = "Native Sparse Attention (NSA), arXiv 2502.11089"
    primitive = "selected_attention"
    sequence_parallel = ()  # keys are chosen along the length
    complexity = "T (T / stride + block count + window)"
    tiny = {"kv_heads": 2, "block": 3, "count": 4, "window": 4, "summary": 4, "stride": 2}

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
        summary: int | None = None,
        stride: int | None = None,
        rotary_base: float = 10000.0,
    ):
        at_least(1, heads=heads, head_channels=head_channels, block=block, count=count, window=window)
        summary = block if summary is None else summary
        stride = summary if stride is None else stride
        at_least(1, summary=summary, stride=stride)
        if stride > summary:
            raise UserError(
                f"`stride` must be at most `summary`, {summary}, so that no token is left out, got {stride}"
            )
        positive(rotary_base=rotary_base)
        size, kv_heads = grouped_heads(width, heads, kv_heads, head_channels)
        check_rotated(size, key="heads" if head_channels is None else "head_channels")
        self.kv_heads, self.head_channels = kv_heads, size
        self.summary, self.stride = summary, stride
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
        where = {"segment_ids": segment_ids, "positions": positions, "offset": offset}
        blocks, carried = complete_blocks(
            None if state is None else state["means"],
            {"key": k, "value": v},
            lambda tokens, _: {name: jnp.mean(a.astype(jnp.float32), 2) for name, a in tokens.items()},
            size=self.summary,
            stride=self.stride,
            **where,
        )
        # Those that may be chosen; of them nothing is known but their places.
        choices, chosen_from = complete_blocks(
            None if state is None else state["choices"], {}, lambda *_: {}, size=self.block, **where
        )
        keys = segment_ids
        if state is not None:
            tokens = extend(state["tokens"], {"key": k, "value": v, "segment": segment_ids})
            k, v, keys = held(tokens, "key", k.dtype), held(tokens, "value", v.dtype), tokens["segment"]
            state = {"tokens": tokens, "means": carried, "choices": chosen_from}
        ids = jnp.ones_like(positions) if segment_ids is None else segment_ids
        slots = jnp.broadcast_to(offset + jnp.arange(x.shape[1], dtype=jnp.int32), positions.shape)
        where = {"segment_ids": segment_ids, "key_segment_ids": keys, "query_offset": offset}
        branches = (
            self.compressed(q, blocks, slots, ids),
            selected_attention(
                q, k, v, self.starts(q, blocks, choices, slots, ids, positions), size=self.block, **where
            )[0],
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
            key_labels=blocks["start"] + self.summary - 1,
            segment_ids=ids,
            key_segment_ids=blocks["segment"],
        )

    def starts(self, q, blocks, choices, slots, ids, positions):
        """Where the blocks begin that each query reads, [B, T, G, count] or fewer: its own and those chosen."""
        own = slots - positions % self.block
        common, over = self.overlaps(blocks, choices)

        def weights(queries, keys):
            q, slot, own, first, ids = queries
            k, last, segment, common, over, start = keys
            seen = (last[:, None] <= slot[..., None]) & (segment[:, None] == ids[..., None])
            s = jnp.where(seen[:, :, None], q.shape[-1] ** -0.5 * group_scores(q, k), -1e30)
            p = jnp.where(seen[:, :, None], jax.nn.softmax(s), 0)
            p = jnp.sum(p.reshape(*p.shape[:2], self.kv_heads, -1, p.shape[-1]), 3)
            p = sum(common[:, None, None, :, i] * take(p, over[..., i]) for i in range(over.shape[-1]))
            always = (start[:, None] == first[..., None]) | (start[:, None] == own[..., None] - self.block)
            return jnp.where(always[:, :, None], jnp.inf, p)

        chosen = select(
            weights,
            (q, slots, own, slots - positions, ids),
            (blocks["key"], blocks["start"] + self.summary - 1, blocks["segment"], common, over, choices["start"]),
            self.count - 1,
            places=own - 1,
            key_places=choices["start"],
            segment_ids=ids,
            key_segment_ids=choices["segment"],
        )
        chosen = chosen_starts(choices["start"], chosen)
        own = jnp.broadcast_to(jnp.maximum(own, 0)[:, :, None, None], (*chosen.shape[:3], 1))
        return jnp.concatenate([own, chosen], -1)

    def overlaps(self, blocks, choices):
        """The blocks of cmp that share tokens with each block that may be chosen, of which there are few: the number of tokens,
        in strides, and the indices, [B, M, few]."""
        begin, end = blocks["start"], blocks["start"] + self.summary
        first, behind = choices["start"][..., None], choices["start"][..., None] + self.block
        common = jnp.minimum(end[:, None], behind) - jnp.maximum(begin[:, None], first)
        common = jnp.where(blocks["segment"][:, None] == choices["segment"][..., None], jnp.maximum(common, 0), 0)
        most = -(-(self.summary + self.block - 1) // self.stride)
        common, over = top_k(common, min(most, begin.shape[1]), ("batch",))
        return common.astype(jnp.float32) / self.stride, over

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
        means = block_buffers(batch, capacity, self.summary, tokens=sizes, blocks=sizes, stride=self.stride)
        choices = block_buffers(batch, capacity, self.block, tokens={}, blocks={})
        return {"tokens": buffers(batch, capacity, **sizes), "means": means, "choices": choices}


def take(p: Float[Array, "B C G N"], index: Int[Array, "B M"]) -> Float[Array, "B C G M"]:
    """Entries of the last axis, the same for all queries of a row."""
    return jnp.take_along_axis(p, index[:, None, None], axis=-1)

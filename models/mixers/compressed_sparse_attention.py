"""Compressed sparse attention (CSA) of DeepSeek-V4."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from models.checks import at_least, head_size, positive
from models.compressed_keys import check_rotated_last, empty_window, over_window, turned, weighted
from models.key_blocks import block_buffers, complete_blocks
from models.kv_cache import check_capacity
from models.lightning_indexer import index_divergence, index_scores
from models.mixer import Context, Ids, Mixer, Tokens
from models.norms import RMSNorm, rms_normalize
from models.params import dense, param, residual_output, zeros
from models.partitioning import constrain
from ops.attention import add_sinks, merge
from ops.projection import project
from ops.selected_attention import select, selected_attention


class CompressedSparseAttention(Mixer):
    """`compressed_attention` over smaller blocks that overlap, of which each query chooses `top_k` (the report "DeepSeek-V4:
    Towards Highly Efficient Million-Token Context Intelligence", section 2.3.1, which has no arXiv id that we know; the choice
    is that of arXiv 2512.02556).

    The key of block i, which is its value too, is made of the m = `rate` tokens of the block before and of its own m tokens, by
    two maps:

        c_i = R_{im} norm(sum_j softmax_j(W_z x_j + b_j) * W_c x_j)    W_z, W_c, b of one kind for j in block i - 1,
                                                                        of another for j in block i

    and is behind t if the last token of block i is not. Block 0 has its own tokens alone. In the same way, of fewer channels and
    with parameters of its own, an indexer makes a key k^I_i, and

        I_ti = sum_j w_tj relu(q^I_tj . k^I_i / sqrt(D_I)),   w_t = W_w x_t / sqrt(H_I),   q^I_t = R_t W_q^I norm(W_dq x_t)

    are the scores by which all heads of t take the same blocks, of equal ones the earlier. The keys of the window, one softmax
    over all, the sinks, and the rotation back are as in `compressed_attention`.

    The choice has no gradient, and the indexer reads x and the latent without one. It learns as that of `indexed_attention`, by
    "index_kl", the divergence of softmax(I_ti) over the chosen i from the mean of the heads' attention among these i, which is
    a part of the objective in training. How the report weighs heads that look more at the window we do not know. As in
    `compressed_attention` the output map has one factor, and not two.

    Args:
      heads: H.
      head_channels: C; by default width / H.
      q_rank: size of the queries' latent; None for queries straight from x.
      rate: m.
      top_k: blocks that a query sees.
      window: tokens that are seen as they are, the token's own included.
      index_heads: H_I.
      index_channels: D_I.
      index_loss: weight of the indexer's loss; 0 for an indexer that does not learn.
      rotary_channels: of a head, and of an index key, the last ones; pairs are neighbouring channels.
      rotary_base: base of the rotary frequencies.
    """

    constant_carry = False
    uses_context = True
    random = True
    paper = "DeepSeek-V4 (CSA), after arXiv 2512.02556"
    primitive = "selected_attention"
    sequence_parallel = ()  # blocks are cut, and chosen, along the length
    complexity = "T (window + top_k) + T^2 index_heads index_channels / rate"
    tiny = {
        "q_rank": 6, "rate": 3, "top_k": 2, "window": 5, "index_heads": 3, "index_channels": 4, "rotary_channels": 4,
    }  # fmt: skip

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        head_channels: int | None = None,
        q_rank: int | None = None,
        rate: int = 4,
        top_k: int = 128,
        window: int = 128,
        index_heads: int = 4,
        index_channels: int = 32,
        index_loss: float = 1.0,
        rotary_channels: int = 8,
        rotary_base: float = 160000.0,
    ):
        at_least(1, heads=heads, head_channels=head_channels, q_rank=q_rank, rate=rate, top_k=top_k, window=window)
        at_least(1, index_heads=index_heads, index_channels=index_channels)
        at_least(0, index_loss=index_loss)
        positive(rotary_base=rotary_base)
        size = head_size(width, heads, "width") if head_channels is None else head_channels
        check_rotated_last(rotary_channels, size)
        if rotary_channels > index_channels:
            raise UserError(f"`index_channels` {index_channels} must be at least `rotary_channels`, {rotary_channels}")
        self.head_channels, self.rate, self.top_k, self.window = size, rate, top_k, window
        self.rotary_channels, self.rotary_base = rotary_channels, rotary_base
        self.index_loss, self.random = index_loss, index_loss > 0  # so that it is told of training
        self.q_rank = q_rank
        if q_rank is None:
            self.w_dq, self.q_norm = None, None
        else:
            self.w_dq, self.q_norm = dense(rngs, (width, q_rank), ("embed", None)), RMSNorm(q_rank, rngs=rngs)
        latent, axis = (width, "embed") if q_rank is None else (q_rank, None)
        self.w_q = dense(rngs, (latent, heads, size), (axis, "heads", None))
        self.w_kv = dense(rngs, (width, size), ("embed", None))
        self.kv_norm = RMSNorm(size, rngs=rngs)
        self.sinks = param(rngs, zeros, (heads,), ("heads",), keep_float32=True)
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)
        self.entry = Compressor(width, size, rate, rngs=rngs)
        self.index = Compressor(width, index_channels, rate, rngs=rngs)
        self.w_qi = dense(rngs, (latent, index_heads, index_channels), (axis, None, None))
        self.w_w = dense(rngs, (width, index_heads), ("embed", None))

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids, context: Context
    ) -> tuple[Any, ...]:
        latent = x if self.w_dq is None else self.q_norm(project(x, self.w_dq[...]))
        q = constrain(project(latent, self.w_q[...]), "batch", "length", "heads", None)
        q = self.turned(rms_normalize(q), positions)
        key = self.turned(self.kv_norm(project(x, self.w_kv[...]))[:, :, None], positions)
        before = None if state is None else state["near"]
        near, last = over_window(q, key, before, window=self.window, segment_ids=segment_ids)
        still, latent = jax.lax.stop_gradient((x, latent))
        qi = self.turned(project(latent, self.w_qi[...]), positions)
        w = project(still, self.w_w[...], dtype=jnp.float32) * (qi.shape[2] * qi.shape[3]) ** -0.5
        offset = 0 if state is None else state["length"]
        blocks, carried = complete_blocks(
            state,
            {"entry": self.entry.of_tokens(x), "index": self.index.of_tokens(still)},
            self.summaries,
            size=2 * self.rate,
            stride=self.rate,
            early=True,
            segment_ids=segment_ids,
            positions=positions,
            offset=offset,
        )
        if state is not None:
            state = {"near": last, "length": offset + x.shape[1], "capacity": state["capacity"], **carried}
        ids = jnp.ones_like(positions) if segment_ids is None else segment_ids
        entry, ki = blocks["entry"].astype(q.dtype), blocks["index"].astype(qi.dtype)
        where = {"segment_ids": ids, "key_segment_ids": blocks["segment"]}
        chosen = select(
            lambda queries, keys: index_scores(*queries, keys)[:, :, None],
            (qi, w),
            ki[:, :, 0],
            self.top_k,
            places=jnp.broadcast_to(offset + jnp.arange(x.shape[1], dtype=jnp.int32), positions.shape),
            key_places=blocks["start"] + 2 * self.rate - 1,
            block_size=max(1, min(128, 2**22 // (ki.shape[0] * ki.shape[1] * w.shape[-1]))),
            **where,
        )
        far = selected_attention(q, entry, entry, chosen, causal=False, **where)
        y = self.turned(add_sinks(*merge([near, far]), self.sinks[...]), -positions)
        if state is not None:
            y = jnp.where(state["length"] > state["capacity"], jnp.nan, y)  # instead of forgetting blocks
        found = (project(y, self.w_o[...], inputs=2), state, context.stream)
        if context.key is None or not self.index_loss:
            return found
        scale = self.head_channels**-0.5
        chosen = chosen[:, :, 0]
        divergence = index_divergence(q, entry, far[1], qi, ki[:, :, 0], w, chosen, ids != 0, scale=scale)
        return *found, {"objective": self.index_loss * divergence, "index_kl": divergence}

    def turned(self, a, positions):
        """a with its last channels rotated."""
        return turned(a, positions, self.rotary_channels, self.rotary_base)

    def summaries(self, tokens, first):
        """The keys of blocks, of the tokens [B, M, 2 rate, ...] of the block before and their own, from position `first`."""
        there = first[..., None] + jnp.arange(2 * self.rate) >= 0
        of = lambda name, compress: self.turned(compress(tokens[name], there)[:, :, None], first + self.rate)
        return {"entry": of("entry", self.entry), "index": of("index", self.index)}

    def initial_state(self, batch: int, capacity: int) -> dict:
        check_capacity(capacity)
        near = empty_window(batch, self.window, self.head_channels)
        sizes = {"entry": self.head_channels, "index": self.w_qi.shape[2]}
        blocks = block_buffers(
            batch,
            capacity,
            2 * self.rate,
            tokens={name: (2, 2, size) for name, size in sizes.items()},
            blocks={name: (1, size) for name, size in sizes.items()},
            stride=self.rate,
        )
        return {"near": near, "length": jnp.int32(0), "capacity": jnp.int32(capacity), **blocks}


class Compressor(nnx.Module):
    """Makes one key of the tokens of two neighbouring blocks."""

    def __init__(self, width: int, size: int, rate: int, *, rngs: nnx.Rngs):
        """Makes the parameters; the first of two is that of the block before."""
        self.rate = rate
        self.w_c = dense(rngs, (width, 2, size), ("embed", None, None))
        self.w_z = dense(rngs, (width, 2, size), ("embed", None, None))
        self.b_z = param(rngs, zeros, (2 * rate, size), (None, None), decay=False, keep_float32=True)
        self.norm = RMSNorm(size, rngs=rngs)

    def of_tokens(self, x: Tokens):
        """What a key is made of, of each token: values and gates of the two kinds, [B, T, 2, 2, C]."""
        return jnp.stack([project(x, self.w_c[...]), project(x, self.w_z[...])], 2)

    def __call__(self, tokens, there):
        """The keys [B, M, C] of M blocks, given `of_tokens` [B, M, 2 rate, 2, 2, C] and which of the tokens are there."""
        own = jnp.concatenate([tokens[:, :, : self.rate, :, 0], tokens[:, :, self.rate :, :, 1]], 2)
        gate = own[:, :, :, 1].astype(jnp.float32) + self.b_z[...]
        return self.norm(weighted(own[:, :, :, 0], gate, there[..., None]))

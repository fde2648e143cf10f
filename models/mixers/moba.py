"""Mixture of block attention (MoBA)."""

import jax.numpy as jnp
from flax import nnx

from models.checks import at_least, check_rotated, grouped_heads, positive
from models.key_blocks import block_buffers, complete_blocks
from models.kv_cache import buffers, extend, held
from models.mixer import Ids, Mixer, Tokens
from models.params import dense, residual_output
from models.partitioning import constrain
from ops.projection import project
from ops.rotary import rotary
from ops.selected_attention import chosen_starts, group_scores, select, selected_attention


class MoBA(Mixer):
    """Each query attends to its own block of tokens and to the top_k - 1 blocks behind it that it scores highest (arXiv
    2502.13189, section 2.2).

    A document is cut into blocks of `block` tokens. Query t of each head scores a block i that lies before its own

        s_ti = q_t . mean of the rotated keys in block i,

    keeps those of the greatest scores, and y_t = W_o softmax(q_t k^T / sqrt(K)) v over their keys and over those of its own block
    that are not behind it, in one softmax. The scores choose only, and have no parameters and no gradient. Of equal ones the
    earlier block is taken. In grouped queries each query head chooses for itself.

    Decoding sees what training sees; the authors decode with full attention (section 3.3). They, too, keep full attention in
    the last layers: `model.suffix=attention`.

    Args:
      heads: H.
      kv_heads: G, a divisor of H; by default H.
      head_channels: K; by default width / H.
      block: tokens of a block.
      top_k: blocks that a query sees, its own among them.
      rotary_base: base of the rotary frequencies.
    """

    constant_carry = False
    paper = "MoBA, arXiv 2502.13189"
    primitive = "selected_attention"
    sequence_parallel = ()  # keys are chosen along the length
    complexity = "T (block top_k + T / block)"
    tiny = {"kv_heads": 2, "block": 3, "top_k": 3}

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
        top_k: int = 3,
        rotary_base: float = 10000.0,
    ):
        at_least(1, heads=heads, head_channels=head_channels, block=block, top_k=top_k)
        positive(rotary_base=rotary_base)
        size, kv_heads = grouped_heads(width, heads, kv_heads, head_channels)
        check_rotated(size, key="heads" if head_channels is None else "head_channels")
        self.kv_heads, self.head_channels = kv_heads, size
        self.block, self.top_k, self.rotary_base = block, top_k, rotary_base
        self.w_q = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_k = dense(rngs, (width, kv_heads, size), ("embed", "kv_heads", None))
        self.w_v = dense(rngs, (width, kv_heads, size), ("embed", "kv_heads", None))
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
            {"key": k},
            lambda tokens, _: {"key": jnp.mean(tokens["key"].astype(jnp.float32), 2)},
            size=self.block,
            segment_ids=segment_ids,
            positions=positions,
            offset=offset,
        )
        own = offset + jnp.arange(x.shape[1], dtype=jnp.int32) - positions % self.block
        chosen = select(
            group_scores,
            q,
            blocks["key"],
            self.top_k - 1,
            places=own - 1,
            key_places=blocks["start"],
            segment_ids=jnp.ones_like(positions) if segment_ids is None else segment_ids,
            key_segment_ids=blocks["segment"],
        )
        starts = chosen_starts(blocks["start"], chosen)
        own = jnp.broadcast_to(jnp.maximum(own, 0)[:, :, None, None], (*starts.shape[:3], 1))
        where = {"segment_ids": segment_ids, "query_offset": offset}
        if state is not None:
            tokens = extend(state["tokens"], {"key": k, "value": v, "segment": segment_ids})
            where["key_segment_ids"] = tokens["segment"]
            k, v = held(tokens, "key", k.dtype), held(tokens, "value", v.dtype)
            state = {"tokens": tokens, **carried}
        y, _ = selected_attention(q, k, v, jnp.concatenate([own, starts], -1), size=self.block, **where)
        return project(y, self.w_o[...], inputs=2), state

    def initial_state(self, batch: int, capacity: int) -> dict:
        sizes = (self.kv_heads, self.head_channels)
        blocks = block_buffers(batch, capacity, self.block, tokens={"key": sizes}, blocks={"key": sizes})
        return {"tokens": buffers(batch, capacity, key=sizes, value=sizes), **blocks}

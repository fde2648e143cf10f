"""BigBird: block-sparse attention with global, neighbouring and random blocks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import at_least, head_size
from models.mixer import Context, Ids, Mixer, Tokens
from models.params import dense, residual_output
from models.partitioning import constrain
from ops import segments
from ops.attention import attention
from ops.projection import project


class BigBird(Mixer):
    """y_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j over blocks of keys (arXiv 2007.14062, section 2 and appendix D).

    A document is cut into blocks of b tokens. The queries of the first and of the last block attend to all keys, the
    others to the first block, the last, their own with its two neighbours, and r random ones of the rest (all of the rest
    where that is fewer). This is the paper's internal construction ("ITC"); its external one adds learned tokens.

    Random blocks differ between heads and layers, are the same in training and evaluation, and depend on nothing but the
    seed, the layer, the head, the query's block and the number of blocks; the authors' code draws them once per run.
    A last block may be shorter than b. Positions are an embedding at the model's input. In packed rows, where blocks begin
    anywhere, a mask over blocks of scores picks the pairs.

    Args:
      heads: number of heads.
      block: b.
      random_blocks: r.
      seed: of the random blocks.
    """

    causal = False
    bidirectional = True
    streaming = False
    position_aware = False
    uses_context = True
    paper = "Big Bird, arXiv 2007.14062"
    primitive = "attention"
    sequence_parallel = ()  # keys are gathered along the length
    complexity = "T block (7 + random_blocks)"
    tiny = {"block": 2, "random_blocks": 2}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = False,
        depth: int = 1,
        heads: int = 4,
        block: int = 64,
        random_blocks: int = 3,
        seed: int = 0,
    ):
        size = head_size(width, heads, "width")
        at_least(1, block=block)
        at_least(0, random_blocks=random_blocks)
        self.causal = causal
        self.heads = heads
        self.block = block
        self.random_blocks = random_blocks
        self.seed = seed
        self.w_q = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_k = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_v = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: None, *, segment_ids: Ids | None, positions: Ids, context: Context
    ) -> tuple[Tokens, None, Any]:
        q, k, v = (
            constrain(project(x, w[...]), "batch", "length", "heads", None) for w in (self.w_q, self.w_k, self.w_v)
        )
        bits = self.bits(-(-x.shape[1] // self.block), context.layer)
        y = self.gathered(q, k, v, bits) if segment_ids is None else self.masked(q, k, v, bits, segment_ids)
        return project(y, self.w_o[...], inputs=2), state, context.stream

    def bits(self, blocks, layer):
        """Random integers [heads, blocks, r], those of a block the same whatever the number of blocks."""
        key = jax.random.fold_in(jax.random.key(self.seed), layer)
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        keys = fold(jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(self.heads)), jnp.arange(blocks))
        return jax.vmap(jax.vmap(lambda key: jax.random.bits(key, (self.random_blocks,))))(keys)

    def gathered(self, q, k, v, bits):
        """Whole sequences: the keys of each block of queries are brought together."""
        (B, T, H, _), b, last = q.shape, self.block, bits.shape[1] - 1
        if last < 2:
            return attention(q, k, v, causal=False)
        i = jnp.arange(1, last)
        some = random_blocks(bits[:, 1:last], i, jnp.full_like(i, last))
        fixed = jnp.stack([jnp.zeros_like(i), jnp.full_like(i, last), i, i - 1, i + 1], axis=1)
        # The neighbours may be the first or the last block, and missing random blocks are -1.
        real = jnp.concatenate([fixed[:, :3] >= 0, fixed[:, 3:4] > 0, fixed[:, 4:] < last, some[0] >= 0], axis=1)
        index = jnp.concatenate([jnp.broadcast_to(fixed, (H, *fixed.shape)), some], axis=2)
        real = real[..., None] & (index[0, ..., None] * b + jnp.arange(b) < T)

        def gather(a):
            blocks = jnp.pad(a, ((0, 0), (0, (last + 1) * b - T), (0, 0), (0, 0))).reshape(B, last + 1, b, H, -1)
            a = jax.vmap(lambda blocks, index: blocks[:, index], (3, 0), 4)(blocks, index)
            return a.reshape(B * (last - 1), -1, H, a.shape[-1])

        y = attention(
            q[:, b : last * b].reshape(-1, b, *q.shape[2:]),
            gather(k),
            gather(v),
            causal=False,
            segment_ids=jnp.ones((B * (last - 1), b), jnp.int32),
            key_segment_ids=jnp.tile(real.reshape(last - 1, -1).astype(jnp.int32), (B, 1)),
        ).reshape(B, -1, *v.shape[2:])
        ends = (attention(rows, k, v, causal=False) for rows in (q[:, :b], q[:, last * b :]))
        return jnp.concatenate([next(ends), y, next(ends)], axis=1)

    def masked(self, q, k, v, bits, segment_ids):
        """Packed rows: every token knows its block, the last block of its document, and its random blocks."""
        place = segments.positions(segment_ids)
        i = place // self.block
        last = (place + segments.reverse(place, segment_ids)) // self.block
        some = jnp.moveaxis(random_blocks(bits[:, i], i, last), 0, 2)
        labels = (i, last, tuple(jnp.moveaxis(some, 3, 0)))

        def seen(query, j):
            i, last, some = query
            near = (j == 0) | (j == last) | (i == 0) | (i == last) | (jnp.abs(i - j) <= 1)
            return functools.reduce(jnp.logical_or, (j == block for block in some), near)

        return attention(q, k, v, causal=False, mask=seen, query_labels=labels, key_labels=i, segment_ids=segment_ids)


def random_blocks(bits, i, last):
    """Draws without replacement from the blocks that are neither 0, `last`, i nor beside i.

    Args:
      bits: random integers [..., r].
      i, last: the query's block and the last one, arrays that broadcast to bits' first axes; what is returned for
        i = 0 and i = last has no meaning.

    Returns:
      the blocks [..., r], -1 where all have been drawn.
    """
    i, last = (jnp.broadcast_to(a, bits.shape[:-1]) for a in (i, last))
    low = jnp.maximum(i - 1, 1)
    beside = jnp.minimum(i + 1, last - 1) - low + 1
    count = last - 1 - beside
    drawn = []
    for s in range(bits.shape[-1]):
        left = jnp.maximum(count - s, 1).astype(jnp.uint32)
        draw = (bits[..., s] % left).astype(jnp.int32)
        # The draw-th of those that are left: step over the ones that are gone, in ascending order.
        gone = jnp.sort(jnp.stack(drawn, -1), -1) if drawn else bits[..., :0]
        for g in range(s):
            draw += draw >= gone[..., g]
        drawn.append(draw)
    if not drawn:
        return bits.astype(jnp.int32)
    blocks = jnp.stack(drawn, -1) + 1
    blocks += jnp.where(blocks >= low[..., None], beside[..., None], 0)
    return jnp.where(jnp.arange(len(drawn)) < count[..., None], blocks, -1)

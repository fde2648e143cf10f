"""Compressed attention: the heavily compressed attention (HCA) of DeepSeek-V4."""

import jax.numpy as jnp
from flax import nnx

from models.checks import at_least, head_size, positive
from models.compressed_keys import check_rotated_last, empty_window, over_window, turned, weighted
from models.key_blocks import block_buffers, complete_blocks
from models.kv_cache import check_capacity
from models.mixer import Ids, Mixer, Tokens
from models.norms import RMSNorm, rms_normalize
from models.params import dense, param, residual_output, zeros
from models.partitioning import constrain
from ops.attention import add_sinks, attention_with_logsumexp, merge
from ops.projection import project


class CompressedAttention(Mixer):
    """y_t = W_o R_{-t} sum_j p_tj c_j over one key, which is its value too, of each token of a window and of each block of tokens
    behind (the report "DeepSeek-V4: Towards Highly Efficient Million-Token Context Intelligence", section 2.3.2, which has no
    arXiv id that we know; the model before it is arXiv 2512.02556).

        q_t = R_t norm(W_q norm(W_dq x_t)) of each head;   c_t = R_t norm(W_kv x_t)   for the last `window` tokens, and
        c_i = R_{im} norm(sum_j softmax_j(W_z x_j + b_{j - im}) * W_c x_j)   over the m = `rate` tokens j of block i

    for blocks whose last token is not behind t; the inner softmax is one for each channel. p is the softmax over all these keys
    of q . c / sqrt(C) and a learned sink of each head. R_p rotates the last channels by the position p, and, since what is summed
    was rotated, the sum is rotated back.

    The model has it in turns with `compressed_sparse_attention`. The authors' output map has two factors, of groups of heads and
    of all; here it is one.

    Args:
      heads: H.
      head_channels: C; by default width / H.
      q_rank: size of the queries' latent; None for queries straight from x.
      rate: m.
      window: tokens that are seen as they are, the token's own included.
      rotary_channels: of a head, the last ones; pairs are neighbouring channels.
      rotary_base: base of the rotary frequencies.
    """

    constant_carry = False
    paper = "DeepSeek-V4 (HCA), after arXiv 2512.02556"
    primitive = "attention"
    sequence_parallel = ()  # blocks are cut along the length
    complexity = "T (window + T / rate)"
    tiny = {"q_rank": 6, "rate": 3, "window": 5, "rotary_channels": 4}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        head_channels: int | None = None,
        q_rank: int | None = None,
        rate: int = 128,
        window: int = 128,
        rotary_channels: int = 8,
        rotary_base: float = 160000.0,
    ):
        at_least(1, heads=heads, head_channels=head_channels, q_rank=q_rank, rate=rate, window=window)
        positive(rotary_base=rotary_base)
        size = head_size(width, heads, "width") if head_channels is None else head_channels
        check_rotated_last(rotary_channels, size)
        self.head_channels, self.rate, self.window = size, rate, window
        self.rotary_channels, self.rotary_base = rotary_channels, rotary_base
        self.q_rank = q_rank
        if q_rank is None:
            self.w_dq, self.q_norm = None, None
        else:
            self.w_dq, self.q_norm = dense(rngs, (width, q_rank), ("embed", None)), RMSNorm(q_rank, rngs=rngs)
        self.w_q = dense(rngs, (q_rank or width, heads, size), (None if q_rank else "embed", "heads", None))
        self.w_kv = dense(rngs, (width, size), ("embed", None))
        self.kv_norm = RMSNorm(size, rngs=rngs)
        self.w_c = dense(rngs, (width, size), ("embed", None))
        self.w_z = dense(rngs, (width, size), ("embed", None))
        self.b_z = param(rngs, zeros, (rate, size), (None, None), decay=False, keep_float32=True)
        self.c_norm = RMSNorm(size, rngs=rngs)
        self.sinks = param(rngs, zeros, (heads,), ("heads",), keep_float32=True)
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        q = project(x if self.w_dq is None else self.q_norm(project(x, self.w_dq[...])), self.w_q[...])
        q = self.turned(rms_normalize(constrain(q, "batch", "length", "heads", None)), positions)
        key = self.turned(self.kv_norm(project(x, self.w_kv[...]))[:, :, None], positions)
        before = None if state is None else state["near"]
        near, last = over_window(q, key, before, window=self.window, segment_ids=segment_ids)
        offset = 0 if state is None else state["length"]
        blocks, carried = complete_blocks(
            state,
            {"value": project(x, self.w_c[...]), "gate": project(x, self.w_z[...])},
            self.entries,
            size=self.rate,
            segment_ids=segment_ids,
            positions=positions,
            offset=offset,
        )
        if state is not None:
            length = offset + x.shape[1]
            state = {"near": last, "length": length, "capacity": state["capacity"], **carried}
        ids = jnp.ones_like(positions) if segment_ids is None else segment_ids
        entry = blocks["key"].astype(q.dtype)
        parts = [
            near,
            attention_with_logsumexp(
                q,
                entry,
                entry,
                causal=False,  # by the places of tokens, and not of blocks
                mask=lambda query, last: last <= query,
                query_labels=jnp.broadcast_to(offset + jnp.arange(x.shape[1], dtype=jnp.int32), positions.shape),
                key_labels=blocks["start"] + self.rate - 1,
                segment_ids=ids,
                key_segment_ids=blocks["segment"],
            ),
        ]
        y = self.turned(add_sinks(*merge(parts), self.sinks[...]), -positions)
        if state is not None:
            y = jnp.where(state["length"] > state["capacity"], jnp.nan, y)  # instead of forgetting blocks
        return project(y, self.w_o[...], inputs=2), state

    def turned(self, a, positions):
        """a with its last channels rotated."""
        return turned(a, positions, self.rotary_channels, self.rotary_base)

    def entries(self, tokens, first):
        """The keys of blocks of tokens [B, M, rate, C] whose first ones have the positions [B, M]."""
        key = self.c_norm(weighted(tokens["value"], tokens["gate"].astype(jnp.float32) + self.b_z[...]))
        return {"key": self.turned(key[:, :, None], first)}

    def initial_state(self, batch: int, capacity: int) -> dict:
        check_capacity(capacity)
        size = self.head_channels
        blocks = block_buffers(
            batch, capacity, self.rate, tokens={"value": (size,), "gate": (size,)}, blocks={"key": (1, size)}
        )
        return {
            "near": empty_window(batch, self.window, size),
            "length": jnp.int32(0),
            "capacity": jnp.int32(capacity),
            **blocks,
        }

"""Log-linear attention: linear attention over a hierarchy of pasts, the nearest fine and the farthest coarse.

Position t splits the past [0, t) into the buckets of a Fenwick tree, one for each bit of t: where bit l - 1 is set there is
one of 2^(l-1) tokens. The token s is in the bucket of level l(s, t) = bit length of (s xor t), and in level 0 if s = t.
With the log-decay g and a weight for each level (arXiv 2506.04761, section 3):

    y_t = scale sum_{s<=t} w_t[l(s, t)] exp(g_{s+1} + ... + g_t) (q_t . k_s) v_s

Levels beyond the last weight take the last weight. Streaming keeps one state for each bucket, so O(log T) of them.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ops import chunks, segments
from ops.linear_attention import linear_attention
from ops.products import factor_dtype

_CHUNK = 64
_FULL = lax.Precision.HIGHEST


def log_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"],
    level_weights: Float[Array, "B T H L"],
    *,
    scale: float = 1.0,
    positions: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B N H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B N H K V"] | None]:
    """Applies log-linear attention along axis 1.

    Low levels are summed pair by pair over neighbouring chunks. For each level above, linear attention restarts at every
    2^l-th position and leads from the first half of these blocks to the second: T log T in all.

    Args:
      q, k, v: queries, keys and values.
      log_decay: g <= 0.
      level_weights: w, for the levels 0..L-1.
      scale: multiplies the outputs.
      positions: position of each token in its segment; needed with a state, else counted from 0.
      initial_state: the buckets 1..N before the first token, zeros where there is none. Zeros for position 0.
      segment_ids: 0 is padding, a change restarts the state; see `ops.segments`.
      chunk_size: tokens per chunk, a power of two.

    Returns:
      y in v's dtype, zero on padding, NaN from position 2^N on if there is a state (N buckets hold 2^N - 1 tokens); and the
      final state in float32 (float64 if an input is), None if there is no initial state.

    Raises:
      ValueError: if shapes disagree or a state comes without positions.
      UserError: if `chunk_size` is not a power of two.
    """
    batch, length = q.shape[:2]
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"q and k must be [B, T, H, K] and v [B, T, H, V], not {q.shape}, {k.shape} and {v.shape}")
    if log_decay.shape != q.shape[:3] or level_weights.shape[:3] != q.shape[:3]:
        raise ValueError(f"log_decay and level_weights must begin with the shape {q.shape[:3]}")
    if initial_state is not None and positions is None:
        raise ValueError("a state needs the positions of its tokens")
    dtype, factors = jnp.result_type(q, k, v, jnp.float32), factor_dtype(q, k, v)
    ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
    positions = segments.positions(ids) if positions is None else positions
    arrays = (q, k, v, log_decay, level_weights)
    q, k, values, g, w = (segments.zero_padding(x, segment_ids).astype(dtype) for x in arrays)
    q, g = scale * q, chunks.bounded(g)

    chunk = chunks.fit(chunk_size or _CHUNK, length)
    y = _near(q, k, values, g, w, positions, ids, chunk, factors)
    if chunk < length:
        far = (length - 1).bit_length() if initial_state is None else initial_state.shape[1]
        rounded = (x.astype(factors) for x in (q, k, values))
        y = y + _far(*rounded, g, w, positions, ids, jnp.arange(chunk.bit_length(), far + 1))
    state = None
    if initial_state is not None:
        initial_state = initial_state.astype(dtype)
        y = y + _from_state(q, g, w, positions, ids, initial_state)
        y = jnp.where((positions >= 2 ** initial_state.shape[1])[:, :, None, None], jnp.nan, y)
        state = _final_state(k, values, g, positions, ids, initial_state)
        state = segments.unless_empty(state, initial_state, segment_ids)
    return segments.zero_padding(y, segment_ids).astype(v.dtype), state


def level(s: Int[Array, "..."], t: Int[Array, "..."]) -> Int[Array, "..."]:
    """The level of the bucket in which position t finds position s: the bit length of s xor t."""
    return 32 - lax.clz(s.astype(jnp.int32) ^ t.astype(jnp.int32))


def _near(q, k, v, g, w, positions, ids, chunk, factors):
    """The levels up to log2(chunk), between tokens of one or of two neighbouring chunks; all levels if there is but one."""
    length = q.shape[1]
    columns = g[..., None], positions[..., None, None], ids[..., None, None]
    q, k, v, w, g, p_i, id_i = (chunks.split(x, chunk) for x in (q, k, v, w, *columns))

    def window(x):
        """The tokens of a chunk, behind those of the chunk before if there is more than one."""
        return x if chunk >= length else jnp.concatenate([jnp.concatenate([0 * x[:1], x[:-1]]), x], -2)

    p_j, id_j = (jnp.swapaxes(window(x), -1, -2) for x in (p_i, id_i))
    j = jnp.arange(p_j.shape[-1])
    i = j[-chunk:, None]
    bucket = level(p_i, p_j)
    keep = (id_i == id_j) & (j < i)
    if chunk < length:
        keep &= bucket < chunk.bit_length()
    G = chunks.cumulative(window(g))
    difference = jnp.where(keep, G[..., -chunk:, :] - G.apply(chunks.transpose), 0)
    # The diagonal apart: its decay is 1, and the gradient should not have to find that out by cancellation.
    decay = jnp.where(keep, jnp.exp(difference), 0) + (i == j)
    weights = jnp.zeros_like(decay)
    for l in range(w.shape[-1] if chunk >= length else min(w.shape[-1], chunk.bit_length())):
        weights = jnp.where(jnp.minimum(bucket, w.shape[-1] - 1) == l, w[..., l : l + 1], weights)
    scores = chunks.dot("ik,jk->ij", q, window(k), factors) * decay * weights
    return chunks.join(chunks.dot("ij,jk->ik", scores, window(v), factors), length)


def _far(q, k, v, g, w, positions, ids, levels):
    """The given levels, one linear attention for each."""
    change = segments.is_start(ids)

    @jax.checkpoint
    def one(y, l):
        block = positions >> l
        border = change | jnp.pad(block[:, 1:] != block[:, :-1], ((0, 0), (1, 0)))
        blocks = jnp.where(ids == 0, 0, 1 + jnp.cumsum(border, 1))
        second = ((positions >> (l - 1)) & 1)[:, :, None, None]
        weight = jnp.take(w, jnp.minimum(l, w.shape[-1] - 1), axis=-1)[..., None]
        first = k * (1 - second).astype(k.dtype)
        return y + second * weight * linear_attention(q, first, v, g, segment_ids=blocks)[0], None

    return lax.scan(one, jnp.zeros(v.shape, g.dtype), levels)[0]


def _from_state(q, g, w, positions, ids, state):
    """What the buckets before the first token give to the tokens of its segment.

    Seen from further on, a bucket of level j is part of the bucket in which the first position is, unless that is smaller.
    """
    first = jnp.cumsum(segments.is_start(ids), 1) == 0
    seen = jnp.maximum(jnp.arange(1, state.shape[1] + 1), level(positions[:, :1], positions)[..., None])
    weights = jnp.take_along_axis(w, jnp.minimum(seen, w.shape[-1] - 1)[:, :, None], -1)
    decay = jnp.where(first[..., None], jnp.exp(jnp.cumsum(g, 1)), 0)
    return jnp.einsum("bthk,bthn,bnhkv->bthv", q * decay[..., None], weights, state, precision=_FULL)


def _final_state(k, v, g, positions, ids, state):
    """The buckets as the position after the last token sees them."""
    levels = jnp.arange(1, state.shape[1] + 1)
    run = jnp.cumsum(segments.is_start(ids), 1)
    after = positions[:, -1:] + 1
    # Summed from the end: in differences of sums from the start, a long piece would lose digits of the last tokens, which count.
    later = lax.cumsum(jnp.pad(g[:, 1:], ((0, 0), (0, 1), (0, 0))), axis=1, reverse=True)
    last = (run == run[:, -1:])[..., None]
    bucket = ((level(positions, after)[..., None] == levels) & last).astype(k.dtype)
    new = jnp.einsum("bthk,btn,bthv->bnhkv", k * jnp.exp(later)[..., None], bucket, v, precision=_FULL)
    merged = jnp.maximum(levels, level(positions[:, :1], after))[..., None] == levels
    decay = jnp.where(run[:, -1:] == 0, jnp.exp(g[:, 0] + later[:, 0]), 0)[:, None, :, None, None]
    return new + decay * jnp.einsum("bjn,bjhkv->bnhkv", merged.astype(k.dtype), state, precision=_FULL)

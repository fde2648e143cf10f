"""Attention inside blocks: each document is cut into blocks of `size` tokens, and a token sees its own block only.

The chunks of FLASH (arXiv 2202.10447) and MEGA (2209.10655) and the diagonal attention of TransNormer (2210.10340). A packed
row's blocks begin where its documents do, so they do not lie on one grid. Queries are therefore taken `size` at a time on
the row's own grid, and see the blocks of the grid beside them as far as these belong to their own block.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from common.errors import UserError
from ops import segments
from ops.attention_blocks import UNNORMALISED, check_activation, exp_below
from ops.products import factor_dtype, product
from ops.rows import row_max


def block_ids(segment_ids: Int[Array, "B T"] | None, positions: Int[Array, "B T"], size: int) -> Int[Array, "B T"]:
    """Segment ids of the blocks: every `size` tokens of a segment get an id of their own; 0 at padding."""
    first = positions % size == 0
    if segment_ids is None:
        return jnp.cumsum(first, 1, dtype=jnp.int32) + 1
    ids = jnp.cumsum(first | segments.is_start(segment_ids), 1, dtype=jnp.int32) + 1
    return jnp.where(segment_ids == 0, 0, ids)


def empty_block(batch: int, size: int, key: tuple[int, int], value: tuple[int, int]) -> dict[str, Array]:
    """State before the first token: room for the `size` - 1 tokens of which a later one may see some.

    Args:
      batch, size: number of rows and of tokens of a block.
      key, value: (heads, channels) of the keys and the values.
    """
    shape = (batch, size - 1)
    return {
        "key": jnp.zeros((*shape, *key), jnp.float32),
        "value": jnp.zeros((*shape, *value), jnp.float32),
        "segment": jnp.zeros(shape, jnp.int32),
        "position": jnp.zeros(shape, jnp.int32),
    }


def block_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    *,
    size: int,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    causal: bool = True,
    activation: str = "softmax",
    scale: float | None = None,
    initial_state: dict[str, Array] | None = None,
) -> tuple[Float[Array, "B T H V"], dict[str, Array] | None]:
    """y_i = sum_j f(scale q_i . k_j) v_j over the keys j of i's block, and j <= i if causal.

    Args:
      q, k, v: queries, keys and values.
      size: tokens of a block.
      positions: of each token in its segment; a block begins at every multiple of `size`.
      segment_ids: 0 is padding, a change ends the block; always given with a state.
      causal: False for both sides.
      activation: f, "softmax" over the visible keys, or without a normaliser "relu", "relu2" or "laplace".
      scale: K**-0.5 by default.
      initial_state: from `empty_block` or the piece before, if causal; its tokens' segments and positions tell whether
        they belong to the block of the first token.

    Returns:
      y in v's dtype, 0 at padding, and the state after the piece (None without one before).

    Raises:
      UserError: for an unknown activation or a size below 1.
      ValueError: for a state that is not causal.
    """
    check_activation(activation)
    if size < 1:
        raise UserError(f"the size of a block must be at least 1, got {size}")
    if initial_state is not None and not causal:
        raise ValueError("a state needs causal=True")
    length, state = q.shape[1], initial_state
    q, k, v = (segments.zero_padding(a, segment_ids) for a in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if state is not None:
        new = {"key": k, "value": v, "segment": segment_ids, "position": positions}
        joined = {name: jnp.concatenate([state[name].astype(x.dtype), x], 1) for name, x in new.items()}
        k, v, segment_ids, positions = (joined[name] for name in new)
    ids = block_ids(segment_ids, positions, size)
    if state is not None:
        # Zero what no later token can see, so that the state does not tell how the sequence was cut.
        open_block = jnp.where(ids == ids[:, -1:], ids, 0)[:, length:]
        state = {name: segments.zero_padding(x[:, length:], open_block) for name, x in joined.items()}
    past = k.shape[1] - length
    single = length <= size
    width = length if single else size
    grid = -(-length // width)
    before = past if single else size  # keys to the left of a block of queries
    beside = 1 if single else 2 if causal else 3  # blocks of keys for each block of queries

    def keys(x):
        """[B, grid, the tokens that the queries of a block of the grid may see, ...]."""
        if single:
            return x[:, None]
        after = size * (grid + beside - 1) - before - length
        x = jnp.pad(x, ((0, 0), (before - past, after)) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
        return jnp.concatenate([x[:, i : i + grid] for i in range(beside)], 2)

    def queries(x):
        x = jnp.pad(x, ((0, 0), (0, grid * width - length)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], grid, width, *x.shape[2:])

    k_ids, q_ids = keys(ids), queries(ids[:, past:])
    visible = (q_ids[..., :, None] == k_ids[..., None, :]) & (k_ids != 0)[..., None, :]
    if causal:
        visible &= before + jnp.arange(width)[:, None] >= jnp.arange(k_ids.shape[-1])
    y = _attend(activation, scale, queries(q), keys(k), keys(v), visible[:, :, None])
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :length], state


def _attend(activation, scale, q, k, v, visible):
    """Arrays [B, grid, tokens, heads, channels]. The backward pass recomputes the scores instead of keeping them."""
    wide = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    scores = lambda q, k: product("bgihk,bgjhk->bghij", q, k, factor_dtype(q, k))
    weighted = lambda p, v: product("bghij,bgjhv->bgihv", p, v, factor_dtype(v))

    @jax.checkpoint
    def attend(q, k, v):
        s = scale * scores(q, k)
        if activation != "softmax":
            p = jnp.where(visible, UNNORMALISED[activation](s), 0)
            return weighted(p, v).astype(v.dtype)
        s = jnp.where(visible, s, jnp.finfo(wide).min)
        p = jnp.where(visible, exp_below(s, row_max(s)[..., None]), 0)
        total = jnp.moveaxis(jnp.sum(p, -1), 2, 3)[..., None]
        y = weighted(p, v)
        return (y / jnp.where(total > 0, total, 1)).astype(v.dtype)

    return attend(q, k, v)

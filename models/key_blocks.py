"""Summaries of blocks of tokens, for mixers whose queries see, or choose by, the blocks behind them.

A block is `size` tokens of a document, counted from its first token on; the next one begins `stride` tokens behind it, by default
behind its last. It counts when its last token is there; of the T tokens of a row at most T / stride blocks are complete, however
many documents there are.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from ops import segments
from ops.selected_attention import spans

Arrays = dict[str, Array]


def block_buffers(
    batch: int,
    capacity: int,
    size: int,
    *,
    tokens: dict[str, tuple[int, ...]],
    blocks: dict[str, tuple[int, ...]],
    stride: int | None = None,
) -> dict[str, Arrays]:
    """Makes the empty carry.

    Args:
      batch: number of rows.
      capacity: number of tokens whose blocks the carry can hold.
      size: tokens of a block.
      tokens: of what summaries are made of, by name: the shape that it has of one token.
      blocks: of the summaries, by name: the shape of one.
      stride: tokens between the beginnings of two blocks; the size by default.

    Returns:
      "recent", what the last size - 1 tokens were; and "blocks", the summaries [batch, capacity / stride, *shape] with the
      "start" of each block (the index of its first token in the row) and its "segment" (0 where there is none yet), and their
      "count" [batch].
    """
    before, most = size - 1, max(1, capacity // (stride or size))
    ids = lambda *shape: jnp.zeros((batch, *shape), jnp.int32)
    floats = lambda count, shapes: {name: jnp.zeros((batch, count, *s), jnp.float32) for name, s in shapes.items()}
    return {
        "recent": floats(before, tokens) | {"segment": ids(before)},
        "blocks": floats(most, blocks) | {"start": ids(most), "segment": ids(most), "count": ids()},
    }


def complete_blocks(
    state: dict[str, Any] | None,
    tokens: Arrays,
    summarise: Callable[[Arrays, Int[Array, "B M"]], Arrays],
    *,
    size: int,
    stride: int | None = None,
    early: bool = False,
    segment_ids: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"],
    offset: int | Int[Array, ""] = 0,
) -> tuple[Arrays, dict[str, Arrays] | None]:
    """The blocks that are complete after a piece of a sequence.

    Args:
      state: None for whole sequences, else what has "recent" and "blocks" of `block_buffers` or of the last call.
      tokens: what summaries are made of, by name, [batch, T, *shape].
      summarise: of the tokens of each of M blocks, by name [batch, M, size, *shape], and the position of its first token: the
        summaries by name, [batch, M, *shape].
      size: tokens of a block.
      stride: tokens between the beginnings of two blocks, at most the size, which is the default.
      early: whether there are blocks that begin before their document, and end in it; then the size is a multiple of the stride.
        Those of their tokens that would have negative positions are anything, and are to be left out of the summary.
      segment_ids: documents counted from 1, as `Mixer.mix` has them; 0 is padding.
      positions: of the tokens in their documents. A block whose first token is not there is never complete.
      offset: index of the piece's first token in the row.

    Returns:
      the blocks [batch, N, ...], "start", "segment" and the summaries, in the order of the row; what is of no segment is none and
      has zeros; and the state after the piece (None without one before).
    """
    B, T = positions.shape
    stride = stride or size
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    new = tokens | {"segment": ids}
    if state is None:
        joined = {name: jnp.pad(a, ((0, 0), (size - 1, 0)) + ((0, 0),) * (a.ndim - 2)) for name, a in new.items()}
    else:
        new = {name: segments.zero_padding(a, ids) for name, a in new.items()}
        old = state["recent"]
        joined = {name: jnp.concatenate([old[name].astype(a.dtype), a], 1) for name, a in new.items()}
    is_last = ((positions + 1 - size) % stride == 0) & (ids != 0)
    if not early:
        is_last &= positions >= size - 1
    # Blocks end `stride` apart, but for the first, which may have begun before the piece.
    last = jnp.argsort(~is_last, axis=1, stable=True)[:, : 1 + (T - 1) // stride]
    inside = {name: spans(a, last, size) for name, a in joined.items()}
    id_of = inside.pop("segment")
    first = jnp.take_along_axis(positions, last, 1) + 1 - size
    there = id_of == id_of[..., -1:]
    if early:
        there |= first[..., None] + jnp.arange(size) < 0
    whole = jnp.all(there, -1) & jnp.take_along_axis(is_last, last, 1)
    id_of = jnp.where(whole, id_of[..., -1], 0)
    found = summarise(inside, first) | {"start": offset + last + 1 - size}
    found = {name: segments.zero_padding(a, id_of) for name, a in found.items()} | {"segment": id_of}
    if state is None:
        return found, None
    held = state["blocks"]
    place = jnp.where(whole, held["count"][:, None] + jnp.cumsum(whole, 1) - 1, held["start"].shape[1])
    rows = jnp.arange(B)[:, None]
    blocks = {
        name: held[name].at[rows, place].set(a.astype(held[name].dtype), mode="drop") for name, a in found.items()
    }
    recent = {name: a[:, T:] for name, a in joined.items()}
    count = held["count"] + jnp.sum(whole, 1, dtype=jnp.int32)
    state = {"recent": recent, "blocks": blocks | {"count": count}}
    return {name: blocks[name].astype(a.dtype) for name, a in found.items()}, state

"""Stick-breaking attention: a query breaks a stick of length 1 over its keys, beginning with the nearest (arXiv 2410.17980).

    A_ij = sigmoid(z_ij) prod_{j<l<i} (1 - sigmoid(z_il)),  z_ij = scale q_i . k_j
    y_i = sum_{j<i} A_ij v_j,   rest_i = prod_{j<i} (1 - sigmoid(z_ij))

In logarithms, log A_ij = log sigmoid(z_ij) + left_ij, where left_ij sums log(1 - sigmoid(z_il)) over the nearer keys. Blocks of
keys are visited from the nearest to the farthest with `left` as the only statistic of a row: every exponent is at most 0, and
nothing is scaled again. Once the stick of every row of a block is used up to rounding, the farther blocks are left out.

The backward pass visits the same blocks in the same order and computes the weights again:

    dz_ij = (1 - sigmoid(z_ij)) A_ij dA_ij - sigmoid(z_ij) (rest_i drest_i + sum_{m<j} A_im dA_im)

where the sum over farther keys is that over all, y_i . dy_i, less that over the nearer ones.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from common.errors import UserError
from ops import dispatch
from ops.attention_blocks import at, block_length, dot, from_blocks, labels_to_blocks, put, to_blocks, wide
from ops.kept import keep
from ops.segments import zero_padding


class _Form(NamedTuple):
    """What is static of a call."""

    scale: float
    current: bool


class _Inputs(NamedTuple):
    """The arrays of a call, as they were given or as blocks."""

    q: Array
    k: Array
    v: Array
    segment_ids: Array | None
    key_segment_ids: Array | None


@dispatch.primitive("reference", "blockwise", matmul="blockwise")
def stick_breaking_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    scale: float | None = None,
    attend_current: bool = False,
    segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    query_offset: int | Int[Array, ""] = 0,
    implementation: str = "auto",
    block_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Stick-breaking attention of T queries to S keys and values.

    Query i sits at key index query_offset + i and sees the keys to the left of it that belong to its segment.

    Args:
      q: queries [batch, T, heads, K].
      k, v: keys [batch, S, key heads, K] and values [batch, S, key heads, V]. heads is a multiple of the key heads, and query
        head h reads key head h // (heads / key heads).
      scale: factor of q.k, K**-0.5 by default.
      attend_current: whether a query sees the key at its own index, too.
      segment_ids: segments of the queries, and of the keys unless key_segment_ids is given; 0 is padding.
      key_segment_ids: segments of the keys, where they differ from the queries'.
      query_offset: an integer, or a traced int32 scalar (decoding into a buffer of keys and values, with finite padding).
      implementation: "reference" holds all scores; "blockwise" is linear in memory, and with an integer query_offset leaves out
        the blocks for which nothing of the stick is left (with a traced one it goes over blocks of queries, each against all
        keys).
      block_size: rows and columns of a block; chosen by length if None.

    Returns:
      y [batch, T, heads, V] in v's dtype, and what is left of the stick, [batch, T, heads] in float32 (float64 for float64
      inputs): 0 and 1 for a query that sees no key.

    Raises:
      ValueError: if shapes do not fit together.
      UserError: if heads is no multiple of the key heads, or for blocks below 1.
    """
    _check(q, k, v, segment_ids, key_segment_ids, block_size)
    form = _Form(q.shape[3] ** -0.5 if scale is None else float(scale), attend_current)
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    static = isinstance(query_offset, int | np.integer)
    q = zero_padding(q, segment_ids)
    if q.shape[1] > 1 or static:
        k, v = zero_padding(k, key_segment_ids), zero_padding(v, key_segment_ids)
    x = _Inputs(q, k, v, segment_ids, key_segment_ids)
    chosen = dispatch.choose("stick_breaking_attention", implementation, "blockwise")
    T, S = q.shape[1], k.shape[1]
    if chosen == "reference":
        return _by_queries(form, T, x, query_offset)
    sizes = tuple(min(length, block_size or block_length(length)) for length in (T, S))
    return _blockwise(form, int(query_offset), sizes, x) if static else _by_queries(form, sizes[0], x, query_offset)


def _check(q, k, v, segment_ids, key_segment_ids, block_size):
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    if k.shape != (B, S, G, K) or v.shape[:3] != (B, S, G):
        raise ValueError(f"q {q.shape} and v {v.shape} do not fit k {k.shape}: batch, length, key heads or K differ")
    if H % G:
        raise UserError(f"the number of query heads must be a multiple of the number of key heads: {H} and {G}")
    if block_size is not None and block_size < 1:
        raise UserError(f"block_size must be at least 1, or None: {block_size}")
    if segment_ids is None and key_segment_ids is not None:
        raise ValueError("key_segment_ids needs segment_ids: say which segment the queries belong to")
    if segment_ids is not None:
        keys = segment_ids if key_segment_ids is None else key_segment_ids
        if segment_ids.shape != (B, T) or keys.shape != (B, S):
            shapes = f"{segment_ids.shape} and {keys.shape}"
            raise ValueError(f"segment_ids must be {(B, T)}, and key_segment_ids (its default) {(B, S)}: {shapes}")


def _in_blocks(x, q_size, k_size):
    H, G = x.q.shape[2], x.k.shape[2]
    q, k, v = to_blocks(x.q, G, q_size), to_blocks(x.k, G, k_size), to_blocks(x.v, G, k_size)
    of_queries, of_keys = (x.segment_ids, x.key_segment_ids)
    return _Inputs(q, k, v, labels_to_blocks(of_queries, H, G, q_size), labels_to_blocks(of_keys, G, G, k_size))


def _seen(form, start, size, cols, count, x):
    """Which columns each row sees, [rows, cols] or [B, 1, rows, cols]; `count` is that of real keys."""
    rows = start + jnp.arange(x.q.shape[2], dtype=jnp.int32) % size
    mask = (cols <= rows[:, None]) if form.current else (cols < rows[:, None])
    mask &= cols < count
    if x.segment_ids is not None:
        segments = x.segment_ids[..., :, None]
        mask = mask & (segments == x.key_segment_ids[..., None, :]) & (segments != 0)
    return mask


def _break(s, mask, left):
    """The weights of a block of keys, and the logarithm of what they leave of a stick of exp(left) [..., rows]."""
    kept = jnp.where(mask, jax.nn.log_sigmoid(-s), 0.0)
    nearer = jax.lax.cumsum(kept, axis=kept.ndim - 1, reverse=True)
    total = nearer[..., 0]
    nearer = jnp.concatenate([nearer[..., 1:], jnp.zeros_like(nearer[..., :1])], axis=-1)
    logs = jax.nn.log_sigmoid(s) + nearer + left[..., None]
    return jnp.where(mask, jnp.exp(jnp.where(mask, logs, 0.0)), 0.0), left + total


def _by_queries(form, size, x, query_offset):
    """Blocks of `size` queries, each against all keys at once: any query_offset, memory linear in S."""
    (B, T, H, _), (S, G, V) = x.q.shape, x.v.shape[1:]
    blocks = _in_blocks(x, size, S)
    cols = jnp.arange(S, dtype=jnp.int32)
    k, v, key_segment_ids = jax.tree.map(lambda a: a[0], (blocks.k, blocks.v, blocks.key_segment_ids))

    def one(block):
        q, segment_ids, start = block
        x = _Inputs(q, k, v, segment_ids, key_segment_ids)
        s = form.scale * dot("bgik,bgjk->bgij", q, k)
        weights, left = _break(s, _seen(form, start, size, cols, S, x), jnp.zeros_like(s[..., 0]))
        return dot("bgij,bgjv->bgiv", weights.astype(v.dtype), v), jnp.exp(left)

    starts = query_offset + size * jnp.arange(len(blocks.q), dtype=jnp.int32)
    rows = (blocks.q, blocks.segment_ids, starts)
    if len(starts) == 1:
        y, rest = jax.tree.map(lambda a: a[None], one(jax.tree.map(lambda a: a[0], rows)))
    else:
        y, rest = jax.lax.map(jax.checkpoint(one, prevent_cse=False), rows)
    return from_blocks(y, (B, T, H, V), G).astype(x.v.dtype), from_blocks(rest[..., None], (B, T, H, 1), G)[..., 0]


def _pairs(form, offset, sizes, T, S):
    """Pairs (query block, key block) with anything visible, each query block's from the nearest keys to the farthest."""
    q_size, k_size = sizes
    last = [min(S - 1, offset + min((i + 1) * q_size, T) - 1 - (not form.current)) for i in range(-(-T // q_size))]
    pairs = [(i, j) for i, high in enumerate(last) for j in range(high // k_size, -1, -1)]
    return tuple(np.array(pairs, np.int32).reshape(-1, 2).T)


def _tile(form, offset, sizes, S, blocks, left, i, j):
    """The inputs of query block i and key block j, what is seen, and whether any row that sees something has any stick left."""
    rows = jax.tree.map(lambda a: at(a, i), (blocks.q, blocks.segment_ids))
    k, v, key_segment_ids = jax.tree.map(lambda a: at(a, j), (blocks.k, blocks.v, blocks.key_segment_ids))
    x = _Inputs(rows[0], k, v, rows[1], key_segment_ids)
    cols = j * sizes[1] + jnp.arange(sizes[1], dtype=jnp.int32)
    mask = _seen(form, offset + i * sizes[0], sizes[0], cols, S, x)
    used_up = np.log(jnp.finfo(left.dtype).eps) - 5
    return x, mask, jnp.any(mask & (left > used_up)[..., None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _blockwise(form, offset, sizes, x):
    """One loop over the pairs of blocks with anything visible; a static query_offset."""
    return _forward(form, offset, sizes, x)[0]


def _forward(form, offset, sizes, x):
    (B, T, H, _), (S, G, V) = x.q.shape, x.v.shape[1:]
    blocks = _in_blocks(x, *sizes)
    rows, dtype = blocks.q.shape[:4], wide(*x[:3])

    def add(carry, pair):
        y, left = carry
        i, j = pair
        y_i, left_i = at(y, i), at(left, i)
        x, mask, any_left = _tile(form, offset, sizes, S, blocks, left_i, i, j)

        def visit(y, left):
            s = form.scale * dot("bgik,bgjk->bgij", x.q, x.k)
            weights, left = _break(s, mask, left)
            return y + dot("bgij,bgjv->bgiv", weights.astype(x.v.dtype), x.v), left

        y_i, left_i = jax.lax.cond(any_left, visit, lambda *old: old, y_i, left_i)
        return (put(y, y_i, i), put(left, left_i, i)), None

    start = jnp.zeros((*rows, V), dtype), jnp.zeros(rows, dtype)
    (y, left), _ = jax.lax.scan(add, start, _pairs(form, offset, sizes, T, S))
    y, rest = keep((y, jnp.exp(left)))
    result = from_blocks(y, (B, T, H, V), G).astype(x.v.dtype), from_blocks(rest[..., None], (B, T, H, 1), G)[..., 0]
    return result, (x, y, rest)


def _backward(form, offset, sizes, saved, cotangents):
    (inputs, y, rest), (dy, drest) = saved, cotangents
    T, (S, G) = inputs.q.shape[1], inputs.k.shape[1:3]
    blocks, dy = _in_blocks(inputs, *sizes), to_blocks(dy, G, sizes[0])
    dtype = wide(*inputs[:3])
    everything = jnp.sum(y * dy.astype(dtype), axis=-1) + rest * to_blocks(drest, G, sizes[0])

    def add(carry, pair):
        dq, dk, dv, left, farther = carry
        i, j = pair
        left_i, dy_i = at(left, i), at(dy, i)
        x, mask, any_left = _tile(form, offset, sizes, S, blocks, left_i, i, j)

        def visit(dq, dk, dv, left, farther):
            s = form.scale * dot("bgik,bgjk->bgij", x.q, x.k)
            weights, left = _break(s, mask, left)
            own = weights * dot("bgiv,bgjv->bgij", dy_i, x.v)
            nearer = jax.lax.cumsum(own, axis=own.ndim - 1, reverse=True)
            beyond = farther[..., None] - nearer
            ds = jnp.where(mask, own * jax.nn.sigmoid(-s) - jax.nn.sigmoid(s) * beyond, 0.0).astype(x.k.dtype)
            dv = dv + dot("bgij,bgiv->bgjv", weights.astype(dy_i.dtype), dy_i)
            dk = dk + dot("bgij,bgik->bgjk", ds, x.q)
            dq = dq + dot("bgij,bgjk->bgik", ds, x.k)
            return dq, dk, dv, left, farther - nearer[..., 0]

        old = at(dq, i), at(dk, j), at(dv, j), left_i, at(farther, i)
        new = jax.lax.cond(any_left, visit, lambda *old: old, *old)
        return tuple(put(a, b, n) for a, b, n in zip(carry, new, (i, j, j, i, i))), None

    zeros = [jnp.zeros(a.shape, dtype) for a in (blocks.q, blocks.k, blocks.v, rest)]
    (dq, dk, dv, *_), _ = jax.lax.scan(add, (*zeros, everything), _pairs(form, offset, sizes, T, S))
    totals = (form.scale * dq, form.scale * dk, dv)
    grads = (from_blocks(d, a.shape, G).astype(a.dtype) for d, a in zip(totals, inputs[:3]))
    return (_Inputs(*grads, None, None),)


_blockwise.defvjp(_forward, _backward)

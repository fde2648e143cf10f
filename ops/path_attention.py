"""Attention along paths: the score of a key is read through a product of generalised Householder maps (PaTH, arXiv 2505.16381).

    H_t = I - beta_t w_t w_t^T,  s_ij = scale q_i^T H_i H_{i-1} ... H_{j+1} k_j + c_i - c_j,  y_i = sum_{j<=i} softmax_j(s_ij) v_j

In a chunk of C tokens the products have the UT form (arXiv 2406.06484): with L = tril(diag(beta) W W^T, -1),

    what the maps write for key j      A = (I + L)^-1 tril(diag(beta) W K^T, -1)
    scores                             tril(Q K^T) - tril(Q W^T) A
    queries carried to its start       Q - tril(Q W^T) B,   B = (I + L)^-1 diag(beta) W
    keys carried to its end            K - A^T W
    the map of the whole chunk         P = I - W^T B

A chunk of queries then visits the earlier chunks of keys from the nearest to the farthest, q <- q P_j behind chunk j, with the
online softmax of `ops.attention_blocks`. The backward pass goes over the chunks of queries: it carries one of them to all chunks
once more, and visits these in the opposite order. The maps may be singular, so that it cannot be carried back. Memory is linear
in the length.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from common.errors import UserError
from ops import chunks, dispatch, segments
from ops.attention import NOTHING, merge
from ops.attention_blocks import FLOOR, MASKED, at, exp_below, from_blocks, labels_to_blocks, put, to_blocks, wide
from ops.chunks import matmul, transpose
from ops.kept import keep
from ops.products import factor_dtype, product
from ops.rows import row_max
from ops.triangular import solve_unit_lower

_CHUNK = 64


class Path(NamedTuple):
    """What attention to a piece of a sequence gives, and what attention to the tokens before and after it needs.

    Attributes:
      y: the outputs, in v's dtype.
      log: log sum_j exp(s_ij) over the keys of the piece, `ops.attention.NOTHING` at padding, which sees none.
      queries: H_1 ... H_i q_i, which read keys carried to the start of the piece.
      keys: H_T ... H_{j+1} k_j, the keys carried to its end.
      through: H_T ... H_1, which carries keys from its start to its end.
    """

    y: Float[Array, "B T H V"]
    log: Float[Array, "B T H"]
    queries: Float[Array, "B T H K"]
    keys: Float[Array, "B T G K"]
    through: Float[Array, "B G K K"]


class _Blocks(NamedTuple):
    """Chunks [N, batch, key heads, rows, ...] of queries carried to their start and of keys carried to their end. The query heads
    that share a key head lie under each other as rows of one block."""

    q: Array
    k: Array
    v: Array
    through: Array
    decay: Array | None
    segment_ids: Array | None
    key_segment_ids: Array | None
    first: Array  # [N], the first chunk of keys of which any query of a chunk sees something


@dispatch.primitive("reference", "blockwise", matmul="blockwise")
def path_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    w: Float[Array, "B T G K"],
    beta: Float[Array, "B T G"],
    *,
    decay: Float[Array, "B T H"] | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str = "auto",
    chunk_size: int | None = None,
) -> Path:
    """Causal attention whose keys are mapped by every later token up to the query's.

    The maps run through the borders of documents, behind which nothing is seen.

    Args:
      q: queries.
      k, v: keys and values. H is a multiple of G, and query head h reads key head h // (H / G).
      w: directions of unit length, one for each key head.
      beta: in [0, 2], so that no map is longer than 1.
      decay: a running sum c of log-decays, see `ops.attention`.
      scale: K**-0.5 by default.
      segment_ids: 0 is padding; each document is one run of its id.
      implementation: "reference" (token by token, all keys mapped at each; plain autodiff) or "blockwise".
      chunk_size: tokens of a chunk, a power of two.

    Returns:
      `Path`; all but y in float32 (float64 if any input is).

    Raises:
      ValueError: if shapes do not fit together.
      UserError: if heads is no multiple of the key heads, or chunk_size no power of two.
    """
    (B, T, H, _), G = q.shape, k.shape[2]
    if q.shape[:2] != k.shape[:2] or k.shape != w.shape or v.shape[:3] != k.shape[:3] or beta.shape != k.shape[:3]:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape}, w {w.shape} and beta {beta.shape} do not fit together"
        )
    if H % G:
        raise UserError(f"the number of query heads must be a multiple of the number of key heads: {H} and {G}")
    form = dispatch.choose("path_attention", implementation, "blockwise")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    q, k, v, w, beta = (segments.zero_padding(a, segment_ids) for a in (q, k, v, w, beta))
    decay = None if decay is None else segments.zero_padding(decay, segment_ids)
    if form == "reference":
        path = _by_tokens(scale, q, k, v, w, beta, decay, segment_ids)
        return path._replace(log=segments.fill_padding(path.log, segment_ids, NOTHING))

    dtype, factors = wide(q, k, v, w), factor_dtype(q, k, v)
    size = chunks.fit(chunk_size or _CHUNK, T)
    in_blocks = lambda a: to_blocks(a, G, size)
    from_rows = lambda a: from_blocks(a, (B, T, H, a.shape[-1]), G)
    values, decays = in_blocks(v), None if decay is None else in_blocks(decay.astype(dtype))
    ids = labels_to_blocks(segment_ids, H, G, size), labels_to_blocks(segment_ids, G, G, size)
    maps = (in_blocks(a.astype(dtype)) for a in (q, k, w, beta))
    y, log, queries, keys, through = _inside(scale, factors, *maps, values, decays, *ids)
    parts = [(y, log)]
    if len(through) > 1:
        first = _first_chunks(segment_ids, size, T)
        blocks = _Blocks(queries, keys.astype(k.dtype), values, through, decays, *ids, first)
        parts.append(_across(scale, factors, blocks))
    y, log = merge([(from_rows(y), from_rows(log[..., None])[..., 0]) for y, log in parts])
    log = segments.fill_padding(log, segment_ids, NOTHING)
    queries, keys, through = _to_the_ends(queries, keys, through)
    return Path(y.astype(v.dtype), log, from_rows(queries), from_blocks(keys, k.shape, G), through)


def _by_tokens(scale, q, k, v, w, beta, decay, segment_ids):
    (B, T, H, K), G, dtype = q.shape, k.shape[2], wide(q, k, v, w)
    dtypes = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": dtype}
    q = q.reshape(B, T, G, H // G, K)
    decay = jnp.zeros((B, T, H), dtype) if decay is None else decay.astype(dtype)
    decay = decay.reshape(B, T, G, H // G)
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids

    def token(carry, x):
        keys, through = carry
        t, q, k, w, beta, c, segment = x
        read = jnp.einsum("btgk,bgk->btg", keys, w, **dtypes)
        keys = (keys - (beta[:, None] * read)[..., None] * w[:, None]).at[:, t].set(k)
        through = (
            through - (beta[..., None] * w)[..., None] * jnp.einsum("bgk,bgkl->bgl", w, through, **dtypes)[:, :, None]
        )
        s = scale * jnp.einsum("bgrk,btgk->bgrt", q, keys, **dtypes)
        s = s + c[..., None] - jnp.moveaxis(decay, 1, -1)
        mask = (jnp.arange(T) <= t) & (ids == segment[:, None])
        y, log = _softmax(s, mask[:, None, None], jnp.moveaxis(v, 1, 2), dtype)
        return (keys, through), (y, log, jnp.einsum("bgrk,bgkl->bgrl", q, through, **dtypes))

    time_first = lambda a: jnp.moveaxis(a.astype(dtype), 1, 0)
    xs = (jnp.arange(T), *map(time_first, (q, k, w, beta, decay)), ids.T)
    start = jnp.zeros(k.shape, dtype), _identity(k, dtype)
    (keys, through), rows = jax.lax.scan(token, start, xs)
    y, log, queries = (jnp.moveaxis(a, 0, 1).reshape(B, T, H, *a.shape[4:]) for a in rows)
    return Path(y.astype(v.dtype), log, queries, keys, through)


def _identity(k, dtype):
    """The map of no token, for each row and key head."""
    return jnp.broadcast_to(jnp.eye(k.shape[-1], dtype=dtype), (k.shape[0], k.shape[2], k.shape[-1], k.shape[-1]))


def _softmax(s, mask, v, factors):
    """Softmax attention with scores [..., rows, keys] and values [..., keys, V], and the log-sum-exp of each row."""
    s = jnp.where(mask, s, MASKED)
    top = jnp.maximum(row_max(s), FLOOR)[..., None]
    p = exp_below(s, top)
    total = jnp.sum(p, axis=-1, keepdims=True)
    return matmul(p, v, factors) / total, (top + jnp.log(total))[..., 0]


@functools.partial(jax.checkpoint, static_argnums=(0, 1))
def _inside(scale, factors, q, k, w, beta, v, decay, segment_ids, key_segment_ids):
    """Attention inside the chunks; queries carried to their starts, keys to their ends, and the maps of whole chunks."""
    size = w.shape[-2]
    weighted, strict = beta[..., None] * w, chunks.lower(size, strict=True)
    overlaps, written = (jnp.where(strict, matmul(weighted, transpose(a)), 0) for a in (w, k))
    solved = solve_unit_lower(overlaps, jnp.concatenate([written, weighted], -1))
    written, read = solved[..., :size], solved[..., size:]
    past = jnp.tile(chunks.lower(size), (q.shape[-2] // size, 1))
    q_w = jnp.where(past, matmul(q, transpose(w), factors), 0)
    s = scale * (matmul(q, transpose(k), factors) - matmul(q_w, written, factors))
    if decay is not None:
        s = s + _differences(decay, decay, size)
    y, log = _softmax(s, past if segment_ids is None else past & _same(segment_ids, key_segment_ids), v, factors)
    through = jnp.eye(w.shape[-1], dtype=w.dtype) - matmul(transpose(w), read)
    return y, log, q - matmul(q_w, read, factors), k - matmul(transpose(written), w), through


def _same(segment_ids, key_segment_ids):
    return segment_ids[..., :, None] == key_segment_ids[..., None, :]


def _differences(decay, key_decay, size):
    """c_i - c_j, of chunks whose rows are heads of `size` tokens each: [..., rows, size]."""
    of_heads = lambda a: a.reshape(*a.shape[:-1], -1, size)
    return (of_heads(decay)[..., None] - of_heads(key_decay)[..., None, :]).reshape(*decay.shape, size)


def _first_chunks(segment_ids, size, length):
    """For each chunk the one in which the first of the documents begins that its tokens belong to."""
    if segment_ids is None:
        return jnp.zeros(-(-length // size), jnp.int32)
    begins = jnp.arange(length, dtype=jnp.int32) - segments.positions(segment_ids)
    return jnp.min(begins[:, ::size], axis=0) // size


def _to_the_ends(queries, keys, through):
    """Queries carried from the starts of their chunks to that of the sequence, keys to its end, and its whole map."""
    identity = jnp.broadcast_to(jnp.eye(through.shape[-1], dtype=through.dtype), through.shape[1:])
    whole, before = jax.lax.scan(lambda M, P: (matmul(P, M), M), identity, through)
    _, behind = jax.lax.scan(lambda M, P: (matmul(M, P), M), identity, through, reverse=True)
    return matmul(queries, before), matmul(keys, transpose(behind)), whole


def _scores(scale, factors, x, q, i, j):
    """Scores of chunk i's queries, carried to the end of chunk j, for the keys of chunk j; and which of them are seen."""
    k = at(x.k, j)
    s = scale * product("bgik,bgjk->bgij", q, k, factors)
    if x.decay is not None:
        s = s + _differences(at(x.decay, i), at(x.decay, j), k.shape[-2])
    if x.segment_ids is None:
        return s
    return jnp.where(_same(at(x.segment_ids, i), at(x.key_segment_ids, j)), s, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _across(scale, factors, x):
    """Attention of each chunk's queries to the keys of the chunks before it, and its log-sum-exp."""
    return _across_forward(scale, factors, x)[0]


def _across_forward(scale, factors, x):
    rows, dtype = x.q.shape[:-1], x.q.dtype
    pairs = np.array([(i, j) for i in range(1, len(x.q)) for j in range(i - 1, -1, -1)], np.int32)

    def add(carry, pair):
        i, j = pair

        def visit(q, y, top, total):
            s, v = _scores(scale, factors, x, q, i, j), at(x.v, j)
            new = jnp.maximum(top, row_max(s))
            p, shrink = exp_below(s, new[..., None]), jnp.exp(top - new)
            y = y * shrink[..., None] + product("bgij,bgjv->bgiv", p, v, factors)
            return product("bgik,bgkl->bgil", q, at(x.through, j)), y, new, total * shrink + jnp.sum(p, axis=-1)

        old = tuple(at(a, i) for a in carry)
        new = jax.lax.cond(j >= x.first[i], visit, lambda *old: old, *old)
        return tuple(put(a, b, i) for a, b in zip(carry, new)), None

    start = x.q, jnp.zeros((*rows, x.v.shape[-1]), dtype), jnp.full(rows, FLOOR, dtype), jnp.zeros(rows, dtype)
    (_, y, top, total), _ = jax.lax.scan(add, start, tuple(pairs.T))
    total = jnp.where(total > 0, total, 1.0)
    y, top, total = keep((y / total[..., None], top, total))
    return (y, top + jnp.log(total)), (x, y, top, total)


def _across_backward(scale, factors, saved, cotangents):
    (x, y, top, total), (dy, dlog) = saved, cotangents
    mean = jnp.sum(y * dy, axis=-1) - dlog
    size = x.k.shape[-2]

    def chunk(i, carry):
        dq, *rest = carry
        first = x.first[i]

        def carry_on(n, carry):
            q, carried = carry
            j = i - 1 - n
            return product("bgik,bgkl->bgil", q, at(x.through, j)), put(carried, q, j)

        _, carried = jax.lax.fori_loop(0, i - first, carry_on, (at(x.q, i), jnp.zeros_like(x.q)))
        top_i, total_i, mean_i, dy_i = (at(a, i) for a in (top, total, mean, dy))

        def visit(j, carry):
            dq, dk, dv, dthrough, ddecay = carry
            q, k, v = at(carried, j), at(x.k, j), at(x.v, j)
            p = exp_below(_scores(scale, factors, x, q, i, j), top_i[..., None]) / total_i[..., None]
            ds = p * (product("bgiv,bgjv->bgij", dy_i, v, factors) - mean_i[..., None])
            if ddecay is not None:
                of_keys = jnp.sum(ds.reshape(*ds.shape[:2], -1, size, size), axis=3).reshape(ds.shape[:3])
                ddecay = put(ddecay, at(ddecay, i) + jnp.sum(ds, axis=-1), i)
                ddecay = put(ddecay, at(ddecay, j) - of_keys, j)
            dthrough = put(dthrough, at(dthrough, j) + product("bgik,bgil->bgkl", q, dq), j)
            dv = put(dv, at(dv, j) + product("bgij,bgiv->bgjv", p, dy_i, factors), j)
            dk = put(dk, at(dk, j) + scale * product("bgij,bgik->bgjk", ds, q, factors), j)
            dq = product("bgil,bgkl->bgik", dq, at(x.through, j))
            dq = dq + scale * product("bgij,bgjk->bgik", ds, k, factors)
            return dq, dk, dv, dthrough, ddecay

        dq_i, *rest = jax.lax.fori_loop(first, i, visit, (jnp.zeros_like(at(dq, i)), *rest))
        return put(dq, dq_i, i), *rest

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, x.q.dtype), x[:5])
    grads = jax.lax.fori_loop(1, len(x.q), chunk, zeros)
    return (_Blocks(*jax.tree.map(lambda d, a: d.astype(a.dtype), grads, x[:5]), None, None, None),)


_across.defvjp(_across_forward, _across_backward)

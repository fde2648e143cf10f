"""Attention: y_i = sum_j f(scale q_i.k_j + b_ij) v_j over the keys j that query i may see.

"blockwise" computes it as one `lax.scan` over the list of (query block, key block) pairs in which anything is visible:
a causal mask or a window costs only what it leaves. The softmax is the online one (arXiv 1805.02867), and the backward
pass recomputes the scores from the saved output and statistics of each row (FlashAttention-2, arXiv 2307.08691), so
that memory is linear in the length.

Inside, arrays are blocks [batch, key heads, rows, ...]. The query heads that share a key head lie under each other as
rows of one block, so that grouped queries (arXiv 2305.13245) never repeat keys and every product is a batched matrix
product. Batch and key heads stay apart: merged, they could not be sharded over two axes of a mesh.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ops import dispatch
from ops.segments import zero_padding

# Finite stand-ins for minus infinity. Running maxima start above the masked score, so that the weights of a row that
# sees no key are exp(_MASKED - _FLOOR) = 0 and not 1.
_MASKED, _FLOOR = -1e30, -1e20


def _laplace(s):
    # Agrees with relu2 in value and slope at sqrt(1/2), arXiv 2209.10655.
    mean, deviation = math.sqrt(0.5), math.sqrt(0.25 / math.pi)
    return 0.5 * (1.0 + jax.lax.erf((s - mean) / (deviation * math.sqrt(2.0))))


_UNNORMALISED = {"relu2": lambda s: jnp.square(jax.nn.relu(s)), "laplace": _laplace}


class _Form(NamedTuple):
    """What is static of a call."""

    activation: str
    causal: bool
    window: int | None
    scale: float


class _Inputs(NamedTuple):
    """The arrays of a call, as they were given or as blocks."""

    q: Array
    k: Array
    v: Array
    slopes: Array | None
    segment_ids: Array | None
    key_segment_ids: Array | None


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    activation: str = "softmax",
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    slopes: Float[Array, "H"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    query_offset: int | Int[Array, ""] = 0,
    implementation: str = "auto",
    block_size: int | None = None,
) -> Float[Array, "B T H V"]:
    """Attention of T queries to S keys and values.

    Query i sits at key index query_offset + i. It sees a key of its own segment if the masks below let it; a query
    that sees no key, such as padding, gives exactly 0. Scores, softmax statistics and sums are float32 (float64 for
    float64 inputs).

    Args:
      q: queries [batch, T, heads, K].
      k, v: keys [batch, S, key heads, K] and values [batch, S, key heads, V]. heads is a multiple of the key heads,
        and query head h reads key head h // (heads / key heads).
      activation: f. "softmax" over the visible keys, or without a normaliser "relu2", max(s, 0)^2 (arXiv 2202.10447),
        or "laplace" (arXiv 2209.10655); these are masked after f.
      causal: keys to the right of the query are not seen.
      window: of the keys, those in (i - window, i] if causal, else those with |i - j| <= window // 2.
      scale: factor of q.k, K**-0.5 by default.
      slopes: ALiBi (arXiv 2108.12409): adds -slope * (i - j) to the scores of each head, |i - j| if not causal.
      segment_ids: segments of the queries, and of the keys unless key_segment_ids is given; 0 is padding.
      key_segment_ids: segments of the keys, where they differ from the queries'.
      query_offset: an integer, or a traced int32 scalar (decoding into a buffer of keys and values).
      implementation: "reference" holds all scores; "blockwise" is linear in memory (with a traced query_offset it
        goes over blocks of queries, each against all keys); "library" is `jax.nn.dot_product_attention`, cuDNN for
        16-bit types on a GPU, offered for the softmax without slopes, K equal to V and query_offset 0.
      block_size: rows and columns of a block; chosen by length if None.

    Returns:
      [batch, T, heads, V] in v's dtype.

    Raises:
      ValueError: if shapes or options do not fit together.
    """
    _check(q, k, v, activation, window, slopes, segment_ids, key_segment_ids, block_size)
    T, S, K = q.shape[1], k.shape[1], q.shape[3]
    form = _Form(activation, causal, window, K**-0.5 if scale is None else float(scale))
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    q = zero_padding(q, segment_ids)
    k, v = zero_padding(k, key_segment_ids), zero_padding(v, key_segment_ids)

    static = isinstance(query_offset, int | np.integer)
    library = static and query_offset == 0 and slopes is None and _library_takes(form, q, k, v)
    offered = ("reference", "blockwise") + (("library",) if library else ())
    # Segments reach cuDNN as a [T, S] mask, which moderate lengths can afford.
    fused = library and _cudnn_takes(form, q, k, segment_ids) and (segment_ids is None or T * S <= 2048**2)
    chosen = dispatch.choose(implementation, offered, "library" if fused else "blockwise")
    x = _Inputs(q, k, v, slopes, segment_ids, key_segment_ids)
    if chosen == "library":
        return _library(form, x)
    if chosen == "reference":
        return _by_queries(form, T, x, query_offset)
    sizes = tuple(min(length, block_size or _block_length(length)) for length in (T, S))
    if static:
        return _blockwise(form, int(query_offset), sizes, x)
    return _by_queries(form, sizes[0], x, query_offset)


def _check(q, k, v, activation, window, slopes, segment_ids, key_segment_ids, block_size):
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k and v must be [batch, length, heads, channels]: {q.shape}, {k.shape}, {v.shape}")
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    if k.shape != (B, S, G, K) or v.shape[:3] != (B, S, G):
        raise ValueError(f"q {q.shape} and v {v.shape} do not fit k {k.shape}: batch, length, key heads or K differ")
    if H % G:
        raise ValueError(f"the number of query heads must be a multiple of the number of key heads: {H} and {G}")
    if activation != "softmax" and activation not in _UNNORMALISED:
        raise ValueError(f"activation={activation!r} is unknown; choose from {('softmax', *_UNNORMALISED)}")
    for name, value in (("window", window), ("block_size", block_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, or None: {value}")
    if slopes is not None and slopes.shape != (H,):
        raise ValueError(f"slopes must have one entry per query head, {(H,)}: {slopes.shape}")
    if segment_ids is None and key_segment_ids is not None:
        raise ValueError("key_segment_ids needs segment_ids: say which segment the queries belong to")
    if segment_ids is not None:
        keys = segment_ids if key_segment_ids is None else key_segment_ids
        if segment_ids.shape != (B, T) or keys.shape != (B, S):
            shapes = f"{segment_ids.shape} and {keys.shape}"
            raise ValueError(f"segment_ids must be {(B, T)}, and key_segment_ids (its default) {(B, S)}: {shapes}")


def _block_length(length):
    """At most 128, such that the padding of the last block is small."""
    count = -(-length // 128)
    return -(-length // (16 * count)) * 16


def _to_blocks(x, groups, size):
    """[B, L, H, ...] -> [blocks, B, groups, (H / groups) * size, ...], padded with zeros at the end."""
    B, L, H, *rest = x.shape
    count = -(-L // size)
    x = jnp.pad(x, ((0, 0), (0, count * size - L)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(B, count, size, groups, H // groups, *rest)
    x = x.transpose(1, 0, 3, 4, 2, *range(5, x.ndim))
    return x.reshape(count, B, groups, H // groups * size, *rest)


def _from_blocks(x, shape, groups):
    """The inverse of `_to_blocks`, to [B, L, H, channels] = shape."""
    B, L, H, channels = shape
    x = x.reshape(-1, B, groups, H // groups, x.shape[3] // (H // groups), channels).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, -1, H, channels)[:, :L]


def _in_blocks(x, q_size, k_size):
    """All inputs as blocks. Slopes are those of the rows of any query block [G, rows]; segments have one key head."""
    H, G = x.q.shape[2], x.k.shape[2]
    slopes, segment_ids, key_segment_ids = x.slopes, x.segment_ids, x.key_segment_ids
    if slopes is not None:
        slopes = jnp.repeat(slopes.astype(_wide(*x[:3])), q_size).reshape(G, -1)
    if segment_ids is not None:
        per_head = jnp.broadcast_to(segment_ids[:, :, None], (*segment_ids.shape, H // G))
        segment_ids = _to_blocks(per_head, 1, q_size)
        key_segment_ids = _to_blocks(key_segment_ids[:, :, None], 1, k_size)
    q, k, v = _to_blocks(x.q, G, q_size), _to_blocks(x.k, G, k_size), _to_blocks(x.v, G, k_size)
    return _Inputs(q, k, v, slopes, segment_ids, key_segment_ids)


def _wide(*arrays):
    """The type of scores, statistics and sums."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _dot(subscripts, a, b):
    precision = dispatch.matmul_precision(jnp.result_type(a, b))
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=_wide(a, b))


def _distance(form, start, size, count, cols):
    """i - j, or |i - j|, for `count` rows, which are heads of `size` queries each from index `start` on."""
    rows = start + jnp.arange(count, dtype=jnp.int32) % size
    distance = rows[:, None] - cols[None, :]
    return distance if form.causal else jnp.abs(distance)


def _scores(form, x, distance):
    s = form.scale * _dot("bgik,bgjk->bgij", x.q, x.k)
    return s if x.slopes is None else s - x.slopes[..., None] * distance


def _visible(form, distance, real, segment_ids, key_segment_ids):
    """Which columns each row sees, [rows, cols] or [B, 1, rows, cols]. `real` [cols] is False in the padded tail."""
    mask = jnp.broadcast_to(real, distance.shape)
    if form.causal:
        mask &= distance >= 0
    if form.window is not None:
        mask &= distance < (form.window if form.causal else form.window // 2 + 1)
    if segment_ids is not None:
        # Padding sees padding, whose values are zeros.
        mask = mask & (segment_ids[..., :, None] == key_segment_ids[..., None, :])
    return mask


def _weights(form, s, mask):
    return jnp.where(mask, _UNNORMALISED[form.activation](s), 0.0)


def _by_queries(form, size, x, query_offset):
    """Blocks of `size` queries, each against all keys at once: any query_offset, memory linear in S."""
    (B, T, H, _), (S, G, V) = x.q.shape, x.v.shape[1:]
    blocks = _in_blocks(x, size, S)
    keys = jax.tree.map(lambda x: x[0], (blocks.k, blocks.v, blocks.key_segment_ids))
    cols = jnp.arange(S, dtype=jnp.int32)

    def one(block):
        q, segment_ids, start = block
        k, v, key_segment_ids = keys
        distance = _distance(form, start, size, q.shape[2], cols)
        s = _scores(form, _Inputs(q, k, v, blocks.slopes, None, None), distance)
        mask = _visible(form, distance, cols < S, segment_ids, key_segment_ids)
        if form.activation != "softmax":
            return _dot("bgij,bgjv->bgiv", _weights(form, s, mask).astype(v.dtype), v)
        s = jnp.where(mask, s, _MASKED)
        p = jnp.exp(s - jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True, initial=_FLOOR)))
        total = jnp.sum(p, axis=-1, keepdims=True)
        return _dot("bgij,bgjv->bgiv", p.astype(v.dtype), v) / jnp.where(total > 0, total, 1.0)

    starts = query_offset + size * jnp.arange(len(blocks.q), dtype=jnp.int32)
    queries = (blocks.q, blocks.segment_ids, starts)
    if len(starts) == 1:
        y = one(jax.tree.map(lambda x: x[0], queries))[None]
    else:
        y = jax.lax.map(jax.checkpoint(one, prevent_cse=False), queries)
    return _from_blocks(y, (B, T, H, V), G).astype(x.v.dtype)


def _schedule(form, offset, sizes, T, S):
    """Pairs (query block, key block) with anything visible, [pairs, 2]."""
    q_size, k_size = sizes
    pairs = []
    for i in range(-(-T // q_size)):
        first, last = offset + i * q_size, offset + min((i + 1) * q_size, T) - 1
        low, high = 0, S - 1
        if form.causal:
            high = min(high, last)
        if form.window is not None:
            low = max(low, first - (form.window - 1 if form.causal else form.window // 2))
            high = min(high, last if form.causal else last + form.window // 2)
        pairs += [(i, j) for j in range(low // k_size, high // k_size + 1) if low <= high]
    return np.array(pairs, np.int32).reshape(-1, 2)


def _at(x, i):
    return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _put(x, value, i):
    return jax.lax.dynamic_update_index_in_dim(x, value, i, axis=0)


def _tile(form, offset, sizes, S, blocks, i, j):
    """Query block i and key block j: the inputs, scores, mask and distances."""
    segments = (None, None)
    if blocks.segment_ids is not None:
        segments = _at(blocks.segment_ids, i), _at(blocks.key_segment_ids, j)
    x = _Inputs(_at(blocks.q, i), _at(blocks.k, j), _at(blocks.v, j), blocks.slopes, *segments)
    cols = j * sizes[1] + jnp.arange(sizes[1], dtype=jnp.int32)
    distance = _distance(form, offset + i * sizes[0], sizes[0], x.q.shape[2], cols)
    return x, _scores(form, x, distance), _visible(form, distance, cols < S, *segments), distance


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _blockwise(form, offset, sizes, x):
    return _blockwise_forward(form, offset, sizes, x)[0]


def _blockwise_forward(form, offset, sizes, x):
    (B, T, H, _), (S, G, V) = x.q.shape, x.v.shape[1:]
    blocks = _in_blocks(x, *sizes)
    rows, dtype = blocks.q.shape[:4], _wide(*x[:3])

    def add_softmax(carry, pair):
        i, j = pair
        y, top, total = carry
        x, s, mask, _ = _tile(form, offset, sizes, S, blocks, i, j)
        s = jnp.where(mask, s, _MASKED)
        old = _at(top, i)
        new = jnp.maximum(old, jnp.max(s, axis=-1))
        p, shrink = jnp.exp(s - new[..., None]), jnp.exp(old - new)
        y = _put(y, _at(y, i) * shrink[..., None] + _dot("bgij,bgjv->bgiv", p.astype(x.v.dtype), x.v), i)
        return (y, _put(top, new, i), _put(total, _at(total, i) * shrink + jnp.sum(p, axis=-1), i)), None

    def add_unnormalised(y, pair):
        i, j = pair
        x, s, mask, _ = _tile(form, offset, sizes, S, blocks, i, j)
        p = _weights(form, s, mask).astype(x.v.dtype)
        return _put(y, _at(y, i) + _dot("bgij,bgjv->bgiv", p, x.v), i), None

    pairs = tuple(_schedule(form, offset, sizes, T, S).T)
    y, top, total = jnp.zeros((*rows, V), dtype), None, None
    if form.activation == "softmax":
        start = (y, jnp.full(rows, _FLOOR, dtype), jnp.zeros(rows, dtype))
        (y, top, total), _ = jax.lax.scan(add_softmax, start, pairs)
        total = jnp.where(total > 0, total, 1.0)
        y = y / total[..., None]
    else:
        y, _ = jax.lax.scan(add_unnormalised, y, pairs)
    y = _from_blocks(y, (B, T, H, V), G).astype(x.v.dtype)
    # Not the log-sum-exp: in float32, top + log(total) would lose log(total) where the scores are large.
    return y, (x, y, top, total)


def _blockwise_backward(form, offset, sizes, saved, dy):
    inputs, y, top, total = saved
    (_, T, H, _), (S, G) = inputs.q.shape, inputs.k.shape[1:3]
    blocks, grads = _in_blocks(inputs, *sizes), _to_blocks(dy, G, sizes[0])
    dtype = _wide(*inputs[:3])
    if form.activation == "softmax":
        mean = _to_blocks(jnp.sum(y.astype(dtype) * dy.astype(dtype), axis=-1), G, sizes[0])

    def add(carry, pair):
        i, j = pair
        dq, dk, dv, dslopes = carry
        x, s, mask, distance = _tile(form, offset, sizes, S, blocks, i, j)
        dy = _at(grads, i)
        dp = _dot("bgiv,bgjv->bgij", dy, x.v)
        if form.activation == "softmax":
            p = jnp.exp(jnp.where(mask, s, _MASKED) - _at(top, i)[..., None]) / _at(total, i)[..., None]
            ds = p * (dp - _at(mean, i)[..., None])
        else:
            p, pull_back = jax.vjp(lambda s: _weights(form, s, mask), s)
            (ds,) = pull_back(dp)
        if dslopes is not None:
            dslopes -= jnp.sum(ds * distance, axis=(0, -1))
        dv = _put(dv, _at(dv, j) + _dot("bgij,bgiv->bgjv", p.astype(dy.dtype), dy), j)
        ds = ds.astype(x.k.dtype)
        dk = _put(dk, _at(dk, j) + _dot("bgij,bgik->bgjk", ds, x.q), j)
        dq = _put(dq, _at(dq, i) + _dot("bgij,bgjk->bgik", ds, x.k), i)
        return (dq, dk, dv, dslopes), None

    pairs = tuple(_schedule(form, offset, sizes, T, S).T)
    zeros = jax.tree.map(lambda b: jnp.zeros(b.shape, dtype), (blocks.q, blocks.k, blocks.v, blocks.slopes))
    (dq, dk, dv, dslopes), _ = jax.lax.scan(add, zeros, pairs)
    totals = (form.scale * dq, form.scale * dk, dv)
    dq, dk, dv = (_from_blocks(d, x.shape, G).astype(x.dtype) for d, x in zip(totals, inputs[:3], strict=True))
    if dslopes is not None:
        dslopes = jnp.sum(dslopes.reshape(H, -1), axis=1).astype(inputs.slopes.dtype)
    return (_Inputs(dq, dk, dv, dslopes, None, None),)


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _library_takes(form, q, k, v):
    """Whether `jax.nn.dot_product_attention` computes this form at all."""
    aligned = q.shape[1] == k.shape[1] or not (form.causal or form.window)
    return form.activation == "softmax" and aligned and v.shape == k.shape and q.dtype == k.dtype == v.dtype


def _cudnn_takes(form, q, k, segment_ids):
    """Whether there is a fused kernel: 16-bit types, and no window to the right; masks need even lengths."""
    (_, T, _, K), S = q.shape, k.shape[1]
    fits = jnp.dtype(q.dtype).itemsize == 2 and K % 8 == 0 and K <= 128 and (form.causal or form.window is None)
    even = segment_ids is None or (T % 2 == 0 and S % 2 == 0)
    return jax.default_backend() == "gpu" and fits and even


def _library(form, x):
    T, S, mask, window = x.q.shape[1], x.k.shape[1], None, None
    if x.segment_ids is not None:
        cols = jnp.arange(S, dtype=jnp.int32)
        mask = _visible(form, _distance(form, 0, T, T, cols), cols < S, x.segment_ids, x.key_segment_ids)[:, None]
    if form.window is not None:
        window = (form.window - 1, 0) if form.causal else (form.window // 2, form.window // 2)
    backend = "cudnn" if _cudnn_takes(form, x.q, x.k, x.segment_ids) else "xla"
    options = {"scale": form.scale, "is_causal": form.causal, "local_window_size": window, "implementation": backend}
    y = jax.nn.dot_product_attention(x.q, x.k, x.v, mask=mask, **options)
    # The library spreads the weight of a query that sees no key over all keys.
    return y if mask is None else jnp.where(jnp.any(mask, axis=-1)[:, 0, :, None, None], y, 0)

"""How `ops.attention` computes: blocks of queries against blocks of keys.

`blockwise` is one loop over the list of (query block, key block) pairs in which the causal mask or the window leave
anything visible; the list is static, but for masks on packed rows, where it is found out at run time. The softmax is the
online one (arXiv 1805.02867), and the backward pass recomputes the scores from the saved output and statistics of each
row (FlashAttention-2, arXiv 2307.08691), so that memory is linear in the length.

Inside, arrays are blocks [batch, key heads, rows, ...]. The query heads that share a key head lie under each other as
rows of one block, so that grouped queries (arXiv 2305.13245) never repeat keys and every product is a batched matrix
product. Batch and key heads stay apart: merged, they could not be sharded over two axes of a mesh.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from common.errors import check_choice
from ops import dispatch
from ops.kept import keep
from ops.rows import row_max

# Finite stand-ins for minus infinity. Running maxima start above the masked score, so that the weights of a row that
# sees no key are exp(MASKED - FLOOR) = 0 and not 1.
MASKED, FLOOR = -1e30, -1e20


def _squared_relu(s):
    return jnp.square(jax.nn.relu(s))


def _laplace(s):
    """The normal distribution that agrees with the squared ReLU in value and slope at sqrt(1/2), arXiv 2209.10655."""
    mean, deviation = math.sqrt(0.5), math.sqrt(0.25 / math.pi)
    return 0.5 * (1.0 + jax.lax.erf((s - mean) / (deviation * math.sqrt(2.0))))


# What a score weighs where weights are not normalised.
UNNORMALISED = {"relu": jax.nn.relu, "relu2": _squared_relu, "laplace": _laplace}


def check_activation(activation: str) -> None:
    """Raises a UserError, with the near names, for an activation that is neither "softmax" nor in `UNNORMALISED`."""
    check_choice("activation", activation, ("softmax", *UNNORMALISED))


class Form(NamedTuple):
    """What is static of a call."""

    activation: str
    causal: bool
    window: int | None
    scale: float
    cap: float | None
    mask: Callable | None


class Inputs(NamedTuple):
    """The arrays of a call, as they were given or as blocks."""

    q: Array
    k: Array
    v: Array
    slopes: Array | None
    decay: Array | None
    key_decay: Array | None
    segment_ids: Array | None
    key_segment_ids: Array | None
    query_labels: Any
    key_labels: Any


def block_length(length):
    """At most 128, such that the padding of the last block is small."""
    count = -(-length // 128)
    return -(-length // (16 * count)) * 16


def to_blocks(x, groups, size):
    """[B, L, H, ...] -> [blocks, B, groups, (H / groups) * size, ...], padded with zeros at the end."""
    B, L, H, *rest = x.shape
    count = -(-L // size)
    x = jnp.pad(x, ((0, 0), (0, count * size - L)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(B, count, size, groups, H // groups, *rest)
    x = x.transpose(1, 0, 3, 4, 2, *range(5, x.ndim))
    return x.reshape(count, B, groups, H // groups * size, *rest)


def from_blocks(x, shape, groups):
    """The inverse of `to_blocks`, to [B, L, H, channels] = shape."""
    B, L, H, channels = shape
    x = x.reshape(-1, B, groups, H // groups, x.shape[3] // (H // groups), channels).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, -1, H, channels)[:, :L]


def labels_to_blocks(labels, heads, groups, size):
    """Labels [B, L] or [B, L, heads] to [blocks, B, 1 or groups, rows]."""

    def one(x):
        if x.ndim == 3:
            return to_blocks(x, groups, size)
        return to_blocks(jnp.broadcast_to(x[:, :, None], (*x.shape, heads // groups)), 1, size)

    return jax.tree.map(one, labels)


def _in_blocks(x, q_size, k_size):
    """All inputs as blocks. Slopes are those of the rows of any query block [G, rows]; segments have one key head; the decays of
    keys are those of each query head, which lie behind each other."""
    H, G = x.q.shape[2], x.k.shape[2]
    slopes = x.slopes
    if slopes is not None:
        slopes = jnp.repeat(slopes.astype(wide(*x[:3])), q_size).reshape(G, -1)
    decay = None if x.decay is None else to_blocks(x.decay, G, q_size)
    key_decay = None if x.key_decay is None else to_blocks(x.key_decay, G, k_size)
    q = to_blocks(x.q, G, q_size)
    if (
        q_size == 1 and k_size == x.k.shape[1]
    ):  # decoding from a cache that holds heads first, whose swap this one undoes
        k, v = (jnp.swapaxes(a, 1, 2)[None] for a in (x.k, x.v))
    else:
        k, v = to_blocks(x.k, G, k_size), to_blocks(x.v, G, k_size)
    of_queries = labels_to_blocks((x.segment_ids, x.query_labels), H, G, q_size)
    of_keys = labels_to_blocks((x.key_segment_ids, x.key_labels), G, G, k_size)
    return Inputs(q, k, v, slopes, decay, key_decay, of_queries[0], of_keys[0], of_queries[1], of_keys[1])


def wide(*arrays):
    """The type of scores, statistics and sums."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def dot(subscripts, a, b):
    """A product with sums of type `wide`, in full precision for factors of 32 bits."""
    precision = dispatch.matmul_precision(jnp.result_type(a, b))
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=wide(a, b))


# XLA's CPU compiler multiplies [i, k] by [k, j] in half the time of other orders. There the blocks that are multiplied over
# their channels or rows are turned before the loop over pairs, and sums over rows turned back behind it: once for each block.


def _turned(blocks):
    """[.., rows, channels] to [.., channels, rows] on a CPU."""
    return jnp.swapaxes(blocks, -1, -2) if dispatch.on_cpu() else blocks


def _over_channels(a, turned):
    """[.., i, k] and `_turned` [.., j, k] to [.., i, j]."""
    return dot("bgik,bgkj->bgij" if dispatch.on_cpu() else "bgik,bgjk->bgij", a, turned)


def _over_rows(tile, turned):
    """[.., i, j] and `_turned` [.., i, k] to `_turned` [.., j, k]."""
    return dot("bgki,bgij->bgkj", turned, tile) if dispatch.on_cpu() else dot("bgij,bgik->bgjk", tile, turned)


def distances(form, start, size, count, cols):
    """i - j, or |i - j|, for `count` rows, which are heads of `size` queries each from index `start` on."""
    rows = start + jnp.arange(count, dtype=jnp.int32) % size
    distance = rows[:, None] - cols[None, :]
    return distance if form.causal else jnp.abs(distance)


def _products(form, products):
    """The scores q.k without what depends on places, and their derivative to the scaled products (None for 1)."""
    s = form.scale * products
    if form.cap is None:
        return s, None
    t = jnp.tanh(s / form.cap)
    return form.cap * t, 1 - jnp.square(t)


def _placed(s, x, distance):
    """The scores, from what `_products` gives."""
    if x.decay is not None:
        keys = _of_heads(x.key_decay, s.shape[-1])
        difference = x.decay.reshape(*keys.shape[:3], -1, 1) - keys[..., None, :]
        s = s + difference.reshape(s.shape)
    return s if x.slopes is None else s - x.slopes[..., None] * distance


def _of_heads(key_decay, size):
    """[B, G, heads of the group, size]."""
    return key_decay.reshape(*key_decay.shape[:2], -1, size)


def visible(form, distance, real, x):
    """Which columns each row sees, [rows, cols] or [B, 1 or G, rows, cols]. `real` [cols] is False in the padded tail."""
    mask = jnp.broadcast_to(real, distance.shape)
    if form.causal:
        mask &= distance >= 0
    if form.window is not None:
        mask &= distance < (form.window if form.causal else form.window // 2 + 1)
    if x.segment_ids is not None:
        # Padding sees padding, whose values are zeros.
        mask = mask & (x.segment_ids[..., :, None] == x.key_segment_ids[..., None, :])
    if form.mask is not None:
        rows = jax.tree.map(lambda a: a[..., :, None], x.query_labels)
        mask = mask & form.mask(rows, jax.tree.map(lambda a: a[..., None, :], x.key_labels))
    return mask


def _weights(form, s, mask):
    return jnp.where(mask, UNNORMALISED[form.activation](s), 0.0)


def exp_below(s: Float[Array, "*s"], top: Float[Array, "..."]) -> Float[Array, "*s"]:
    """exp(s - top), where top is the largest s and so the result at most 1.

    A compiler that fuses the product behind s into the difference rounds once less than it did for top. Where scores are some
    1e9, that is a difference of hundreds, whose exponential overflows.
    """
    difference = s - top
    return jnp.exp(difference - jax.lax.stop_gradient(jnp.maximum(difference, 0)))


def by_queries(form, size, x, query_offset):
    """Blocks of `size` queries, each against all keys at once: any query_offset, memory linear in S.

    Returns, like `blockwise`, the output [B, T, H, V] and, of the softmax, the log-sum-exp of each row [B, T, H].
    """
    (B, T, H, _), (S, G, V) = x.q.shape, x.v.shape[1:]
    blocks = _in_blocks(x, size, S)
    cols = jnp.arange(S, dtype=jnp.int32)
    of_keys = (blocks.k, blocks.v, blocks.key_decay, blocks.key_segment_ids, blocks.key_labels)
    k, v, key_decay, key_segment_ids, key_labels = jax.tree.map(lambda a: a[0], of_keys)

    def one(block):
        q, decay, segment_ids, labels, start = block
        x = Inputs(q, k, v, blocks.slopes, decay, key_decay, segment_ids, key_segment_ids, labels, key_labels)
        distance = distances(form, start, size, x.q.shape[2], cols)
        s = _placed(_products(form, dot("bgik,bgjk->bgij", x.q, x.k))[0], x, distance)
        mask = visible(form, distance, cols < S, x)
        if form.activation != "softmax":
            return dot("bgij,bgjv->bgiv", _weights(form, s, mask).astype(x.v.dtype), x.v), None
        s = jnp.where(mask, s, MASKED)
        top = jnp.maximum(row_max(s), FLOOR)[..., None]
        p = exp_below(s, top)
        total = jnp.sum(p, axis=-1, keepdims=True)
        total = jnp.where(total > 0, total, 1.0)
        return dot("bgij,bgjv->bgiv", p.astype(x.v.dtype), x.v) / total, top + jnp.log(total)

    starts = query_offset + size * jnp.arange(len(blocks.q), dtype=jnp.int32)
    rows = (blocks.q, blocks.decay, blocks.segment_ids, blocks.query_labels, starts)
    if len(starts) == 1:
        y, log = jax.tree.map(lambda x: x[None], one(jax.tree.map(lambda x: x[0], rows)))
    else:
        y, log = jax.lax.map(jax.checkpoint(one, prevent_cse=False), rows)
    log = None if log is None else from_blocks(log, (B, T, H, 1), G)[..., 0]
    return from_blocks(y, (B, T, H, V), G).astype(x.v.dtype), log


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


def at(x, i):
    """x[i], of a traced i."""
    return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def put(x, value, i):
    """x with `value` in place of x[i]."""
    return jax.lax.dynamic_update_index_in_dim(x, value, i, axis=0)


def _tile(form, offset, sizes, S, blocks, turned_k, i, j):
    """Query block i and key block j: the inputs, scores, mask, distances, and the scores' derivative to the products."""
    rows = (blocks.q, blocks.decay, blocks.segment_ids, blocks.query_labels)
    q, decay, segment_ids, labels = jax.tree.map(lambda a: at(a, i), rows)
    keys = (blocks.k, blocks.v, blocks.key_decay, blocks.key_segment_ids, blocks.key_labels)
    k, v, key_decay, key_segment_ids, key_labels = jax.tree.map(lambda a: at(a, j), keys)
    x = Inputs(q, k, v, blocks.slopes, decay, key_decay, segment_ids, key_segment_ids, labels, key_labels)
    cols = j * sizes[1] + jnp.arange(sizes[1], dtype=jnp.int32)
    distance = distances(form, offset + i * sizes[0], sizes[0], x.q.shape[2], cols)
    s, derivative = _products(form, _over_channels(x.q, at(turned_k, j)))
    return x, _placed(s, x, distance), visible(form, distance, cols < S, x), distance, derivative


def _visits(form, offset, sizes, lengths, blocks):
    """The pairs of blocks to go over, and how many of them from the first on, None for all."""
    pairs = tuple(_schedule(form, offset, sizes, *lengths).T)
    if form.mask is None or form.window is not None or blocks.segment_ids is None or not len(pairs[0]):
        return pairs, None
    # Where documents lie in a row, and so what a pattern that goes by them hides, shows at run time only.
    turned_k = _turned(blocks.k)
    seen = lambda pair: _tile(form, offset, sizes, lengths[1], blocks, turned_k, *pair)[2]
    some = jax.lax.map(lambda pair: jnp.any(seen(pair), axis=(-2, -1)), pairs)
    active = jnp.any(some, axis=(1, 2))
    order = jnp.argsort(~active, stable=True)
    return tuple(jnp.asarray(p)[order] for p in pairs), jnp.sum(active)


def _go_over(visits, add, carry):
    pairs, count = visits
    if count is None:
        return jax.lax.scan(lambda carry, pair: (add(carry, *pair), None), carry, pairs)[0]
    return jax.lax.fori_loop(0, count, lambda n, carry: add(carry, *(p[n] for p in pairs)), carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def blockwise(form, offset, sizes, x):
    """One loop over the pairs of blocks with anything visible; a static query_offset. Returns as `by_queries`."""
    return _blockwise_forward(form, offset, sizes, x)[0]


def accumulate(form, offset, sizes, x):
    """The sums over the keys, blocks of queries [blocks, B, G, rows, ...].

    Returns:
      the pairs that were gone over; sums of weights times values; and of the softmax, the largest score of each row and the sum
      of its weights relative to that, 0 where it sees no key (else None).
    """
    (T, _), (S, _, V) = x.q.shape[1:3], x.v.shape[1:]
    blocks = _in_blocks(x, *sizes)
    turned_k = _turned(blocks.k)
    rows, dtype = blocks.q.shape[:4], wide(*x[:3])

    def add_softmax(carry, i, j):
        # The pairs of a query block follow each other. Its largest scores go along by themselves: an array that is read
        # at several places and written is copied by XLA, whole, for each pair.
        y, top, total, (last, largest) = carry
        x, s, mask, *_ = _tile(form, offset, sizes, S, blocks, turned_k, i, j)
        s = jnp.where(mask, s, MASKED)
        old = jnp.where(i == last, largest, FLOOR)
        new = jnp.maximum(old, row_max(s))
        p, shrink = exp_below(s, new[..., None]), jnp.exp(old - new)
        y = put(y, at(y, i) * shrink[..., None] + dot("bgij,bgjv->bgiv", p.astype(x.v.dtype), x.v), i)
        return y, put(top, new, i), put(total, at(total, i) * shrink + jnp.sum(p, axis=-1), i), (i, new)

    def add_unnormalised(y, i, j):
        x, s, mask, *_ = _tile(form, offset, sizes, S, blocks, turned_k, i, j)
        p = _weights(form, s, mask).astype(x.v.dtype)
        return put(y, at(y, i) + dot("bgij,bgjv->bgiv", p, x.v), i)

    visits = _visits(form, offset, sizes, (T, S), blocks)
    y = jnp.zeros((*rows, V), dtype)
    if form.activation != "softmax":
        return visits, _go_over(visits, add_unnormalised, y), None, None
    top = jnp.full(rows, FLOOR, dtype)
    start = (y, top, jnp.zeros(rows, dtype), (jnp.int32(-1), top[0]))
    return visits, *_go_over(visits, add_softmax, start)[:3]


def _blockwise_forward(form, offset, sizes, x):
    (B, T, H, _), (_, G, V) = x.q.shape, x.v.shape[1:]
    visits, y, top, total = accumulate(form, offset, sizes, x)
    log = None
    if form.activation == "softmax":
        total = jnp.where(total > 0, total, 1.0)
        y = y / total[..., None]
        log = of_tokens(top + jnp.log(total), B, T, H, G)
    y = from_blocks(y, (B, T, H, V), G).astype(x.v.dtype)
    # The log-sum-exp would not do: in float32, top + log(total) loses log(total) where the scores are large.
    y, top, total = keep((y, top, total))
    return (y, log), (x, visits, y, top, total)


def gradients(form, offset, sizes, saved, cotangents):
    """The derivatives by all inputs of a sum over keys, in the type of scores, from what `_blockwise_forward` saved.

    Of a query that has seen other keys as well, what is saved is of all of them; the pairs may be None.
    """
    (inputs, visits, y, top, total), (dy, dlog) = saved, cotangents
    H, (S, G) = inputs.q.shape[2], inputs.k.shape[1:3]
    blocks, grads = _in_blocks(inputs, *sizes), to_blocks(dy, G, sizes[0])
    turned = blocks._replace(q=_turned(blocks.q), k=_turned(blocks.k), v=_turned(blocks.v))
    turned_grads = _turned(grads)
    dtype = wide(*inputs[:3])
    visits = _visits(form, offset, sizes, (inputs.q.shape[1], S), blocks) if visits is None else visits
    if form.activation == "softmax":
        # d logsumexp / d s = p.
        mean = to_blocks(jnp.sum(y.astype(dtype) * dy.astype(dtype), axis=-1) - dlog, G, sizes[0])

    def add(carry, i, j):
        dq, dk, dv, dslopes, ddecay, dkey_decay = carry
        x, s, mask, distance, derivative = _tile(form, offset, sizes, S, blocks, turned.k, i, j)
        dy = at(grads, i)
        dp = _over_channels(dy, at(turned.v, j))
        if form.activation == "softmax":
            p = exp_below(jnp.where(mask, s, MASKED), at(top, i)[..., None]) / at(total, i)[..., None]
            ds = p * (dp - at(mean, i)[..., None])
        else:
            p, pull_back = jax.vjp(lambda s: _weights(form, s, mask), s)
            (ds,) = pull_back(dp)
        if dslopes is not None:
            dslopes -= jnp.sum(ds * distance, axis=(0, -1))
        if ddecay is not None:
            ddecay = put(ddecay, at(ddecay, i) + jnp.sum(ds, axis=-1), i)
            of_keys = at(dkey_decay, j)
            of_heads = ds.reshape(*_of_heads(of_keys, sizes[1]).shape[:3], -1, sizes[1])
            dkey_decay = put(dkey_decay, of_keys - jnp.sum(of_heads, axis=3).reshape(of_keys.shape), j)
        dv = put(dv, at(dv, j) + _over_rows(p.astype(dy.dtype), at(turned_grads, i)), j)
        ds = (ds if derivative is None else ds * derivative).astype(x.k.dtype)
        dk = put(dk, at(dk, j) + _over_rows(ds, at(turned.q, i)), j)
        dq = put(dq, at(dq, i) + dot("bgij,bgjk->bgik", ds, x.k), i)
        return dq, dk, dv, dslopes, ddecay, dkey_decay

    zeros = jax.tree.map(lambda b: jnp.zeros(b.shape, dtype), (blocks.q, turned.k, turned.v, *blocks[3:6]))
    dq, dk, dv, dslopes, *ddecays = _go_over(visits, add, zeros)
    totals = (form.scale * dq, form.scale * _turned(dk), _turned(dv))
    dq, dk, dv = (from_blocks(d, x.shape, G) for d, x in zip(totals, inputs[:3], strict=True))
    if dslopes is not None:
        dslopes = jnp.sum(dslopes.reshape(H, -1), axis=1)
    if ddecays[0] is not None:
        ddecays = [of_tokens(d, *x.shape, G) for d, x in zip(ddecays, (inputs.decay, inputs.key_decay), strict=True)]
    return Inputs(dq, dk, dv, dslopes, *ddecays, None, None, None, None)


def in_types_of(gradients: Inputs, inputs: Inputs) -> Inputs:
    """Gradients in the types of what they are of."""
    return Inputs(*(d if d is None else d.astype(x.dtype) for d, x in zip(gradients, inputs)))


def of_tokens(x, batch, length, heads, groups):
    """What blocks hold of each row, [blocks, B, G, rows], as [B, length, heads]."""
    return from_blocks(x[..., None], (batch, length, heads, 1), groups)[..., 0]


def _blockwise_backward(form, offset, sizes, saved, cotangents):
    return (in_types_of(gradients(form, offset, sizes, saved, cotangents), saved[0]),)


blockwise.defvjp(_blockwise_forward, _blockwise_backward)

"""Attention to a sequence in shards: keys and values go around a ring of devices, or come from the neighbours of a window.

Ring attention (arXiv 2310.01889): each device keeps its queries; in every step it attends to the keys and values that it holds
and hands them on, so that no device ever has those of the whole sequence. The softmax is joined as blocks of it are. The backward
pass sends keys and values around once more, and with them the sums of their gradients, which are home after a full turn.

Under a causal mask the shards in front would wait for those behind. The sequence is therefore cut into 2n pieces, of which device
d gets d and 2n - 1 - d (zigzag, as in arXiv 2407.21783, section 3.3.2): in each step but the first, every device has exactly two
pieces of queries with a piece of keys that they see whole. Two permutations of half shards bring the pieces there, two back.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ops import sequence
from ops.attention_blocks import (
    Form,
    Inputs,
    accumulate,
    block_length,
    blockwise,
    from_blocks,
    gradients,
    in_types_of,
    of_tokens,
    to_blocks,
)
from ops.kept import keep


class _Sums(NamedTuple):
    """Of queries [B, T, H]: weights times values, and of the softmax the largest score and the sum of weights."""

    y: Array
    top: Array | None
    total: Array | None


def takes(form: Form, x: Inputs) -> bool:
    """Whether attention to a sequence in shards is computed here; what is not, the compiler splits."""
    length = x.q.shape[1]
    whole = x.k.shape[1] == length and sequence.is_split(length) and length % (2 * sequence.ways()) == 0
    return whole and (x.slopes is None or _is_near(form, length))


def over_shards(form: Form, x: Inputs, block_size: int | None) -> tuple[Array, Array | None]:
    """`ops.attention_blocks.blockwise` on shards; the same results."""
    (B, T, H, _), (G, V) = x.q.shape, x.v.shape[2:]
    near = _is_near(form, T)
    if form.window is not None and not near:
        form, x = _as_mask(form, x)

    def grouped(a, axis):  # heads, by their key head: a mesh splits one or the other
        return None if a is None else a.reshape(*a.shape[:axis], G, a.shape[axis] // G, *a.shape[axis + 1 :])

    def joined(a, axis):
        return None if a is None else a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :])

    flat, trees = jax.tree.flatten((x.query_labels, x.key_labels))
    labels = {f"label {number}": a for number, a in enumerate(flat)}
    heads, keys = ("kv_heads", "heads"), ("batch", "length", "kv_heads", None)
    tokens = ("batch", "length")
    count = len(jax.tree.leaves(x.query_labels))
    arguments = {
        "q": grouped(x.q, 2),
        "k": x.k,
        "v": x.v,
        "slopes": grouped(x.slopes, 0),
        "decay": grouped(x.decay, 2),
        "key_decay": grouped(x.key_decay, 2),
        "segment_ids": x.segment_ids,
        "key_segment_ids": x.key_segment_ids,
        **{name: grouped(a, 2) if a.ndim == 3 and n < count else a for n, (name, a) in enumerate(labels.items())},
    }
    axes = {
        "q": (*tokens, *heads, None),
        "k": keys,
        "v": keys,
        "slopes": heads,
        "decay": (*tokens, *heads),
        "key_decay": (*tokens, *heads),
        "segment_ids": tokens,
        "key_segment_ids": tokens,
        **{name: (*tokens, *heads)[: arguments[name].ndim] for name in labels},
    }

    def shard(q, k, v, slopes, decay, key_decay, segment_ids, key_segment_ids, **labels):
        flat = [joined(a, 2) if a.ndim == 4 else a for a in labels.values()]
        of_heads = (joined(slopes, 0), joined(decay, 2), joined(key_decay, 2))
        own = Inputs(joined(q, 2), k, v, *of_heads, segment_ids, key_segment_ids, *jax.tree.unflatten(trees, flat))
        y, log = (_near if near else _around)(form, block_size, own)
        local = (q.shape[2], q.shape[3])
        split = lambda a: a.reshape(*a.shape[:2], *local, *a.shape[3:])
        return (split(y),) if log is None else (split(y), split(log))

    results = [((*tokens, *heads, None), (B, T, G, H // G, V)), ((*tokens, *heads), (B, T, G, H // G))]
    found = sequence.apply(shard, arguments, axes, results[: 1 + (form.activation == "softmax")])
    return joined(found[0], 2), joined(found[1], 2) if len(found) > 1 else None


def _sizes(block_size, *lengths):
    return tuple(min(length, block_size or block_length(length)) for length in lengths)


# ---------------------------------------------------------------------------------------------------------- windows


def _reach(form):
    """How many keys before and behind a query may be seen."""
    return (form.window - 1, 0) if form.causal else (form.window // 2, form.window // 2)


def _is_near(form, length):
    """Whether windows are so short that bringing their keys is better than a turn of the ring."""
    return form.window is not None and sum(_reach(form)) < length // 2


def _as_mask(form, x):
    """The window as a further mask, by the places of tokens, which the ring takes along."""
    (left, right), mask, tokens = _reach(form), form.mask, x.q.shape[:2]
    if max(left, right) >= tokens[1] - 1:  # it hides nothing
        return form._replace(window=None), x
    places = jnp.broadcast_to(jnp.arange(tokens[1], dtype=jnp.int32), tokens)

    def seen(query, key):
        (i, query), (j, key) = query, key
        inside = (i - j <= left) & (j - i <= right)
        return inside if mask is None else inside & mask(query, key)

    labels = {"query_labels": (places, x.query_labels), "key_labels": (places, x.key_labels)}
    return form._replace(window=None, mask=seen), x._replace(**labels)


def _near(form, block_size, x):
    left, right = _reach(form)
    bring = functools.partial(sequence.halo, left=left, right=right)
    k, v, key_decay, key_labels = jax.tree.map(bring, (x.k, x.v, x.key_decay, x.key_labels))
    whole = jnp.ones(x.q.shape[:2], jnp.int32)
    segment_ids, key_segment_ids = (whole if a is None else a for a in (x.segment_ids, x.key_segment_ids))
    key_segment_ids = bring(key_segment_ids + 1) - 1  # what is beyond the sequence is not even padding
    x = x._replace(k=k, v=v, key_decay=key_decay, key_labels=key_labels)
    x = x._replace(segment_ids=segment_ids, key_segment_ids=key_segment_ids)
    return blockwise(form, left, _sizes(block_size, x.q.shape[1], k.shape[1]), x)


# ------------------------------------------------------------------------------------------------------------- ring


def _around(form, block_size, x):
    if not form.causal:
        return _ring(form, block_size, x)
    y, log = _ring(form, block_size, jax.tree.map(_zigzag, x))
    return jax.tree.map(_straight, (y, log))


def _routes():
    """Where the first and the second halves of the shards go: (from, to)."""
    n = sequence.ways()
    place = lambda piece: piece if piece < n else 2 * n - 1 - piece
    return [[(i, place(2 * i + half)) for i in range(n)] for half in (0, 1)]


def _is_even():
    return lax.axis_index(sequence.AXIS) % 2 == 0


def _zigzag(x):
    """The shard's pieces d and 2n - 1 - d of a sequence in shards of 2d and 2d + 1."""
    halves = jnp.split(x, 2, axis=1)
    even, odd = (lax.ppermute(half, sequence.AXIS, route) for half, route in zip(halves, _routes()))
    return jnp.concatenate([jnp.where(_is_even(), even, odd), jnp.where(_is_even(), odd, even)], axis=1)


def _straight(x):
    """The inverse of `_zigzag`."""
    low, high = jnp.split(x, 2, axis=1)
    halves = jnp.where(_is_even(), low, high), jnp.where(_is_even(), high, low)
    back = ([(to, of) for of, to in route] for route in _routes())
    return jnp.concatenate([lax.ppermute(half, sequence.AXIS, route) for half, route in zip(halves, back)], axis=1)


def _hand_on(tree):
    n = sequence.ways()
    return jax.tree.map(lambda a: lax.ppermute(a, sequence.AXIS, [(i, (i + 1) % n) for i in range(n)]), tree)


# In a step of the causal ring the keys are of device j. If j is before this one, its first piece is seen by both pieces here, and
# else the second piece here sees both of them: in either case two products, which lie under each other as rows of the batch.


def _rows(is_before, a):
    low, high = jnp.split(a, 2, axis=1)
    return jnp.concatenate([high, jnp.where(is_before, low, high)])


def _rows_back(is_before, a):
    first, second = jnp.split(a, 2)
    return jnp.concatenate([jnp.where(is_before, second, 0), first + jnp.where(is_before, 0, second)], axis=1)


def _columns(is_before, a):
    low, high = jnp.split(a, 2, axis=1)
    return jnp.concatenate([low, jnp.where(is_before, low, high)])


def _columns_back(is_before, a):
    first, second = jnp.split(a, 2)
    return jnp.concatenate([first + jnp.where(is_before, second, 0), jnp.where(is_before, 0, second)], axis=1)


def _keys(x):
    return x.k, x.v, x.key_decay, x.key_segment_ids, x.key_labels


def _step(form, x, keys, step):
    """What meets in a step, and whether the keys are of a device before this one."""
    is_before = lax.axis_index(sequence.AXIS) >= step
    queries = (x.q, x.decay, x.segment_ids, x.query_labels)
    if form.causal:
        queries = jax.tree.map(functools.partial(_rows, is_before), queries)
        keys = jax.tree.map(functools.partial(_columns, is_before), keys)
    q, decay, segment_ids, query_labels = queries
    k, v, key_decay, key_segment_ids, key_labels = keys
    return Inputs(q, k, v, None, decay, key_decay, segment_ids, key_segment_ids, query_labels, key_labels), is_before


def _sums(form, block_size, x) -> _Sums:
    (B, T, H, _), (S, G, V) = x.q.shape, x.v.shape[1:]
    _, y, *statistics = accumulate(form, 0, _sizes(block_size, T, S), x)
    return _Sums(
        from_blocks(y, (B, T, H, V), G), *(None if a is None else of_tokens(a, B, T, H, G) for a in statistics)
    )


def _merge(one: _Sums, other: _Sums) -> _Sums:
    if one.top is None:
        return _Sums(one.y + other.y, None, None)
    top = jnp.maximum(one.top, other.top)
    shrink, shrink_other = jnp.exp(one.top - top), jnp.exp(other.top - top)
    y = one.y * shrink[..., None] + other.y * shrink_other[..., None]
    return _Sums(y, top, one.total * shrink + other.total * shrink_other)


def _halves(a, axis):
    return (None, None) if a is None else jnp.split(a, 2, axis=axis)


def _merge_pieces(sums: _Sums, new: _Sums, is_before) -> _Sums:
    """Adds what `_rows` of the queries have seen in a step."""
    low, high = (_Sums(*parts) for parts in zip(*(_halves(a, 1) for a in sums)))
    first, second = (_Sums(*parts) for parts in zip(*(_halves(a, 0) for a in new)))
    where = lambda x, y: jax.tree.map(lambda x, y: jnp.where(is_before, x, y), x, y)
    high = _merge(high, first)
    low, high = where(_merge(low, second), low), where(high, _merge(high, second))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), low, high)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(form, block_size, x):
    """On each device, the output and the log-sum-exp of its queries."""
    return _ring_forward(form, block_size, x)[0]


def _ring_forward(form, block_size, x):
    whole = form._replace(causal=False)

    def step(carry, number):
        keys, sums = carry
        keys = _hand_on(keys)
        met, is_before = _step(form, x, keys, number)
        new = _sums(whole, block_size, met)
        sums = _merge_pieces(sums, new, is_before) if form.causal else _merge(sums, new)
        return (keys, sums), None

    steps = jnp.arange(1, sequence.ways())
    (_, (y, top, total)), _ = lax.scan(step, (_keys(x), _sums(form, block_size, x)), steps)
    log = None
    if top is not None:
        total = jnp.where(total > 0, total, 1.0)
        y, log = y / total[..., None], top + jnp.log(total)
    y, top, total = keep((y.astype(x.v.dtype), top, total))
    return (y, log), (x, y, top, total)


def _gradients(form, block_size, x, of_rows):
    y, top, total, *cotangents = of_rows
    T, (S, G) = x.q.shape[1], x.k.shape[1:3]
    sizes = _sizes(block_size, T, S)
    if top is not None:
        top, total = to_blocks(top, G, sizes[0]), to_blocks(total, G, sizes[0])
        total = jnp.where(total > 0, total, 1.0)  # of the rows that fill the last block
    return gradients(form, 0, sizes, (x, None, y, top, total), cotangents)


def _ring_backward(form, block_size, saved, cotangents):
    x, *of_rows = saved
    of_rows += cotangents
    whole = form._replace(causal=False)

    def step(carry, number):
        keys, of_keys, of_queries = carry
        keys, of_keys = _hand_on((keys, of_keys))
        met, is_before = _step(form, x, keys, number)
        rows = jax.tree.map(functools.partial(_rows, is_before), of_rows) if form.causal else of_rows
        found = _gradients(whole, block_size, met, rows)
        queries, keys_found = (found.q, found.decay), (found.k, found.v, found.key_decay)
        if form.causal:
            queries = jax.tree.map(functools.partial(_rows_back, is_before), queries)
            keys_found = jax.tree.map(functools.partial(_columns_back, is_before), keys_found)
        add = lambda one, other: jax.tree.map(jnp.add, one, other)
        return (keys, add(of_keys, keys_found), add(of_queries, queries)), None

    own = _gradients(form, block_size, x, of_rows)
    of_keys = own.k, own.v, own.key_decay
    start = (_keys(x), jax.tree.map(jnp.zeros_like, of_keys), (own.q, own.decay))
    (_, brought, (dq, ddecay)), _ = lax.scan(step, start, jnp.arange(1, sequence.ways()))
    dk, dv, dkey_decay = jax.tree.map(jnp.add, of_keys, _hand_on(brought))
    found = Inputs(dq, dk, dv, None, ddecay, dkey_decay, None, None, None, None)
    return (in_types_of(found, x),)


_ring.defvjp(_ring_forward, _ring_backward)

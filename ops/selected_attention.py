"""Attention to selected keys: each query chooses, by scores, few keys or few blocks of keys, and attends to these alone.

`select` finds the entries (keys, or summaries of blocks) with the greatest scores; no gradient goes through the choice.
`selected_attention` is the softmax over spans of keys, given where they begin. MoBA (arXiv 2502.13189), NSA (2502.11089) and DSA
(2512.02556) stand on the two. Both go over blocks of queries, and the backward pass computes each block again, so that for T
queries that see k of S keys memory is O(T k + S).

Of a form of `selected_attention`, "gathered" copies the keys of each query together and costs O(T k); "masked" multiplies every
query with every key, O(T S), which takes less where k is not few of S keys, see `are_few`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from common.errors import UserError
from ops import dispatch
from ops.attention_blocks import FLOOR, MASKED, exp_below
from ops.products import factor_dtype, product
from ops.rows import row_max
from ops.segments import expand, zero_padding


@dispatch.primitive("reference", "blockwise", matmul="blockwise")
def select(
    score: Callable[[Any, Any], Float[Array, "B C J N"]],
    queries: Any,
    keys: Any,
    count: int,
    *,
    places: Int[Array, "B T"],
    key_places: Int[Array, "B N"],
    segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B N"] | None = None,
    implementation: str = "auto",
    block_size: int | None = None,
) -> Int[Array, "B T J count"]:
    """The entries that each query scores highest among those of its segment whose place is not behind its own.

    Of entries with equal scores the one of the lower index is taken. An entry of infinite score is taken before all others.

    Args:
      score: of a block of queries and all entries: [batch, queries, J, N], where J is the number of choices of a query, such as
        its heads. NaN is not allowed. Only its order matters, and no gradient passes.
      queries: a tree of arrays [batch, T, ...], of which `score` is given some along T.
      keys: a tree of arrays, of which `score` is given all.
      count: number of entries to take.
      places: of the queries.
      key_places: of the entries.
      segment_ids: of the queries; 0 is padding, which takes nothing.
      key_segment_ids: of the entries, 0 for one that is nobody's; given with segment_ids.
      implementation: "reference" scores all queries at once and sorts; "blockwise" scores some at a time.
      block_size: their number; chosen by N if None.

    Returns:
      indices of entries by falling score, [batch, T, J, min(count, N)], -1 where there are no more to see.
    """
    B, N = key_places.shape
    if places.shape[0] != B or count < 0:
        raise ValueError(
            f"places {places.shape} do not fit key_places {key_places.shape}, or count {count} is negative"
        )
    count = min(count, N)
    chosen = dispatch.choose("select", implementation, "blockwise")
    queries, keys = jax.lax.stop_gradient((queries, keys))

    def one(block):
        queries, places, segment_ids = block
        visible = key_places[:, None] <= places[..., None]
        if segment_ids is not None:
            visible &= (segment_ids[..., None] == key_segment_ids[:, None]) & (segment_ids != 0)[..., None]
        visible = visible[:, :, None]
        s = jnp.where(visible, score(queries, keys), -jnp.inf)
        if chosen == "reference":
            index = jnp.argsort(s, axis=-1, descending=True, stable=True)[..., :count]
        else:
            index = top_k(s, count, ("batch", None, "heads"))[1]
        seen = jnp.take_along_axis(jnp.broadcast_to(visible, s.shape), index, axis=-1)
        return jnp.where(seen, index, -1).astype(jnp.int32)

    if chosen == "reference":
        block_size = places.shape[1]
    elif block_size is None:
        choices = jax.eval_shape(score, queries, keys).shape[2]
        block_size = max(1, min(128, 2**22 // (B * choices * N)))
    return over_queries(one, block_size, (queries, places, segment_ids))


@dispatch.primitive("reference", "masked", "gathered", matmul="gathered")
def selected_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    starts: Int[Array, "B T J N"],
    *,
    size: int = 1,
    causal: bool = True,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    query_offset: int | Int[Array, ""] = 0,
    implementation: str = "auto",
    block_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Softmax attention of each query to N spans of `size` keys, and the logarithm of its normaliser.

    A query sees of its spans the keys of its own segment, if causal those that are not behind it. One that sees none, such as
    padding, gives exactly 0 and the logarithm `ops.attention.NOTHING`. Scores, statistics and sums are float32 (float64 for
    float64 inputs). The pair may be given to `ops.attention.merge` and `add_sinks`.

    Args:
      q: queries [batch, T, heads, K].
      k, v: keys [batch, S, key heads, K] and values. Query head h reads key head h // (heads / key heads).
      starts: index of the first key of each span, negative for none: [batch, T, J, N] with J of 1 (the same for all heads), the
        key heads, or the heads. The spans of a query must not overlap. One that begins behind all keys, which is that of a query
        in a buffer that is full, has the last of them, whose value says so.
      size: keys of a span.
      causal: keys to the right of the query are not seen; query i sits at key index query_offset + i.
      scale: factor of q.k, K**-0.5 by default.
      segment_ids: segments of the queries, and of the keys unless key_segment_ids is given; 0 is padding.
      key_segment_ids: segments of the keys, where they differ.
      query_offset: an integer, or a traced int32 scalar (decoding into a buffer of keys and values).
      implementation: "reference" has a mask [T, S]; "masked" and "gathered" as above.
      block_size: queries at a time; chosen by the number of keys if None.

    Returns:
      y [batch, T, heads, V] in v's dtype, and the logarithms [batch, T, heads] in float32. Both may be differentiated.

    Raises:
      ValueError: if shapes do not fit together.
      UserError: for heads that are no multiple of the key heads.
    """
    (B, T, H, K), (S, G), (J, N) = q.shape, k.shape[1:3], starts.shape[2:]
    if k.shape != (B, S, G, K) or v.shape[:3] != (B, S, G) or starts.shape[:2] != (B, T) or size < 1:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape} and starts {starts.shape} of {size} do not fit together"
        )
    if H % G:
        raise UserError(f"the number of query heads must be a multiple of the number of key heads: {H} and {G}")
    if J not in (1, G, H):
        raise ValueError(f"starts {starts.shape} must be of 1, of {G} or of {H} heads")
    if segment_ids is not None:
        key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
        q = zero_padding(q, segment_ids)
        if T > 1:  # of a single query that would copy the buffer, whose padding is 0
            k, v = zero_padding(k, key_segment_ids), zero_padding(v, key_segment_ids)
    size, starts = min(size, S), jnp.minimum(starts, S - 1)
    seen = N * size
    copies = T == 1 or are_few(seen, S)
    chosen = dispatch.choose("selected_attention", implementation, "gathered" if copies else "masked")
    scale = K**-0.5 if scale is None else scale
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [B, G, S, ...]
    # Of a group's R heads, X choose each for itself, and Y together.
    R = H // G
    X, Y = (R, 1) if J == H else (1, R)
    q = q.reshape(B, T, G, X, Y, K)
    starts = jnp.broadcast_to(starts, (B, T, G * X if J == H else G, N)).reshape(B, T, G, X, N)
    place = jnp.broadcast_to(query_offset + jnp.arange(T, dtype=jnp.int32), (B, T))

    if chosen == "reference":
        block_size = T
    elif block_size is None:
        per_query = H * S if chosen == "masked" else G * X * seen * (K + v.shape[-1])
        block_size = max(1, min(128, 2**22 // (B * per_query)))
    form = functools.partial(_gathered if chosen == "gathered" else _masked, size, causal, scale)

    def run(*arrays):
        return over_queries(functools.partial(form, arrays[:3]), block_size, arrays[3:])

    # Of a mesh, each device has its own rows and heads: the gradient of keys that heads share is summed when it is that of keys,
    # and not that of what each query has gathered.
    rows, groups, heads = ("batch",), ("batch", "kv_heads"), ("batch", None, "kv_heads", "heads", "heads")
    axes = (groups, groups, rows, heads, heads[:4], rows, rows)
    y, log = dispatch.local(run, axes, (heads, heads))(k, v, key_segment_ids, q, starts, place, segment_ids)
    return y.reshape(B, T, H, -1), log.reshape(B, T, H)


def _masked(size, causal, scale, keys, queries):
    k, v, key_segment_ids = keys
    q, starts, place, segment_ids = queries
    S = k.shape[2]
    visible = marked(starts, S, size)[..., None, :]
    cols = jnp.arange(S, dtype=jnp.int32)
    visible &= _may_see(cols[None, None], place[..., None], causal, S)[:, :, None, None, None]
    if segment_ids is not None:
        same = (segment_ids[..., None] == key_segment_ids[:, None]) & (segment_ids != 0)[..., None]
        visible &= same[:, :, None, None, None]
    return _attend(scale, q, k, v, visible, ("bcgxyk,bgsk->bcgxys", "bcgxys,bgsv->bcgxyv"))


def _gathered(size, causal, scale, keys, queries):
    k, v, key_segment_ids = keys
    q, starts, place, segment_ids = queries
    S = k.shape[2]
    # A span that would end behind the last key is moved, and what is before its start is then not seen.
    first = jnp.clip(starts, 0, S - size)
    slots = first[..., None] + jnp.arange(size, dtype=jnp.int32)
    visible = (starts >= 0)[..., None] & (slots >= starts[..., None]) & (slots < (starts + size)[..., None])
    visible &= _may_see(slots, expand(place, slots.ndim), causal, S)
    if segment_ids is not None:
        ids = expand(segment_ids, slots.ndim)
        visible &= (_at(key_segment_ids, slots) == ids) & (ids != 0)
    visible = visible.reshape(*starts.shape[:4], 1, -1)
    k_of, v_of = (_spans(a, first, size) for a in (k, v))
    return _attend(scale, q, k_of, v_of, visible, ("bcgxyk,bcgxmk->bcgxym", "bcgxym,bcgxmv->bcgxyv"))


def _attend(scale, q, k, v, visible, products):
    """q [B, C, G, X, Y, K]; k, v and visible [B, C, G, X, 1, M] as `products` has them."""
    s = jnp.where(visible, scale * product(products[0], q, k, factor_dtype(q, k)), MASKED)
    top = jnp.maximum(row_max(s), FLOOR)[..., None]
    p = exp_below(s, top)
    total = jnp.sum(p, axis=-1, keepdims=True)
    total = jnp.where(total > 0, total, 1.0)
    y = product(products[1], p, v, factor_dtype(v)) / total
    return y.astype(v.dtype), (top + jnp.log(total))[..., 0]


def top_k(
    s: Shaped[Array, "*L N"], count: int, axes: dispatch.Axes
) -> tuple[Shaped[Array, "*L count"], Int[Array, "*L count"]]:
    """`jax.lax.top_k` where the rows are: a partitioner gathers what it sorts. `axes` are the logical names of the first axes."""
    return dispatch.local(lambda s: tuple(jax.lax.top_k(s, count)), [axes], (axes, axes))(s)


def are_few(chosen: int, keys: int) -> bool:
    """Whether to copy the chosen keys of each query takes less than to multiply it with all keys: on a CPU by the time, elsewhere
    by the bytes that a GPU moves (`benchmarks.compiled_ops`; a TPU puts gradients of copies back in a loop over them)."""
    return keys > (6 if dispatch.on_cpu() else 16) * chosen


def marked(starts: Int[Array, "*L N"], keys: int, size: int = 1) -> Bool[Array, "*L {keys}"]:
    """Which of the keys are in N spans of `size`, given where these begin; negative for none."""
    *shape, N = starts.shape
    rows = jnp.arange(starts.size // N)[:, None]
    flat = starts.reshape(-1, N)
    first = jnp.where(flat < 0, keys, flat)  # what is behind the last key is dropped
    marks = jnp.zeros((len(rows), keys), jnp.int32).at[rows, first].add(1, mode="drop")
    if size > 1:
        behind = jnp.where(flat < 0, keys, flat + size)
        marks = jnp.cumsum(marks.at[rows, behind].add(-1, mode="drop"), axis=-1)
    return (marks > 0).reshape(*shape, keys)


def group_scores(q: Float[Array, "B C H K"], k: Float[Array, "B N G K"]) -> Float[Array, "B C H N"]:
    """q_h . k_g of each query head h and its key head g = h // (H / G), in float32 (float64 for float64 inputs)."""
    wide = jnp.promote_types(jnp.result_type(q, k), jnp.float32)
    (B, C, H, K), (N, G) = q.shape, k.shape[1:3]
    q = q.reshape(B, C, G, H // G, K)
    s = jnp.einsum("bcgrk,bngk->bcgrn", q.astype(wide), k.astype(wide), precision=jax.lax.Precision.HIGHEST)
    return s.reshape(B, C, H, N)


def chosen_starts(starts: Int[Array, "B N"], chosen: Int[Array, "B T J count"]) -> Int[Array, "B T J count"]:
    """Where the entries begin that `select` found; -1 where it found none."""
    return jnp.where(chosen < 0, -1, _at(starts, chosen))


def over_queries(f: Callable[[Any], Any], size: int, trees: Any) -> Any:
    """f of `size` queries at a time, computed again in the backward pass.

    Args:
      f: of a tree of arrays [B, size, ...], to a tree of arrays [B, size, ...].
      size: number of queries; those behind the last are zeros.
      trees: of arrays [B, T, ...].

    Returns:
      what f returns of all queries, [B, T, ...].
    """
    T = jax.tree.leaves(trees)[0].shape[1]
    if size >= T:
        return jax.checkpoint(f, prevent_cse=False)(trees)
    blocks = -(-T // size)

    def split(a):
        a = jnp.pad(a, ((0, 0), (0, blocks * size - T)) + ((0, 0),) * (a.ndim - 2))
        return jnp.swapaxes(a.reshape(a.shape[0], blocks, size, *a.shape[2:]), 0, 1)

    found = jax.lax.map(jax.checkpoint(f, prevent_cse=False), jax.tree.map(split, trees))
    join = lambda a: jnp.swapaxes(a, 0, 1).reshape(a.shape[1], blocks * size, *a.shape[3:])[:, :T]
    return jax.tree.map(join, found)


def spans(a: Shaped[Array, "B S ..."], starts: Int[Array, "B N"], size: int) -> Shaped[Array, "B N size ..."]:
    """N spans of `size` neighbours along the length of each row; one that would leave the row is moved into it."""
    return jax.vmap(lambda a, starts: jax.vmap(lambda i: jax.lax.dynamic_slice_in_dim(a, i, size))(starts))(a, starts)


def _at(a, index):
    """a [B, N] at index [B, ...], each row in itself."""
    return jax.vmap(lambda a, index: a[index])(jnp.asarray(a), index)


def _spans(a, starts, size):
    """[B, G, S, K] at [B, C, G, X, N]: the spans of each query behind each other, [B, C, G, X, N * size, K]."""
    B, C, G, X, N = starts.shape
    at = jnp.swapaxes(starts, 1, 2).reshape(B, G, C * X * N)
    found = jax.vmap(lambda a, at: spans(a, at, size))(a, at)
    return jnp.swapaxes(found.reshape(B, G, C, X, N * size, -1), 1, 2)


def _may_see(slots, place, causal, S):
    return slots <= place if causal else slots < S

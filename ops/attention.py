"""Attention: y_i = sum_j f(scale q_i.k_j + b_ij) v_j over the keys j that query i may see.

`attention` gives y. `attention_with_logsumexp` gives also log sum_j exp(s_ij) of each query, with which `merge` joins
softmax attentions to disjoint sets of keys into the one to their union: sparse patterns are such unions.
`ops.attention_blocks` computes them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from common.errors import UserError
from ops import dispatch, ring_attention, splash_attention
from ops.attention_blocks import (
    FLOOR,
    Form,
    Inputs,
    block_length,
    blockwise,
    by_queries,
    check_activation,
    distances,
    visible,
)
from ops.segments import fill_padding, zero_padding

# The log-sum-exp of a query that sees no key; that of any other is higher.
NOTHING = FLOOR

# The longest window: more than the keys of any sequence, and so short that sums of indices and windows are int32.
_WINDOW = 2**30


@dispatch.primitive("reference", "blockwise", "library", matmul="blockwise", tpu=("splash",))
def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    activation: str = "softmax",
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    score_cap: float | None = None,
    slopes: Float[Array, "H"] | None = None,
    decay: Float[Array, "B T H"] | None = None,
    key_decay: Float[Array, "B S H"] | None = None,
    mask: Callable[[Any, Any], Array] | None = None,
    query_labels: Any = None,
    key_labels: Any = None,
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
      activation: f. "softmax" over the visible keys, or without a normaliser "relu", "relu2", max(s, 0)^2 (arXiv
        2202.10447), or "laplace" (arXiv 2209.10655); these are masked after f.
      causal: keys to the right of the query are not seen.
      window: of the keys, those in (i - window, i] if causal, else those with |i - j| <= window // 2.
      scale: factor of q.k, K**-0.5 by default.
      score_cap: c of s = c tanh(scale q.k / c), before slopes and masks (Gemma 2, arXiv 2408.00118); None for none.
      slopes: ALiBi (arXiv 2108.12409): adds -slope * (i - j) to the scores of each head, |i - j| if not causal.
      decay: a running sum c of log-decays up to each query's token: adds c_i - c_j to the scores (FoX, arXiv 2503.02130). In
        float32 the rounding of c moves a weight by 6e-8 |c| of itself.
      key_decay: the same sum of each key's token, for each query head; by default that of the queries.
      mask: any further pattern, `mask(query label, key label) -> seen`. It is called block by block with labels that
        broadcast against each other, and holds no arrays of its own. It is evaluated for every pair that `causal` and
        `window` leave; with segments and no window, blocks in which it hides everything are then left out.
      query_labels: what `mask` is told of each query: an integer array [batch, T] or [batch, T, heads], or a tree of
        such arrays; the query's index query_offset + i by default.
      key_labels: the same of the keys, [batch, S] or [batch, S, key heads]; by default query_labels, or the key's index
        if there are none.
      segment_ids: segments of the queries, and of the keys unless key_segment_ids is given; 0 is padding.
      key_segment_ids: segments of the keys, where they differ from the queries'.
      query_offset: an integer, or a traced int32 scalar (decoding into a buffer of keys and values). A single query at a traced
        offset multiplies padding by 0 instead of leaving it out, which would copy the buffer: there it must be finite.
      implementation: "reference" holds all scores; "blockwise" is linear in memory (with a traced query_offset it
        goes over blocks of queries, each against all keys); "library" is `jax.nn.dot_product_attention`, cuDNN for
        16-bit types on a GPU, offered for the softmax without cap, slopes, decay or mask, K equal to V and query_offset 0;
        "splash" is a TPU kernel (`ops.splash_attention`), interpreted elsewhere, offered for the softmax without slopes, decay or
        mask, q, k and v of one type, bfloat16 or float32, and queries that see their own keys: T equal to S, query_offset 0,
        no key_segment_ids. "auto" is the one of these two that the platform has a kernel for, and else blockwise.
      block_size: rows and columns of a block; chosen by length if None.

    Returns:
      [batch, T, heads, V] in v's dtype.

    Raises:
      ValueError: if shapes or options do not fit together.
      UserError: for an unknown activation, a window or blocks below 1, or heads that are no multiple of the key heads.
    """
    labels = (query_labels, key_labels)
    _check(q, k, v, activation, window, score_cap, slopes, mask, labels, segment_ids, key_segment_ids, block_size)
    key_decay = _check_decay(q, k, decay, key_decay)
    form = Form(activation, causal, _window(window), _scale(q, scale), score_cap, mask)
    x = _inputs(q, k, v, slopes, (decay, key_decay), segment_ids, key_segment_ids, query_offset, form, labels)
    zero = isinstance(query_offset, int | np.integer) and query_offset == 0
    split = zero and ring_attention.takes(form, x)
    library = (
        zero and not split and slopes is None and decay is None and mask is None and _library_takes(form, x.q, x.k, x.v)
    )
    splash = zero and splash_attention.takes(form, x)
    offered = ("reference", "blockwise") + ("library",) * library + ("splash",) * splash
    # Segments reach cuDNN as a [T, S] mask, which moderate lengths can afford.
    moderate = segment_ids is None or q.shape[1] * k.shape[1] <= 2048**2
    policy = "blockwise"
    if library and _cudnn_takes(form, x.q, x.k, segment_ids) and moderate:
        policy = "library"
    elif splash and dispatch.current_platform() == "tpu" and q.shape[1] >= splash_attention.LANES:
        policy = "splash"
    chosen = dispatch.choose("attention", implementation, policy, offered)
    if split and chosen == "blockwise":
        return ring_attention.over_shards(form, x, block_size)[0]
    if chosen == "splash":
        return splash_attention.over_heads(form, x, block_size)
    return _library(form, x) if chosen == "library" else _portable(chosen, form, x, query_offset, block_size)[0]


@dispatch.primitive("reference", "blockwise", matmul="blockwise")
def attention_with_logsumexp(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    score_cap: float | None = None,
    slopes: Float[Array, "H"] | None = None,
    decay: Float[Array, "B T H"] | None = None,
    key_decay: Float[Array, "B S H"] | None = None,
    mask: Callable[[Any, Any], Array] | None = None,
    query_labels: Any = None,
    key_labels: Any = None,
    segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    query_offset: int | Int[Array, ""] = 0,
    implementation: str = "auto",
    block_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Softmax attention and the logarithm of its normaliser; arguments as of `attention`.

    Returns:
      y [batch, T, heads, V] in v's dtype, and log sum_j exp(s_ij) over the keys that each query sees, [batch, T, heads] in
      float32 (float64 for float64 inputs), `NOTHING` where it sees none. Both may be differentiated.

    Raises:
      ValueError: if shapes or options do not fit together.
    """
    labels = (query_labels, key_labels)
    _check(q, k, v, "softmax", window, score_cap, slopes, mask, labels, segment_ids, key_segment_ids, block_size)
    key_decay = _check_decay(q, k, decay, key_decay)
    form = Form("softmax", causal, _window(window), _scale(q, scale), score_cap, mask)
    x = _inputs(q, k, v, slopes, (decay, key_decay), segment_ids, key_segment_ids, query_offset, form, labels)
    chosen = dispatch.choose("attention_with_logsumexp", implementation, "blockwise")
    zero = isinstance(query_offset, int | np.integer) and query_offset == 0
    if zero and chosen == "blockwise" and ring_attention.takes(form, x):
        y, log = ring_attention.over_shards(form, x, block_size)
    else:
        y, log = _portable(chosen, form, x, query_offset, block_size)
    return y, fill_padding(log, segment_ids, NOTHING)


def merge(
    parts: Sequence[tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """The softmax attention to the union of disjoint sets of keys, from that to each of the sets.

    Args:
      parts: for each set, what `attention_with_logsumexp` returned. A key that is in two of them counts twice.

    Returns:
      the same pair for the union.
    """
    logs = jnp.stack([log for _, log in parts])
    top = jax.lax.stop_gradient(jnp.max(logs, axis=0))
    weights = jnp.exp(logs - top)
    total = jnp.sum(weights, axis=0)
    y = sum(w[..., None] * y for w, (y, _) in zip(weights / total, parts, strict=True))
    return y.astype(parts[0][0].dtype), top + jnp.log(total)


def add_sinks(
    y: Float[Array, "B T H V"], log: Float[Array, "B T H"], sinks: Float[Array, "H"]
) -> Float[Array, "B T H V"]:
    """The softmax attention whose normaliser has one key more for each head, of score `sinks` and value 0 (arXiv 2508.10925).

    Args:
      y, log: what `attention_with_logsumexp` or `merge` returned.
      sinks: the scores [heads].

    Returns:
      y * exp(log) / (exp(log) + exp(sinks)), in y's dtype; 0 where a query sees no key.
    """
    return (y * jax.nn.sigmoid(log - sinks.astype(log.dtype))[..., None]).astype(y.dtype)


def _inputs(q, k, v, slopes, decays, segment_ids, key_segment_ids, query_offset, form, labels):
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    decay, key_decay = decays
    q, decay = zero_padding(q, segment_ids), None if decay is None else zero_padding(decay, segment_ids)
    if q.shape[1] > 1 or isinstance(query_offset, int | np.integer):
        k, v = zero_padding(k, key_segment_ids), zero_padding(v, key_segment_ids)
        key_decay = None if key_decay is None else zero_padding(key_decay, key_segment_ids)
    queries, keys = labels
    if form.mask is not None:
        if queries is None:
            queries, keys = _places(q, query_offset), _places(k, 0) if keys is None else keys
        keys = queries if keys is None else keys
    return Inputs(q, k, v, slopes, decay, key_decay, segment_ids, key_segment_ids, queries, keys)


def _places(x, start):
    """The index of each token, of which the first is at `start`."""
    return jnp.broadcast_to(start + jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])


def _portable(chosen, form, x, query_offset, block_size):
    T, S = x.q.shape[1], x.k.shape[1]
    if chosen == "reference":
        return by_queries(form, T, x, query_offset)
    sizes = tuple(min(length, block_size or block_length(length)) for length in (T, S))
    if isinstance(query_offset, int | np.integer):
        return blockwise(form, int(query_offset), sizes, x)
    return by_queries(form, sizes[0], x, query_offset)


def _window(window):
    return None if window is None else min(window, _WINDOW)


def _scale(q, scale):
    return q.shape[3] ** -0.5 if scale is None else float(scale)


def _check(q, k, v, activation, window, score_cap, slopes, mask, labels, segment_ids, key_segment_ids, block_size):
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k and v must be [batch, length, heads, channels]: {q.shape}, {k.shape}, {v.shape}")
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    if k.shape != (B, S, G, K) or v.shape[:3] != (B, S, G):
        raise ValueError(f"q {q.shape} and v {v.shape} do not fit k {k.shape}: batch, length, key heads or K differ")
    if H % G:
        raise UserError(f"the number of query heads must be a multiple of the number of key heads: {H} and {G}")
    check_activation(activation)
    for name, value in (("window", window), ("block_size", block_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, or None: {value}")
    if score_cap is not None and not 0 < score_cap < math.inf:
        raise UserError(f"score_cap must be positive and finite, or None: {score_cap}")
    if slopes is not None and slopes.shape != (H,):
        raise ValueError(f"slopes must have one entry per query head, {(H,)}: {slopes.shape}")
    if segment_ids is None and key_segment_ids is not None:
        raise ValueError("key_segment_ids needs segment_ids: say which segment the queries belong to")
    if segment_ids is not None:
        keys = segment_ids if key_segment_ids is None else key_segment_ids
        if segment_ids.shape != (B, T) or keys.shape != (B, S):
            shapes = f"{segment_ids.shape} and {keys.shape}"
            raise ValueError(f"segment_ids must be {(B, T)}, and key_segment_ids (its default) {(B, S)}: {shapes}")
    if mask is None and any(x is not None for x in labels):
        raise ValueError("labels are what a mask reads: give `mask` with them")
    if labels[0] is not None and labels[1] is None and T != S:
        raise ValueError(f"key_labels are needed where there are not as many keys as queries: {S} and {T}")
    for x, length, heads in (
        (x, *size) for given, size in zip(labels, ((T, H), (S, G))) for x in jax.tree.leaves(given)
    ):
        if x.shape not in ((B, length), (B, length, heads)):
            raise ValueError(f"labels must be {(B, length)} or {(B, length, heads)}, or trees of these: {x.shape}")


def _check_decay(q, k, decay, key_decay):
    """The decay of the keys."""
    key_decay = decay if key_decay is None else key_decay
    (B, T, H), S = q.shape[:3], k.shape[1]
    if decay is None and key_decay is None:
        return None
    if decay is None or decay.shape != (B, T, H) or key_decay.shape != (B, S, H):
        shapes = f"{None if decay is None else decay.shape} and {key_decay.shape}"
        raise ValueError(f"decay must be {(B, T, H)}, and key_decay (its default) {(B, S, H)}: {shapes}")
    return key_decay


def _library_takes(form, q, k, v):
    """Whether `jax.nn.dot_product_attention` computes this form at all."""
    aligned = q.shape[1] == k.shape[1] or not (form.causal or form.window)
    return (
        form.activation == "softmax"
        and form.cap is None
        and aligned
        and v.shape == k.shape
        and q.dtype == k.dtype == v.dtype
    )


def _cudnn_takes(form, q, k, segment_ids):
    """Whether there is a fused kernel: 16-bit types, and no window to the right; masks need even lengths."""
    (_, T, _, K), S = q.shape, k.shape[1]
    fits = jnp.dtype(q.dtype).itemsize == 2 and K % 8 == 0 and K <= 128 and (form.causal or form.window is None)
    even = segment_ids is None or (T % 2 == 0 and S % 2 == 0)
    return dispatch.current_platform() == "gpu" and fits and even


def _library(form, x):
    T, S, mask, window = x.q.shape[1], x.k.shape[1], None, None
    if x.segment_ids is not None:
        cols = jnp.arange(S, dtype=jnp.int32)
        mask = visible(form, distances(form, 0, T, T, cols), cols < S, x)[:, None]
    if form.window is not None:
        window = (form.window - 1, 0) if form.causal else (form.window // 2, form.window // 2)
    backend = "cudnn" if _cudnn_takes(form, x.q, x.k, x.segment_ids) else "xla"
    options = {"scale": form.scale, "is_causal": form.causal, "local_window_size": window, "implementation": backend}
    y = jax.nn.dot_product_attention(x.q, x.k, x.v, mask=mask, **options)
    # The library spreads the weight of a query that sees no key over all keys.
    return y if mask is None else jnp.where(jnp.any(mask, axis=-1)[:, 0, :, None, None], y, 0)

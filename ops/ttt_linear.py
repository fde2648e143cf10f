"""Test-time training of a linear model: a matrix that is trained while the sequence is read, a mini-batch a step.

TTT-Linear (arXiv 2407.04620, section 2). Per head, with x~ = [x, 1], a matrix W [K + 1, K] (the last row is a bias), and the
loss of a token l(W; k, v) = |LN(k~ W) - (v - k)|^2 / 2:

    G_j = dl / d(k~_j W),  at the W_0 with which the mini-batch of j began
    W_i = W_0 - r_i sum_{j<=i} c_j k~_j^T G_j             j over the mini-batch of i, c_j of the token, r_i of its place
    y_i = q_i + LN(q~_i W_i)

The next mini-batch begins with the last W_i. Mini-batches are counted from the start of a segment.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ops import chunks, segments
from ops.chunks import matmul, transpose
from ops.products import factor_dtype

State = tuple[Float[Array, "B H K+1 K"], Float[Array, "B H K+1 K"]]


def ttt_linear(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H K"],
    token_rate: Float[Array, "B T H"],
    place_rate: Float[Array, "C"],
    weight: Float[Array, "H K+1 K"],
    norm_weight: Float[Array, "H K"],
    norm_bias: Float[Array, "H K"],
    *,
    eps: float = 1e-6,
    positions: Int[Array, "B T"] | None = None,
    initial_state: State | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H K"], State]:
    """Trains along axis 1.

    Args:
      q, k, v: test, training and label views of the tokens.
      token_rate: c, step size of each token.
      place_rate: r, factor of the step size for each place in a mini-batch; its length is that of the mini-batches.
      weight: W before the first token of a segment.
      norm_weight, norm_bias: of the LayerNorm.
      eps: of the LayerNorm.
      positions: position of each token in its segment; needed with a state, else counted from 0.
      initial_state: (W_0, sum_j c_j k~_j^T G_j) of the mini-batch that is going on; (weight, 0) by default.
      segment_ids: 0 is padding, a change restarts the state; see `ops.segments`.

    Returns:
      y in v's dtype, zero on padding, and the final state in float32 (float64 if any of q, k, v is).

    Raises:
      ValueError: if shapes disagree, or a state comes without positions.
    """
    batch, length, heads, size = q.shape
    if k.shape != q.shape or v.shape != q.shape or weight.shape != (heads, size + 1, size):
        raise ValueError(
            f"q, k and v must be [B, T, H, K] and weight [H, K+1, K], "
            f"not {q.shape}, {k.shape}, {v.shape} and {weight.shape}"
        )
    if initial_state is not None and positions is None:
        raise ValueError("a state needs the positions of its tokens")
    dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    factors = factor_dtype(q, k, v)
    place_rate, weight, norm_weight, norm_bias = (a.astype(dtype) for a in (place_rate, weight, norm_weight, norm_bias))
    aligned = segment_ids is None and initial_state is None
    if positions is None:
        positions = segments.positions(jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids)
    arrays = (q, k, v, token_rate[..., None])
    q, k, values, c = (segments.zero_padding(x, segment_ids).astype(dtype) for x in arrays)

    mini_batch = place_rate.shape[0]
    place = positions % mini_batch
    start = jnp.zeros(place.shape, bool) if segment_ids is None else segments.is_start(segment_ids)
    border = start | (place == 0)
    # A block of at most a mini-batch has at most one border inside a segment.
    xs = q, k, values, c, place_rate[place][..., None, None], start[..., None], border[..., None]
    xs = tuple(chunks.split(x, min(mini_batch, length)) for x in xs)
    start = (jnp.broadcast_to(weight, (batch, *weight.shape)), jnp.zeros((batch, *weight.shape), dtype))
    state = start if initial_state is None else tuple(s.astype(dtype) for s in initial_state)
    block = functools.partial(
        _block, factors, aligned, weight, place_rate[-1], norm_weight[:, None], norm_bias[:, None], eps
    )
    state, y = lax.scan(jax.checkpoint(block, prevent_cse=False), state, xs)
    return segments.zero_padding(chunks.join(y, length), segment_ids).astype(v.dtype), state


def _block(factors, aligned, fresh_W, last_rate, norm_weight, norm_bias, eps, state, x):
    """A block [B, H, C, ...] of tokens.

    The runs of a block are the tokens of one mini-batch: the first goes on with the mini-batch in the state, the second is
    the next one of the same segment, and all others are the first of segments that begin here. Training is in float32; what a
    query reads is made by products of `factors`.
    """
    W, A = state
    q, k, v, c, r, start, border = x
    ones = jnp.ones_like(q[..., :1])
    one_q, one_k = jnp.concatenate([q, ones], -1), jnp.concatenate([k, ones], -1)
    read = lambda W: matmul(one_q, W, factors)
    scores = jnp.tril(read(transpose(one_k)))

    def gradient(W):
        return _gradient(matmul(one_k, W), v - k, norm_weight, norm_bias, eps)

    def written(G, where=1):
        return matmul(transpose(where * c * one_k), G)

    if aligned:
        W = W - last_rate * A
        G = gradient(W)
        z, A = read(W), written(G)
    else:
        run = jnp.cumsum(border, -1)
        first = (run == 0)[..., None]
        fresh = (jnp.cumsum(start, -1) > 0)[..., None]
        is_last = first[..., -1:, :], fresh[..., -1:, :]
        G = gradient(W)
        next_W = W - last_rate * (A + written(G, first))
        G = _pick(first, fresh, G, gradient(next_W), gradient(fresh_W))
        going_on = read(W) - r * read(A)
        z = _pick(first, fresh, going_on, read(next_W), read(fresh_W))
        scores = jnp.where(run[..., :, None] == run[..., None, :], scores, 0)
        A = jnp.where(is_last[0], A, 0) + written(G, (run == run[..., -1:])[..., None])
        W = _pick(*is_last, W, next_W, fresh_W)
    z = z - r * matmul(scores, c * G, factors)
    normal, _ = _normalize(z, eps)
    return (W, A), q + norm_weight * normal + norm_bias


def _pick(first, fresh, going_on, following, begun):
    """What belongs to the mini-batch of each token: the one of the state, the next of its segment, or one begun here."""
    return jnp.where(first, going_on, jnp.where(fresh, begun, following))


def _normalize(z, eps):
    z = z - jnp.mean(z, -1, keepdims=True)
    scale = lax.rsqrt(jnp.mean(jnp.square(z), -1, keepdims=True) + eps)
    return z * scale, scale


def _gradient(z, target, norm_weight, norm_bias, eps):
    """The derivative of |LN(z) - target|^2 / 2 by z."""
    normal, scale = _normalize(z, eps)
    d = norm_weight * (norm_weight * normal + norm_bias - target)
    return scale * (d - jnp.mean(d, -1, keepdims=True) - normal * jnp.mean(normal * d, -1, keepdims=True))

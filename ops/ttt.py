"""Test-time training in mini-batches: a small network that is trained while the sequence is read, a mini-batch a step.

TTT-Linear and TTT-MLP (arXiv 2407.04620, section 2). Per head, with x~ = [x, 1], matrices W_l [I_l + 1, O_l] (the last row is a
bias), the network z_1 = x~ W_1, z_{l+1} = gelu(z_l)~ W_{l+1} that ends in z(x; W), and the loss of a token
l(W; k, v) = |LN(z(k; W)) - (v - k)|^2 / 2:

    G_j = dl / dW, at the W_0 with which the mini-batch of j began
    W_i = W_0 - r_i sum_{j<=i} c_j G_j                    j over the mini-batch of i, c_j of the token, r_i of its place
    y_i = q_i + LN(z(q_i; W_i))

The next mini-batch begins with the last W_i. Mini-batches are counted from the start of a segment. No W_i is made: the derivative
by W_l is a product x~_j^T g_j of what the layer reads and the derivative by what it gives, so that x~_i W_i is
x~_i W_0 - r_i sum_j c_j (x~_i . x~_j) g_j (the paper's dual form, layer by layer).
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ops import chunks, dispatch, kept, segments
from ops.chunks import matmul, transpose
from ops.products import factor_dtype

Matrices = tuple[Float[Array, "..."], ...]
State = tuple[Matrices, Matrices]  # of each layer [B, H, I + 1, O]


def ttt(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H K"],
    token_rate: Float[Array, "B T H"],
    place_rate: Float[Array, "C"],
    weights: Sequence[Float[Array, "H _I _O"]],
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
      weights: W_l before the first token of a segment, for each layer, the first from K + 1 and the last to K channels.
      norm_weight, norm_bias: of the LayerNorm.
      eps: of the LayerNorm.
      positions: position of each token in its segment; needed with a state, else counted from 0.
      initial_state: (W_0, sum_j c_j G_j) of the mini-batch that is going on, of each layer; (weights, 0) by default.
      segment_ids: 0 is padding, a change restarts the state; see `ops.segments`.

    Returns:
      y in v's dtype, zero on padding, and the final state in float32 (float64 if any of q, k, v is).

    Raises:
      ValueError: if shapes disagree, or a state comes without positions.
    """
    batch, length, heads, size = q.shape
    channels = [size, *(w.shape[-1] for w in weights)]
    shapes = [(heads, i + 1, o) for i, o in itertools.pairwise(channels)]
    if k.shape != q.shape or v.shape != q.shape or [w.shape for w in weights] != shapes or channels[-1] != size:
        raise ValueError(
            "q, k and v must be [B, T, H, K] and the weights [H, K+1, I], ..., [H, J+1, K], "
            f"not {q.shape}, {k.shape}, {v.shape} and {', '.join(str(w.shape) for w in weights)}"
        )
    if initial_state is not None and positions is None:
        raise ValueError("a state needs the positions of its tokens")
    dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    factors = factor_dtype(q, k, v)
    place_rate, norm_weight, norm_bias = (a.astype(dtype) for a in (place_rate, norm_weight, norm_bias))
    weights = tuple(w.astype(dtype) for w in weights)
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
    if initial_state is None:
        state = tuple(jnp.broadcast_to(w, (batch, *w.shape)) for w in weights)
        state = state, tuple(jnp.zeros_like(w) for w in state)
    else:
        state = jax.tree.map(lambda s: s.astype(dtype), initial_state)
    heads, rows, of_blocks = ("heads",), ("batch", "heads"), (None, "batch", "heads")
    run = dispatch.local(
        functools.partial(_blocks, factors, aligned, eps), [heads, (), heads, rows, of_blocks], (rows, of_blocks)
    )
    final, y = run(weights, place_rate[-1], (norm_weight[:, None], norm_bias[:, None]), state, xs)
    final = segments.unless_empty(final, state, segment_ids)
    return segments.zero_padding(chunks.join(y, length), segment_ids).astype(v.dtype), final


def _blocks(factors, aligned, eps, fresh, last_rate, norm, state, xs):
    """All blocks, one after the other; of a mesh, on the rows and heads of a device alone: gradients of what rows share are then
    summed over the devices once, and not in the loop."""
    return kept.scan(functools.partial(_block, factors, aligned, fresh, last_rate, (*norm, eps)), state, xs)


def _block(factors, aligned, fresh, last_rate, norm, state, x):
    """A block [B, H, C, ...] of tokens.

    The runs of a block are the tokens of one mini-batch: the first goes on with the mini-batch in the state, the second is
    the next one of the same segment, and all others are the first of segments that begin here. Training is in float32; what a
    query reads is made by products of `factors`.
    """
    weights, sums = state
    q, k, v, c, r, start, border = x
    train = lambda weights: _train(weights, k, v - k, norm)
    written = lambda read, gradient, where=1: matmul(transpose(where * c * read), gradient)
    if aligned:
        weights = tuple(W - last_rate * A for W, A in zip(weights, sums))
        reads, gradients = train(weights)
    else:
        run = jnp.cumsum(border, -1)
        first, begun = (run == 0)[..., None], (jnp.cumsum(start, -1) > 0)[..., None]
        reads, gradients = train(weights)
        following = tuple(
            W - last_rate * (A + written(read, gradient, first))
            for W, A, read, gradient in zip(weights, sums, reads, gradients)
        )
        pick = functools.partial(_pick, first, begun)
        reads, gradients = jax.tree.map(pick, (reads, gradients), train(following), train(fresh))
    u = q
    for i, (W, A, read, gradient) in enumerate(zip(weights, sums, reads, gradients)):
        one = _with_one(u)
        given = lambda W, one=one: matmul(one, W, factors)
        scores = jnp.tril(given(transpose(read)))
        if aligned:
            z = given(W)
        else:
            z = pick(given(W) - r * given(A), given(following[i]), given(fresh[i]))
            scores = jnp.where(run[..., :, None] == run[..., None, :], scores, 0)
        z = z - r * matmul(scores, c * gradient, factors)
        u = jax.nn.gelu(z)
    if aligned:
        sums = tuple(map(written, reads, gradients))
    else:
        ends = first[..., -1:, :], begun[..., -1:, :]
        here = (run == run[..., -1:])[..., None]
        sums = tuple(
            jnp.where(ends[0], A, 0) + written(read, gradient, here)
            for A, read, gradient in zip(sums, reads, gradients)
        )
        weights = tuple(_pick(*ends, *W) for W in zip(weights, following, fresh))
    norm_weight, norm_bias, eps = norm
    normal, _ = _normalize(z, eps)
    return (weights, sums), q + norm_weight * normal + norm_bias


def _train(weights, k, target, norm):
    """Of each layer what it reads of the tokens, and the derivative of their loss by what it gives."""
    reads, slopes = [_with_one(k)], []
    for W in weights[:-1]:
        u, slope = jax.vjp(jax.nn.gelu, matmul(reads[-1], W))
        reads.append(_with_one(u))
        slopes.append(slope)
    gradients = [_gradient(matmul(reads[-1], weights[-1]), target, *norm)]
    for W, slope in zip(weights[:0:-1], slopes[::-1]):
        gradients.append(*slope(matmul(gradients[-1], transpose(W[..., :-1, :]))))
    return reads, gradients[::-1]


def _with_one(x):
    return jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)


def _pick(first, begun, going_on, following, fresh):
    """What belongs to the mini-batch of each token: the one of the state, the next of its segment, or one begun here."""
    return jnp.where(first, going_on, jnp.where(begun, fresh, following))


def _normalize(z, eps):
    z = z - jnp.mean(z, -1, keepdims=True)
    scale = lax.rsqrt(jnp.mean(jnp.square(z), -1, keepdims=True) + eps)
    return z * scale, scale


def _gradient(z, target, norm_weight, norm_bias, eps):
    """The derivative of |LN(z) - target|^2 / 2 by z."""
    normal, scale = _normalize(z, eps)
    d = norm_weight * (norm_weight * normal + norm_bias - target)
    return scale * (d - jnp.mean(d, -1, keepdims=True) - normal * jnp.mean(normal * d, -1, keepdims=True))

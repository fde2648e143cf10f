"""Test-time training in large chunks: a gated network that is trained while the sequence is read (LaCT, arXiv 2505.23884).

Per head, with weights W = (W_0, W_1, W_2) and f(x; W) = (silu(x W_0) * (x W_2)) W_1,

    y_i = f(q_i; W)                              with the W at the start of i's chunk
    G = sum_j rate_j d (f(k_j; W) . v_j) / dW    over the chunk, a rate for each token and matrix
    D <- G + m D                                 m: mean over the chunk of a number for each token
    W <- W + D, or W + orthogonal(D)             then each column is scaled to the norm that it had at first

Chunks are counted from the start of a segment. The step at the end of a chunk is taken when the next one begins.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ops import chunks, dispatch, kept, segments
from ops.chunks import matmul, transpose
from ops.products import factor_dtype

# Five steps of Newton-Schulz (Muon) as in the authors' code, a X + (b A + c A^2) X with A = X X^T.
_NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


class FastWeights(NamedTuple):
    """A number for each weight of the network, of every head."""

    w_0: Float[Array, "*B H K M"]
    w_1: Float[Array, "*B H M V"]
    w_2: Float[Array, "*B H K M"]


class State(NamedTuple):
    """What a chunk leaves to its next token: the weights at its start, the last step D, G and the sum of m so far."""

    weights: FastWeights
    step: FastWeights
    gradient: FastWeights
    momentum: Float[Array, "B H"]


def empty_state(weights: FastWeights, batch: int) -> State:
    """The state before the first token of a segment, in float32 (float64 if the weights are)."""
    dtype = jnp.result_type(*weights, jnp.float32)
    weights = jax.tree.map(lambda w: jnp.broadcast_to(w.astype(dtype), (batch, *w.shape)), weights)
    nothing = jax.tree.map(jnp.zeros_like, weights)
    return State(weights, nothing, nothing, jnp.zeros((batch, weights.w_0.shape[1]), dtype))


def large_chunk_ttt(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    rates: Float[Array, "B T H 3"],
    momentum: Float[Array, "B T H"],
    weights: FastWeights,
    *,
    chunk_size: int,
    orthogonal: bool = True,
    positions: Int[Array, "B T"] | None = None,
    initial_state: State | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H V"], State]:
    """Trains along axis 1.

    Args:
      q, k, v: what the network is read with, and what it is trained to map.
      rates: step sizes of each token for W_0, W_1 and W_2.
      momentum: m of each token.
      weights: W before the first token of a segment.
      chunk_size: tokens between two steps.
      orthogonal: whether the singular values of a step are made equal, about 1 (Muon).
      positions: position of each token in its segment; needed with a state, else counted from 0.
      initial_state: from `empty_state` or the piece before.
      segment_ids: 0 is padding, a change restarts the state; see `ops.segments`.

    Returns:
      y in v's dtype, zero on padding, and the final state, float32 (float64 if any of q, k, v is). Training is in this type; what
      a query reads is made by products of the inputs' type. The scan over chunks keeps the state at the start of each for the
      backward pass.

    Raises:
      ValueError: if shapes disagree, or a state comes without positions.
    """
    (batch, length, heads, size), values = q.shape, v.shape[3]
    if k.shape != q.shape or v.shape[:3] != q.shape[:3] or rates.shape != (*q.shape[:3], 3):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} and rates {rates.shape} do not fit together")
    hidden = weights.w_0.shape[-1]
    shapes = ((heads, size, hidden), (heads, hidden, values), (heads, size, hidden))
    if tuple(w.shape for w in weights) != shapes:
        raise ValueError(f"the weights must be {shapes}, got {tuple(w.shape for w in weights)}")
    if initial_state is not None and positions is None:
        raise ValueError("a state needs the positions of its tokens")
    dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    apply = functools.partial(_apply, factor_dtype(q, k, v))
    as_wide = functools.partial(jax.tree.map, lambda a: a.astype(dtype))
    weights = as_wide(weights)
    state = as_wide(empty_state(weights, batch) if initial_state is None else initial_state)
    arrays = (q, k, v, rates, momentum[..., None])
    xs = tuple(segments.zero_padding(a, segment_ids).astype(dtype) for a in arrays)
    block_size = min(chunk_size, length)
    step = functools.partial(_step, orthogonal, chunk_size)
    if segment_ids is None and initial_state is None:
        block = functools.partial(_aligned_block, step, apply)
        xs = (*(chunks.split(x, block_size) for x in xs), jnp.arange(-(-length // block_size)))
    else:
        if positions is None:
            positions = segments.positions(segment_ids)
        begin = positions == 0
        if segment_ids is not None:
            begin |= segments.is_start(segment_ids)
        block = functools.partial(_block, step, apply)
        flags = (begin, begin | (positions % chunk_size == 0))
        xs = tuple(chunks.split(x, block_size) for x in (*xs, *(flag[..., None] for flag in flags)))
    heads, rows, of_blocks = ("heads",), ("batch", "heads"), (None, "batch", "heads")
    run = dispatch.local(functools.partial(_blocks, block), [heads, rows, of_blocks], (rows, of_blocks))
    final, y = run(weights, state, xs)
    final = segments.unless_empty(final, state, segment_ids)
    return segments.zero_padding(chunks.join(y, length), segment_ids).astype(v.dtype), final


def _blocks(block, fresh, state, xs):
    """All blocks, one after the other; of a mesh, on the rows and heads of a device alone: the gradient of the first weights is
    then summed over the devices once, and not in the loop."""
    return kept.scan(functools.partial(block, fresh, _norms(fresh)), state, xs)


def _aligned_block(step, apply, fresh, norms, state, x):
    """A block [B, H, C, ...] that is a chunk."""
    q, k, v, rates, momentum, n = x
    step = functools.partial(step, norms)
    weights, last = jax.lax.cond(n > 0, step, lambda state: (state.weights, state.step), state)
    state = State(weights, last, _gradient(weights, k, v, rates), jnp.sum(momentum, (-2, -1)))
    return state, apply(weights, q)


def _block(step, apply, fresh, norms, state, x):
    """A block [B, H, C, ...] of at most as many tokens as a chunk has.

    The first of them go on with the chunk in the state, those behind a border belong to the next chunk of the same segment, and
    all others to the first chunks of segments that begin here.
    """
    q, k, v, rates, momentum, begin, border = x
    run = jnp.cumsum(border, -1)
    first, begun, last = run == 0, jnp.cumsum(begin, -1) > 0, run == run[..., -1:]
    count = lambda where: jnp.sum(momentum * where[..., None], (-2, -1))
    gradient = lambda weights, where: _gradient(weights, k, v, rates * where[..., None])
    going_on = state._replace(
        gradient=jax.tree.map(jnp.add, state.gradient, gradient(state.weights, first)),
        momentum=state.momentum + count(first),
    )
    y = apply(state.weights, q)

    def across(y):
        following, of_step = step(norms, going_on)
        here = last & ~first
        then = State(following, of_step, gradient(following, here & ~begun), count(here))
        new = jax.tree.map(lambda w: jnp.broadcast_to(w, (len(q), *w.shape)), fresh)
        nothing = jax.tree.map(jnp.zeros_like, new)
        begins = State(new, nothing, gradient(new, here & begun), count(here))
        end = jax.tree.map(functools.partial(_pick, first[..., -1], begun[..., -1]), going_on, then, begins)
        return end, _pick(first, begun, y, apply(following, q), apply(new, q))

    return jax.lax.cond(jnp.all(first), lambda y: (going_on, y), across, y)


def _pick(first, begun, going_on, following, fresh):
    """What belongs to the chunk of each token, or of each row: the one in the state, the next one, or one begun here."""
    first, begun = (segments.expand(a, going_on.ndim) for a in (first, begun))
    return jnp.where(first, going_on, jnp.where(begun, fresh, following))


def _apply(factors, weights, x):
    gate, up = matmul(x, weights.w_0, factors), matmul(x, weights.w_2, factors)
    return matmul(jax.nn.silu(gate) * up, weights.w_1, factors)


def _gradient(weights, k, v, rates):
    """The sum over tokens of the derivatives of f(k) . v, each with its rate."""
    gate, up = matmul(k, weights.w_0), matmul(k, weights.w_2)
    share, back = jax.nn.sigmoid(gate), matmul(v, transpose(weights.w_1))
    active = gate * share
    slope = share * (1 + gate * (1 - share))
    rated = lambda i, a: transpose(rates[..., i : i + 1] * a)
    return FastWeights(
        matmul(rated(0, k), back * up * slope), matmul(rated(1, active * up), v), matmul(rated(2, k), back * active)
    )


def _step(orthogonal, chunk_size, norms, state):
    """The weights behind a chunk, and the step that led to them."""
    m = (state.momentum / chunk_size)[..., None, None]
    change = jax.tree.map(lambda g, d: g + m * d, state.gradient, state.step)
    moved = jax.tree.map(lambda w, d: w + (_orthogonal(d) if orthogonal else d), state.weights, change)
    return jax.tree.map(lambda w, size, n: w / (n + 1e-5) * size, moved, norms, _norms(moved)), change


def _norms(weights):
    """The norm of each column; that of a column of zeros has the derivative 0."""

    def norms(w):
        squares = jnp.sum(jnp.square(w), -2, keepdims=True)
        return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)

    return jax.tree.map(norms, weights)


def _orthogonal(x):
    """Makes the singular values of a matrix about 1."""
    x = x * jax.lax.rsqrt(jnp.sum(jnp.square(x), (-2, -1), keepdims=True) + 1e-14)
    turn = x.shape[-2] > x.shape[-1]
    x = transpose(x) if turn else x
    for a, b, c in _NEWTON_SCHULZ:
        squared = matmul(x, transpose(x))
        x = a * x + matmul(b * squared + c * matmul(squared, squared), x)
    return transpose(x) if turn else x

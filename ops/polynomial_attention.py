"""Linear attention with a polynomial kernel: tokens of a chunk meet by the polynomial, chunks by a state of its features.

    y_t = sum_{s<=t} exp(g_{s+1} + ... + g_t) p(q_t . k_s) v_s          p(a) = c0 + c1 a + c2 a^2 = phi(q) . phi(k)

phi(x) has sqrt(c0), sqrt(c1) x and sqrt(c2) times the products of the components of x, without what has the coefficient 0. It is
some F^2 / 2 numbers, so that q . k is far cheaper than phi(q) . phi(k), and its square does not cancel. Only states need phi
(Based, arXiv 2402.18668; power retention, 2507.04239).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ops import chunks, kept, sequence
from ops.dispatch import choose, current_platform, on_cpu, primitive
from ops.linear_attention import linear_attention
from ops.products import factor_dtype
from ops.segments import is_start, zero_padding

Coefficients = tuple[float, float, float]
SQUARE: Coefficients = (0.0, 0.0, 1.0)
CHUNK = 64


@primitive("reference", "features", "chunked", matmul="chunked")
def polynomial_attention(
    q: Float[Array, "B T H F"],
    k: Float[Array, "B T H F"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | None = None,
    *,
    coefficients: Coefficients,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str = "auto",
    chunk_size: int = CHUNK,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Decayed linear attention with a polynomial kernel over a piece of a sequence.

    Args:
      q, k, v: float32 or bfloat16 (float64 where x64 is on).
      log_decay: g <= 0; None for no decay.
      coefficients: (c0, c1, c2), not negative.
      initial_state: state before the first token; zeros if None. It belongs to the first token's segment.
      segment_ids: 0 is padding; the state restarts where the id changes.
      implementation: "reference" and "features" (`linear_attention` of phi(q) and phi(k), by its reference and by its policy),
        "chunked" (matmuls over chunks of tokens) or "auto": features for a single token, for a length in shards and on a TPU,
        else chunked.
      chunk_size: tokens of a chunk, a power of two.

    Returns:
      (y, final state). y has v's dtype; the state, of K = `feature_count` features, is float32, or float64 if an input is.

    Raises:
      ValueError: if the shapes do not fit together or the implementation is unknown.
      UserError: if chunk_size is not a power of two.
    """
    _check(q, k, v, log_decay, initial_state, segment_ids, coefficients)
    batch, length, heads, size = q.shape
    offered = ("reference", "features") + ("chunked",) * (not sequence.is_split(length))
    # On TPUs `linear_attention` has a kernel, whose scores never leave a core: half of the traffic of chunks in the main memory.
    by_features = length == 1 or "chunked" not in offered or current_platform() == "tpu"
    policy = "features" if by_features else "chunked"
    form = choose("polynomial_attention", implementation, policy, offered)
    q, k, v = (zero_padding(x, segment_ids) for x in (q, k, v))
    dtype = jnp.result_type(q, k, v, jnp.float32)
    if form != "chunked" or length == 1:
        where = {"initial_state": initial_state, "segment_ids": segment_ids}
        where["implementation"] = "reference" if form == "reference" else "auto"
        factors = factor_dtype(q, k, v)
        q, k = (features(x.astype(dtype), coefficients).astype(factors) for x in (q, k))
        return linear_attention(q, k, v, log_decay, **where)
    state = jnp.zeros((batch, heads, feature_count(size, coefficients), v.shape[-1]), dtype)
    if initial_state is not None:
        state = initial_state.astype(dtype)
    g = jnp.zeros((1, length, 1), dtype) if log_decay is None else zero_padding(log_decay.astype(dtype), segment_ids)
    start = None if segment_ids is None else is_start(segment_ids)
    # Filled up in front, so that the last token is the last of its chunk. Values of 0 write nothing.
    chunk = chunks.fit(chunk_size, length)
    fill = -length % chunk
    arrays = (q, k, v, chunks.bounded(g)[..., None], start)
    arrays = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (fill, 0)) + ((0, 0),) * (x.ndim - 2)), arrays)
    order = _rotated_order(size, coefficients)
    y, state = _chunked(chunk, coefficients, *arrays, state[:, :, order])
    state = state[:, :, np.argsort(order)]
    return zero_padding(y[:, fill:], segment_ids).astype(v.dtype), state


def features(x: Float[Array, "... F"], coefficients: Coefficients) -> Float[Array, "... K"]:
    """phi(x); its products are those of x_i and x_j, i <= j, one i after the other."""
    return _features(x, coefficients, _products)


def feature_count(size: int, coefficients: Coefficients) -> int:
    """K, the number of the features of F numbers."""
    return sum(n for n, c in zip((1, size, size * (size + 1) // 2), coefficients, strict=True) if c)


def _features(x, coefficients, products):
    constant, linear, quadratic = map(math.sqrt, coefficients)
    parts = [jnp.full_like(x[..., :1], constant)] if constant else []
    parts += [linear * x] if linear else []
    parts += [quadratic * part for part in products(x)] if quadratic else []
    return jnp.concatenate(parts, -1)


def _products(x):
    size = x.shape[-1]
    weight = lambda i: jnp.asarray([1.0] + [math.sqrt(2)] * (size - 1 - i), x.dtype)
    return [x[..., i : i + 1] * x[..., i:] * weight(i) for i in range(size)]


def _rotated_products(x):
    """The same numbers as products of x with x rotated by 0, 1, ..., F / 2: half as many operations, of one size."""
    size, twice = x.shape[-1], jnp.concatenate([x, x], -1)
    products = [x * x] + [math.sqrt(2) * x * twice[..., by : by + size] for by in range(1, (size + 1) // 2)]
    half = size // 2
    return products if size % 2 else [*products, math.sqrt(2) * x[..., :half] * x[..., half:]]


def _rotated_order(size: int, coefficients: Coefficients) -> np.ndarray:
    """Where `features` has what comes first, second, ... with rotated products."""
    place = np.zeros((size, size), np.int32)
    place[np.triu_indices(size)] = np.arange(size * (size + 1) // 2)
    place = np.maximum(place, place.T)
    by, i = np.divmod(np.arange(size * (size + 1) // 2), size)
    before = feature_count(size, (*coefficients[:2], 0.0))
    products = before + place[i, (i + by) % size] if coefficients[2] else []
    return np.concatenate([np.arange(before), products]).astype(np.int32)


def _check(q, k, v, log_decay, initial_state, segment_ids, coefficients):
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"need q, k [B, T, H, F] and v [B, T, H, V]; got {q.shape}, {k.shape} and {v.shape}")
    batch, length, heads, size = q.shape
    for name, x, shape in (
        ("log_decay", log_decay, (batch, length, heads)),
        ("initial_state", initial_state, (batch, heads, feature_count(size, coefficients), v.shape[-1])),
        ("segment_ids", segment_ids, (batch, length)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must have the shape {shape}; got {x.shape}")


def _chunked(chunk, coefficients, q, k, v, g, start, state):
    dot = functools.partial(chunks.dot, dtype=factor_dtype(q, k, v))
    phi = lambda x: _features(x, coefficients, _rotated_products)

    def polynomial(a):
        constant, linear, quadratic = coefficients
        return constant + a * (linear + quadratic * a)

    def decays(G, start):
        return chunks.boundary_decays(G, None if start is None else chunks.segment_masks(start))

    def read(x, S):
        q, k, v, G, start = x
        # A token reads its own write undecayed: with it, the gradient of G would have terms that cancel.
        scores = polynomial(dot("ik,jk->ij", q, k)) * chunks.pair_decays(G, strict=True)
        if start is not None:
            scores = jnp.where(chunks.segment_masks(start).same, scores, 0)
        own = polynomial(jnp.sum(q * k, -1, keepdims=True)) * v
        return dot("ck,kv->cv", phi(q) * decays(G, start)[0], S) + dot("ij,jv->iv", scores, v) + own

    def write(x):
        _, k, v, G, start = x
        _, leave, through = decays(G, start)
        leave = leave.at[..., -1, :].set(1)  # likewise
        return through, dot("ck,cv->kv", phi(k) * leave, v)

    def advance(S, written):
        through, addition = written
        return through[..., None] * S + addition, S

    def step(S, x):
        return advance(S, write(x))[0], read(x, S)

    G = chunks.cumulative(chunks.split(g, chunk))
    starts = None if start is None else chunks.split(start[..., None], chunk)
    xs = (*(chunks.split(x, chunk).astype(state.dtype) for x in (q, k, v)), G, starts)
    # One loop on a CPU; elsewhere only the state passes through a loop, and all chunks are read and written at once.
    if on_cpu():
        state, y = kept.scan(step, state, xs)
    else:
        state, states = jax.lax.scan(advance, state, jax.checkpoint(write)(xs))
        y = jax.checkpoint(read)(xs, kept.keep(states))
    return chunks.join(y, q.shape[1]), state

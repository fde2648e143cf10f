"""The HiPPO operator over batches of sequences: c_t = Abar_t c_{t-1} + Bbar_t f_t (arXiv 2008.07669), N coefficients per channel.

A zero-order hold: f is constant during a token. Time is counted in tokens from the start of each segment. Tokens are taken
by the chunk, in which every c_t is a matrix applied to the state before the chunk plus a sum over the chunk's tokens.

For LegS these matrices have closed forms and need no matrix exponential. Its basis functions are g_n on [0, 1]; stretching
[0, p] to [0, t], p = r t, maps the coefficients by M_nk(r) = r int_0^1 g_n(r u) g_k(u) du, the integral of a polynomial, for
which N Gauss nodes are exact; and the token between s and s + 1 enters with int_{s/t}^{(s+1)/t} g_n(x) dx. So c_t is the
projection of the tokens themselves, at every t.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from ops import dispatch, hippo, kept, segments
from ops.token_loop import chunking, join, split

_CHUNK = 32


def hippo_memory(
    f: Float[Array, "B T H"],
    measure: str,
    size: int,
    *,
    window: float = 1.0,
    initial_state: Float[Array, "B H N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    chunk_size: int = _CHUNK,
) -> tuple[Float[Array, "B T H N"], Float[Array, "B H N"]]:
    """Runs the operator over `f`.

    Args:
      f: signals.
      measure: one of `hippo.MEASURES`.
      size: N.
      window: tokens in a unit of time; without meaning for "legs".
      initial_state: c before the first token. Zero by default.
      segment_ids: 0 is padding, a change restarts the state; see `ops.segments`.
      positions: of the tokens in their segments, counted from 0 and continued across calls. By default every row is one
        segment from its first token on; to be given with `initial_state` and with `segment_ids`.
      chunk_size: tokens per chunk.

    Returns:
      c, zero on padding, and the final state, in float32 (float64 for float64 inputs).

    Raises:
      ValueError: if there are `initial_state` or `segment_ids` but no `positions`.
    """
    if positions is None and (initial_state is not None or segment_ids is not None):
        raise ValueError("hippo_memory needs positions with initial_state or segment_ids")
    dtype = jnp.promote_types(f.dtype, jnp.float32)
    batch, length, channels = f.shape
    f = segments.zero_padding(f, segment_ids).astype(dtype)
    rows = batch
    if positions is None:  # all rows are alike, and so are their matrices
        positions, rows = jnp.arange(length, dtype=jnp.int32)[None], 1
    ids = jnp.ones((rows, length), jnp.int32) if segment_ids is None else segment_ids
    run = jnp.cumsum(segments.is_start(ids), axis=1)
    count, width = chunking(length, chunk_size)
    state = jnp.zeros((batch, channels, size), dtype) if initial_state is None else initial_state.astype(dtype)
    advance = _legs_chunk if measure == "legs" else functools.partial(_invariant_chunk, measure, window)

    def chunk(state, tokens):
        f, position, run, valid = tokens  # [C, B, H] and [C, rows]
        index = jnp.arange(width)
        together = (run[:, None] == run) & (index[:, None] >= index)[..., None]
        before = jnp.maximum(position - index[:, None], 0)  # tokens of the segment before this chunk
        c = jnp.where(valid[..., None, None], advance(state, f, position, before, together), 0)
        return c[-1], c

    tokens = (jnp.swapaxes(f, 0, 1), positions.T, run.T, (ids != 0).T)
    _, c = kept.scan(chunk, state, split(tokens, count, width))
    c = jnp.moveaxis(join(c, length), 0, 1)
    return c, segments.unless_empty(c[:, -1], state, segment_ids)


def _legs_chunk(state, f, position, before, together):
    """c [C, B, H, N] of a chunk's tokens; `together` [C, C, rows] says which (later, earlier) tokens share a segment."""
    size, dtype = state.shape[-1], state.dtype
    nodes, weights = np.polynomial.legendre.leggauss(size)
    nodes, weights = (nodes + 1) / 2, weights / 2
    now = (position + 1).astype(dtype)
    ratio = before / now
    z = 2 * ratio[:, None] * jnp.asarray(nodes, dtype)[:, None] - 1  # [C, nodes, rows]
    step = (2 / now)[:, None]
    low = jnp.where(together, position, 0) * step - 1  # [C, C, rows]

    def degree(carry, n):
        """Legendre polynomials at z and `low`, and their growth from `low` to `low + step`, free of cancellation."""
        (p0, p1), (q0, q1), (d0, d1) = carry
        up = lambda x1, x0: ((2 * n + 1) * x1 - n * x0) / (n + 1)
        q2, d2 = up(low * q1, q0), up((low + step) * d1 + step * q1, d0)
        return ((p1, up(z * p1, p0)), (q1, q2), (d1, d2)), (p1, d2 - d0)

    first = lambda x: (jnp.zeros_like(x), jnp.ones_like(x))
    start = first(z), first(low), (jnp.zeros_like(low), jnp.zeros_like(low))
    _, (at_nodes, growth) = lax.scan(degree, start, jnp.arange(size, dtype=dtype))
    # int_low^high P_n = (growth of P_{n+1} - growth of P_{n-1}) / (2n + 1)
    root = jnp.sqrt(2 * jnp.arange(size, dtype=dtype) + 1)
    entering = jnp.where(together, growth, 0) / (2 * root[:, None, None, None])
    stretching = ratio[:, None] * at_nodes * root[:, None, None, None]
    values = _sum("bhn,qn->bhq", state, jnp.asarray(hippo.basis("legs", size, nodes) * weights[:, None], dtype))
    return _apply(stretching, values) + _apply(entering, jnp.moveaxis(f, 0, 2))


def _invariant_chunk(measure, window, state, f, position, before, together):
    """As `_legs_chunk`, for the measures whose system does not change with time."""
    size, width = state.shape[-1], f.shape[0]
    A, B = hippo.discretize(*hippo.transition(measure, size), 1 / window, "zoh")
    powers = [np.eye(size)]
    for _ in range(width):
        powers.append(powers[-1] @ A)
    lag = np.maximum(np.arange(width)[:, None] - np.arange(width), 0)
    kernel = jnp.asarray(np.stack(powers)[lag] @ B, state.dtype)  # [C, C, N]
    entering = jnp.where(together, jnp.moveaxis(kernel, 2, 0)[..., None], 0)
    kept = _sum("jnk,bhk->jbhn", jnp.asarray(np.stack(powers[1:]), state.dtype), state)
    kept = jnp.where((before > 0)[..., None, None], kept, 0)
    return kept + _apply(entering, jnp.moveaxis(f, 0, 2))


def _apply(matrices, values):
    """c_jbhn = sum_i matrices_njib values_bhi; the matrices may be the same for all b."""
    if matrices.shape[-1] == 1:
        return _sum("nji,bhi->jbhn", matrices[..., 0], values)
    return _sum("njib,bhi->jbhn", matrices, values)


def _sum(equation, *operands):
    return jnp.einsum(equation, *operands, precision=dispatch.matmul_precision(operands[0].dtype))

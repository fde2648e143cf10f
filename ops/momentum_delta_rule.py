"""The delta rule with momentum and forgetting: a matrix memory trained online by gradient descent, a token a step.

Titans with a linear memory (arXiv 2501.00663, equations 9-14). Per head, with the memory M_t and the momentum S_t, both
[K, V], and the loss |M^T k_t - v_t|^2 / 2 of memory M on token t:

    u_t = M_{t-1}^T k_t - v_t
    S_t = exp(h_t) S_{t-1} - beta_t k_t u_t^T               h: log of the momentum
    M_t = exp(g_t) M_{t-1} + S_t                            g: log of what is not forgotten
    y_t = scale * M_t^T q_t

For h = -inf this is a delta rule (`ops.delta_rule`), in which the error is that of the memory before its decay.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ops import chunks, dispatch, kept, segments
from ops.chunks import matmul, rows_before, transpose
from ops.products import factor_dtype
from ops.triangular import solve_unit_lower

_CHUNK = 64
_FULL = lax.Precision.HIGHEST
State = tuple[Float[Array, "B H K V"], Float[Array, "B H K V"]]


@dispatch.primitive("reference", "chunked", matmul="chunked")
def momentum_delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_momentum: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"],
    *,
    scale: float = 1.0,
    initial_state: State | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], State]:
    """Applies the rule along axis 1.

    Args:
      q, k, v: queries, keys and values; float32, bfloat16 or float64. Keys are normally of unit length; nothing is
        normalised here.
      beta: step size. With unit keys the memory stays bounded up to 1, whatever the momentum; beyond, it can explode.
      log_momentum: h <= 0.
      log_decay: g <= 0.
      scale: multiplies the outputs.
      initial_state: (M, S) before the first token, zero by default.
      segment_ids: 0 is padding, a change restarts the state; see `ops.segments`.
      implementation: "reference" (token by token, plain autodiff) or "chunked" (matmuls over chunks: the errors u of a
        chunk solve a triangular system, as in the delta rule); "auto" is chunked.
      chunk_size: tokens per chunk of "chunked", a power of two.

    Returns:
      y in v's dtype, zero on padding, and the final (M, S) in float32 (float64 if any of q, k, v is).

    Raises:
      ValueError: if shapes disagree or the implementation is unknown.
      UserError: if `chunk_size` is not a power of two.
    """
    batch, length, heads, key_size = q.shape
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"q and k must be [B, T, H, K] and v [B, T, H, V], not {q.shape}, {k.shape} and {v.shape}")
    for name, gate in (("beta", beta), ("log_momentum", log_momentum), ("log_decay", log_decay)):
        if gate.shape != q.shape[:3]:
            raise ValueError(f"{name} must have the shape {q.shape[:3]}, not {gate.shape}")
    form = dispatch.choose("momentum_delta_rule", implementation, "chunked")
    if length == 1:
        form = "reference"
    dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    factors = factor_dtype(q, k, v)
    arrays = (q, k, v, beta, log_momentum, log_decay)
    q, k, values, beta, h, g = (segments.zero_padding(x, segment_ids).astype(dtype) for x in arrays)
    q = scale * q
    if initial_state is None:
        initial_state = (jnp.zeros((batch, heads, key_size, v.shape[-1]), dtype),) * 2
    state = tuple(x.astype(dtype) for x in initial_state)
    start = jnp.zeros((batch, length), bool) if segment_ids is None else segments.is_start(segment_ids)
    # The momentum does not move the memory at padding, nor where the last chunk is filled up.
    exists = jnp.ones((1, length), dtype) if segment_ids is None else (segment_ids != 0).astype(dtype)
    if form == "reference":
        y, state = _reference(q, k, values, beta, h, g, start, exists, state)
    else:
        chunk = chunks.fit(chunk_size or _CHUNK, length)
        y, state = _chunked(q, k, values, beta, h, g, start, exists, state, chunk, factors)
    return segments.zero_padding(y, segment_ids).astype(v.dtype), state


def _reference(q, k, v, beta, h, g, start, exists, state):
    def step(state, x):
        q, k, v, beta, h, g, start, exists = x
        M, S = (jnp.where(start[:, None, None, None], 0, s) for s in state)
        u = jnp.einsum("bhkv,bhk->bhv", M, k, precision=_FULL) - v
        S = jnp.exp(h)[..., None, None] * S - (beta[..., None] * k)[..., None] * u[..., None, :]
        M = jnp.exp(g)[..., None, None] * M + exists[:, None, None, None] * S
        return (M, S), jnp.einsum("bhkv,bhk->bhv", M, q, precision=_FULL)

    state, y = lax.scan(step, state, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, beta, h, g, start, exists)))
    return jnp.moveaxis(y, 0, 1), state


def _chunked(q, k, v, beta, h, g, start, exists, state, chunk, factors):
    length = q.shape[1]
    h, g = chunks.bounded(h), chunks.bounded(g)
    xs = q, k, v, beta[..., None], h[..., None], g[..., None], start[:, :, None], exists[:, :, None, None]
    xs = tuple(chunks.split(x, chunk) for x in xs)
    state, y = kept.scan(functools.partial(_chunk, factors), state, xs)
    return chunks.join(y, length), state


def _chunk(factors, state, x):
    """A chunk [B, H, C, ...] from the state that enters it.

    What token j gives to S reaches M at t along every token i between them: with D_h and D_g the lower triangular
    matrices of the two decays, as (D_g D_h)_tj. So, with rows for tokens,

        M_t = exp(G_t) M + m_t S - sum_{j<=t} (D_g D_h)_tj beta_j k_j u_j^T,       m = D_g exp(H)

    and U solves (I + L) U = R, L strictly lower triangular, for three right-hand sides: one for each of M, S and -v. The system
    and what leads from state to state are float32; the products of a read are of `factors`.
    """
    M, S = state
    q, k, v, beta, h, g, start, exists = x
    masks = chunks.segment_masks(start)
    G, H = chunks.cumulative(g), chunks.cumulative(h)
    D_g, D_h = (jnp.where(masks.same, chunks.pair_decays(x), 0) for x in (G, H))
    enter = masks.enters[..., None]
    from_S = jnp.where(enter, H.exp(), 0)
    from_M = jnp.where(enter, G.exp(), 0)
    to_M = matmul(D_g, exists * D_h)
    S_to_M = matmul(D_g, exists * from_S)

    L = jnp.where(masks.same, rows_before(to_M, 0), 0) * matmul(k, transpose(beta * k))
    R = [jnp.where(enter, rows_before(from_M, 1), 0) * k, jnp.where(enter, rows_before(S_to_M, 0), 0) * k, -v]
    U = solve_unit_lower(L, jnp.concatenate(R, -1))
    K = k.shape[-1]
    U = matmul(U[..., :K], M) + matmul(U[..., K : 2 * K], S) + U[..., 2 * K :]
    y = from_M * matmul(q, M, factors) + S_to_M * matmul(q, S, factors)
    y = y - matmul(to_M * matmul(q, transpose(beta * k), factors), U, factors)

    def written(D):
        return matmul(transpose(transpose(D[..., -1:, :]) * beta * k), U)

    M_after = from_M[..., -1:, :] * M + S_to_M[..., -1:, :] * S - written(to_M)
    return (M_after, from_S[..., -1:, :] * S - written(D_h)), y

"""The delta rule: a matrix state whose transition is a diagonal plus a rank-one matrix.

DeltaNet (arXiv 2406.06484), Gated DeltaNet (2412.06464), Kimi Delta Attention (2510.26692) and RWKV-7 (2503.14456).
Every form below runs one recurrence, per head, with the state S_t [K, V]:

    u_t = c_t + S_{t-1}^T b_t                                  what the state holds under b_t
    S_t = Diag(exp g_t) S_{t-1} + a_t u_t^T + k_t v_t^T
    y_t = scale * S_t^T q_t

RWKV-7 is this with c = 0. The other three, S' = Diag(exp g) S_{t-1} and S_t = S' + beta_t k_t (v_t - S'^T k_t)^T, are
this with a = k, c = beta v, b = -beta exp(g) k and no third term.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ops import chunks, dispatch, kept, pallas_chunks, pallas_delta_rule, segments, sequence
from ops.chunks import matmul, rows_before, transpose
from ops.products import factor_dtype
from ops.triangular import solve_unit_lower

_CHUNK = 64
_GROUP = 8  # chunks prepared at once on an accelerator: parallel work, for a bounded piece of memory
_FULL = lax.Precision.HIGHEST


@dispatch.primitive("reference", "sequential", "chunked", matmul="chunked", tpu=("pallas",))
def delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"] | None = None,
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    *,
    a: Float[Array, "B T H K"] | None = None,
    b: Float[Array, "B T H K"] | None = None,
    scale: float = 1.0,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Applies the delta rule along axis 1.

    With `beta`: S' = Diag(exp g_t) S_{t-1}; S_t = S' + beta_t k_t (v_t - S'^T k_t)^T.
    With `a` and `b`: S_t = (Diag(exp g_t) + a_t b_t^T) S_{t-1} + k_t v_t^T; b reads the state before its decay.
    Both read y_t = scale * S_t^T q_t.

    Args:
      q, k, v: queries, keys and values; float32, bfloat16 or float64. The recurrence is stable for |k|^2 beta <= 2, so
        keys are normally of unit length; nothing is normalised here.
      beta: writing strength.
      log_decay: g <= 0, one per head or one per channel of the key; None is no decay.
      a, b: the rank-one part of the transition, in place of `beta`.
      scale: multiplies the outputs.
      initial_state: the state before the first token, zero by default.
      segment_ids: 0 is padding, a change restarts the state; see `ops.segments`.
      implementation: "reference" (token by token, plain autodiff), "sequential" (token by token, own derivative that
        stores no states), "chunked" (the WY/UT transform: matmuls over chunks, states kept once per group of chunks) or
        "pallas" (a TPU kernel of the same, with `beta`, without float64 and for the heads of `pallas_chunks.supports`;
        interpreted elsewhere). "auto" is sequential on a CPU for K * V <= 4096, the kernel on a TPU where it applies and the
        piece has a chunk, else chunked.
      chunk_size: tokens per chunk of "chunked" and "pallas", a power of two.

    Returns:
      y in v's dtype, zero on padding, and the final state in float32 (float64 if any of q, k, v is).

    Raises:
      ValueError: if shapes disagree, unless exactly one of `beta` and (`a`, `b`) is given, or if the implementation is
        unknown.
      UserError: if `chunk_size` is not a power of two.
    """
    _check(q, k, v, beta, log_decay, a, b, initial_state, segment_ids, chunk_size)
    if sequence.is_split(q.shape[1]):
        arguments = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay, "a": a, "b": b}
        options = {"scale": scale, "implementation": implementation, "chunk_size": chunk_size}
        return _over_shards(arguments, initial_state, segment_ids, options)
    batch, length, heads, key_size = q.shape
    policy = "sequential" if dispatch.on_cpu() and key_size * v.shape[-1] <= 4096 else "chunked"
    dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    kernel = beta is not None and pallas_chunks.supports(q, v, dtype)
    if kernel and dispatch.current_platform() == "tpu" and length >= pallas_chunks.CHUNK:
        policy = "pallas"
    form = dispatch.choose(
        "delta_rule", implementation, policy, ("reference", "sequential", "chunked") + ("pallas",) * kernel
    )
    if length == 1:
        form = "reference"  # one step: there is nothing to chunk, nor to recompute

    factors = factor_dtype(q, k, v)
    arrays = jax.tree.map(lambda x: segments.zero_padding(x, segment_ids), (q, k, v, beta, log_decay, a, b))
    q, k, values, beta, g, a, b = jax.tree.map(lambda x: x.astype(dtype), arrays)
    q = scale * q
    beta = None if beta is None else beta[..., None]
    if g is None:
        g = jnp.zeros((batch, length, heads, 1), dtype)
    elif g.ndim == 3:
        g = g[..., None]
    state = jnp.zeros((batch, heads, key_size, v.shape[-1]), dtype)
    if initial_state is not None:
        state = initial_state.astype(dtype)
    start = None if segment_ids is None else segments.is_start(segment_ids)

    if form == "pallas":
        chunk = max(pallas_chunks.LEAST, chunks.fit(chunk_size or pallas_chunks.CHUNK, length))
        y, state = pallas_delta_rule.apply(chunk, scale, *arrays[:3], beta[..., 0], chunks.bounded(g), start, state)
    elif form == "reference":
        y, state = _reference(q, k, values, beta, g, a, b, state, start)
    elif form == "sequential":
        y, state = _sequential(q, k, values, beta, g, a, b, state, start)
    else:
        y, state = _chunked(q, k, values, beta, g, a, b, state, start, chunk_size or _CHUNK, factors)
    return y.astype(v.dtype), state


def _over_shards(arguments, initial_state, segment_ids, options):
    """The transition of a shard is a matrix [K, K], which its own recurrence makes of the identity where it writes no values:
    as K columns more of the state."""
    q, v = arguments["q"], arguments["v"]
    (batch, _, heads, size), dtype = q.shape, jnp.promote_types(jnp.result_type(q, arguments["k"], v), jnp.float32)
    state = jnp.zeros((batch, heads, size, v.shape[-1]), dtype)
    if initial_state is not None:
        state = initial_state.astype(dtype)

    def run(state, segment_ids, **arguments):
        y, state = delta_rule(**arguments, initial_state=state, segment_ids=segment_ids, **options)
        return (y,), state

    def total(segment_ids, v, **arguments):
        lead = (v.shape[0], v.shape[2])
        identity = jnp.broadcast_to(jnp.eye(size, dtype=dtype), (*lead, size, size))
        first = jnp.concatenate([jnp.zeros((*lead, size, v.shape[-1]), dtype), identity], -1)
        wide = jnp.pad(v, ((0, 0),) * 3 + ((0, size),))
        _, last = delta_rule(v=wide, **arguments, initial_state=first, segment_ids=segment_ids, **options)
        own, transition = jnp.split(last, [v.shape[-1]], -1)
        return transition, own

    tokens = ("batch", "length", "heads", None)
    axes = {name: None if x is None else tokens[: x.ndim] for name, x in arguments.items()}
    (y,), state = sequence.recurrence(
        run, total, arguments, axes, [(tokens, v.shape)], state, ("batch", "heads", None, None), segment_ids, act=matmul
    )
    return y, state


def _check(q, k, v, beta, log_decay, a, b, initial_state, segment_ids, chunk_size):
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"q and k must be [B, T, H, K] and v [B, T, H, V], not {q.shape}, {k.shape} and {v.shape}")
    if (beta is None) == (a is None) or (a is None) != (b is None):
        raise ValueError("give either beta or both a and b")
    per_head = q.shape[:3]
    expected = {
        "beta": (beta, (per_head,)),
        "log_decay": (log_decay, (per_head, q.shape)),
        "a": (a, (q.shape,)),
        "b": (b, (q.shape,)),
        "initial_state": (initial_state, ((q.shape[0], *q.shape[2:], v.shape[-1]),)),
        "segment_ids": (segment_ids, (q.shape[:2],)),
    }
    for name, (x, shapes) in expected.items():
        if x is not None and x.shape not in shapes:
            raise ValueError(f"{name} must have the shape {' or '.join(map(str, shapes))}, not {x.shape}")
    if chunk_size is not None:
        chunks.check_size(chunk_size)


def _read(S, x):
    return jnp.einsum("bhkv,bhk->bhv", S, x, precision=_FULL)


def _read_values(S, x):
    return jnp.einsum("bhkv,bhv->bhk", S, x, precision=_FULL)


def _outer(x, y):
    return x[..., :, None] * y[..., None, :]


def _dot(x, y):
    return jnp.sum(x * y, -1, keepdims=True)


def _time_major(x):
    return None if x is None else jnp.moveaxis(x, 1, 0)


def _tokens_after(x):
    return jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])


def _tokens_before(x):
    return jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])


def _reference(q, k, v, beta, g, a, b, state, start):
    """The two definitions, a token at a time."""

    def step(S, x):
        q, k, v, beta, g, a, b, start = x
        if start is not None:
            S = jnp.where(start[:, None, None, None], 0, S)
        decayed = jnp.exp(g)[..., None] * S
        if beta is not None:
            S = decayed + _outer(k, beta * (v - _read(decayed, k)))
        else:
            S = decayed + _outer(a, _read(S, b)) + _outer(k, v)
        return S, _read(S, q)

    state, y = lax.scan(step, state, tuple(map(_time_major, (q, k, v, beta, g, a, b, start))))
    return jnp.moveaxis(y, 0, 1), state


def _sequential(q, k, v, beta, g, a, b, state, start):
    if beta is not None:
        a, b, c, write = k, -beta * jnp.exp(g) * k, beta * v, None
    else:
        c, write = jnp.zeros_like(v), (_time_major(k), _time_major(v))
    if start is not None:
        start = start[..., None, None]
        g, b = jnp.where(start, -jnp.inf, g), jnp.where(start, 0, b)
    q, a, b, c, g = map(_time_major, (q, a, b, c, g))
    y, state = _recurrence(q, a, b, c, write, g, state)
    return jnp.moveaxis(y, 0, 1), state


@jax.custom_vjp
def _recurrence(q, a, b, c, write, g, state):
    """The recurrence at the top of this file, time-major; write is (k, v) or None. Returns y and the final state."""
    return _recurrence_forward(q, a, b, c, write, g, state)[0]


def _recurrence_forward(q, a, b, c, write, g, state):
    def step(S, x):
        q, a, b, c, write, g = x
        u = c + _read(S, b)
        S = jnp.exp(g)[..., None] * S + _written(a, u, write)
        return S, (_read(S, q), u)

    final, (y, u) = lax.scan(step, state, (q, a, b, c, write, g))
    return (y, final), (q, a, b, write, g, kept.keep(u), state)


def _written(a, u, write):
    return _outer(a, u) if write is None else _outer(a, u) + _outer(*write)


def _recurrence_backward(saved, cotangents):
    """Two recurrences and no stored state: the cotangent backwards in time, then the state forwards again.

    With E_t the cotangent of S_t, write

        S_t = S'_t + (a_t u_t^T + k_t v_t^T),             S'_t = Diag(exp g_t) S_{t-1}
        E_t = L_t + (b_{t+1} du_{t+1}^T + q_t dy_t^T),    L_t = Diag(exp g_{t+1}) E_{t+1},    L_T = dS_T.

    The derivative by g_t is P_t = rowsum(S'_t * E_t), and P_t - P_{t+1} holds only products of one decayed factor (S'_t
    or L_t) with one undecayed one: those of two undecayed factors cancel and are never formed. The reversed
    cumulative sum is therefore accurate relative to the derivative itself, which under strong decay is far smaller
    than the rounding errors of the other derivatives.
    """
    q, a, b, write, g, u, state = saved
    dy, d_final = cotangents
    b_after = _tokens_after(b)

    def back(carry, x):
        L, du_after = carry
        q, a, b_after, write, g, u, dy = x

        def held(key):
            return _read(L, key) + _dot(key, b_after) * du_after + _dot(key, q) * dy

        du = held(a)
        d_write = None if write is None else (_read_values(L, write[1]), held(write[0]))
        L_a = _read_values(L, u)
        L = jnp.exp(g)[..., None] * (L + _outer(b_after, du_after) + _outer(q, dy))
        return (L, du), (du, L_a, d_write)

    (L, _), (du, L_a, d_write) = lax.scan(
        back, (d_final, jnp.zeros_like(u[0])), (q, a, b_after, write, g, u, dy), reverse=True
    )
    d_state = L + _outer(b[0], du[0])
    du_after = _tokens_after(du)

    def forth(S, x):  # carries S'_t, and adds the write of the token before only now, so that S'_T comes out
        a, u, write, g, dy, du_after = x
        S = jnp.exp(g)[..., None] * (S + _written(a, u, write))
        return S, (_read_values(S, dy), _read_values(S, du_after))

    earlier = jax.tree.map(_tokens_before, (a, u, write))
    last, (S_q, S_b) = lax.scan(forth, state, (*earlier, g, dy, du_after))

    # The last token writes the final state undecayed: its terms cancel as well, and leave those of S'_T.
    difference = q * S_q + b_after * S_b - (a * L_a).at[-1].set(0)
    dq = S_q + a * _dot(u, dy)
    da = L_a + b_after * _dot(du_after, u) + q * _dot(dy, u)
    db_after = S_b + a * _dot(u, du_after)
    if write is not None:
        k, v = write
        L_k, dv = d_write
        difference = difference - (k * L_k).at[-1].set(0)
        dq = dq + k * _dot(v, dy)
        dk = L_k + b_after * _dot(du_after, v) + q * _dot(dy, v)
        db_after = db_after + k * _dot(v, du_after)
        d_write = dk, dv
    db = jnp.concatenate([_read_values(state, du[0])[None], db_after[:-1]])
    difference = difference.at[-1].add(jnp.sum(d_final * last, -1))
    if g.shape[-1] == 1:
        difference = jnp.sum(difference, -1, keepdims=True)
    dg = lax.cumsum(difference, axis=0, reverse=True)
    return dq, da, db, du, d_write, dg, d_state


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def _chunked(q, k, v, beta, g, a, b, state, start, chunk, factors):
    """Chunks in groups: each group is prepared in parallel, then its states pass from chunk to chunk.

    Only the state that enters a group is kept for the backward pass; the rest of the group is recomputed.
    """
    g = chunks.bounded(g)
    length = q.shape[1]
    chunk = chunks.fit(chunk, length)
    count = -(-length // chunk)
    groups = count if dispatch.on_cpu() else -(-count // _GROUP)
    size = -(-count // groups)

    def grouped(x):
        if x is None:
            return None
        x = chunks.split(x, chunk)
        x = jnp.pad(x, ((0, groups * size - count),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(groups, size, *x.shape[1:])

    index = jnp.arange(length)
    ends = ((index % chunk == chunk - 1) | (index == length - 1))[None, :, None]
    start = None if start is None else start[..., None]
    xs = tuple(map(grouped, (q, k, v, beta, g, a, b, start, ends)))
    state, y = kept.scan(functools.partial(_group, factors), state, xs)
    return chunks.join(y.reshape(groups * size, *y.shape[2:]), length), state


def _group(factors, state, x):
    """A group of chunks, [N, B, H, C, ...], from the state [B, H, K, V] that enters it.

    Inside a chunk, with G the cumulative log-decay, S the entering state, and rows for tokens, the recurrence reads

        (I + A) U = R + W S,    A strictly lower triangular,

    which is solved for both right-hand sides before S is known (the WY representation). The system and what leads from state to
    state are float32; all other products are of `factors`.

    Where no step lies between a token and its reader, or between the last token and the end of its chunk (`ends`), the
    decay is 1 and not exp(G - G): the derivative of the latter adds two large terms to that of g, which should cancel.
    """
    q, k, v, beta, g, a, b, start, ends = x
    G = chunks.cumulative(g)
    masks = None if start is None else chunks.segment_masks(start)
    enter, leave, through = chunks.boundary_decays(G, masks)
    leave = jnp.where(ends[..., None], 1, leave)

    if beta is not None:
        a = k
        # One decay for all channels comes after the product, which is then exact of keys that are rounded already.
        A = beta * _strict_scores(k, k, G, masks, factors if G.shape[-1] == 1 else None)
        W = -beta * enter * k
        R = beta * v
    else:
        # b_t reads the state after token t - 1: as a query of that token, moved down a row afterwards.
        if start is not None:
            b = jnp.where(start[..., None], 0, b)
        b_after = jnp.pad(b[..., 1:, :], ((0, 0),) * (b.ndim - 2) + ((0, 1), (0, 0)))
        A = -rows_before(_scores(b_after, a, G, masks), 0)
        W = b * rows_before(enter, 1)
        R = rows_before(matmul(_scores(b_after, k, G, masks, factors), v, factors), 0)
    W, R = jnp.split(solve_unit_lower(A, jnp.concatenate([W, R], -1)), [q.shape[-1]], -1)
    writes = transpose(a * leave)
    added = None if beta is not None else matmul(transpose(k * leave), v, factors)

    def pass_state(S, x):
        W, R, writes, added, through = x
        U = R + matmul(W, S)
        after = through[..., None] * S + matmul(writes, U)
        return after if added is None else after + added, (S, U)

    state, (S, U) = lax.scan(pass_state, state, (W, R, writes, added, through))
    y = matmul(q * enter, S, factors) + matmul(_scores(q, a, G, masks, factors), U, factors)
    if beta is None:
        y = y + matmul(_scores(q, k, G, masks, factors), v, factors)
    return state, y


def _strict_scores(x, y, G, masks, factors=None):
    """x_i . y_j with the decay from j to i, for j < i of the same segment."""
    scores = chunks.decayed_scores(x, y, G, strict=True, dtype=factors)
    return scores if masks is None else jnp.where(masks.same, scores, 0)


def _scores(x, y, G, masks, factors=None):
    """`_strict_scores` and the diagonal."""
    diagonal = _dot(x, y) * jnp.eye(x.shape[-2], dtype=x.dtype)
    return _strict_scores(x, y, G, masks, factors) + diagonal

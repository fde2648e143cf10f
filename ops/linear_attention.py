"""Linear attention with decay: an outer-product state that forgets, read by the query.

    S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T          y_t = scale S_t^T q_t
    with a bonus u (RWKV-6):                         y_t = scale (S_{t-1} + Diag(u) k_t v_t^T)^T q_t

Linear transformers (arXiv:2006.16236), RetNet (2307.08621), GLA (2312.06635), Mamba-2 (2405.21060), RWKV-6
(2404.05892). Decay per channel by recursive halving, see `chunks.decayed_scores`.

The gradient of g. With D_t = dL/dS_t, dL/dg_t = <D_t, exp(g_t) S_{t-1}>, and this telescopes, per channel:

    dg_t = dg_{t+1} + q_t dq_t - k_t dk_t            dg_{T+1} = <D_T, S_T>

so that neither states nor their gradients are kept. A token's read of its own write appears in both products and
cancels, and so does the last token's write into the final state. Nothing decays these terms; under strong decay
they would drown what is left in rounding errors. Both backward passes therefore leave them out of the sum.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ops import chunks, pallas_chunks, pallas_linear_attention, sequence
from ops.dispatch import choose, current_platform, on_cpu, primitive
from ops.kept import keep
from ops.products import factor_dtype, product
from ops.segments import is_start, zero_padding


@primitive("reference", "sequential", "chunked", matmul="chunked", tpu=("pallas",))
def linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "H"] | Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    *,
    scale: float = 1.0,
    bonus: Float[Array, "H K"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Decayed linear attention over a piece of a sequence.

    Args:
      q, k, v: float32 or bfloat16 (float64 where x64 is on).
      log_decay: g <= 0; None (no decay), [H] (constant), [B, T, H] (one per head) or [B, T, H, K] (one per channel).
      scale: factor of the output.
      bonus: u. Given, the read sees the state before this step's decay and write, plus Diag(u) k_t v_t^T.
      initial_state: state before the first token; zeros if None. It belongs to the first token's segment.
      segment_ids: 0 is padding; the state restarts where the id changes.
      implementation: "reference" (token by token, plain autodiff), "sequential" (token by token, own gradient),
        "chunked" (matmuls over chunks of tokens, own gradient), "pallas" (a TPU kernel of the same, without float64 and for the
        heads of `pallas_chunks.supports`; interpreted elsewhere), or "auto": sequential on a CPU for heads up to 64 x 64 whose
        channels decay by themselves, and for others up to 16 x 32, the kernel on a TPU where it applies and the piece has a
        chunk, else chunked.
      chunk_size: tokens per chunk of the chunked form and of the kernel, a power of two; None for the default.

    Returns:
      (y, final state). y has v's dtype; the state is float32, or float64 if an input is.

    Raises:
      ValueError: if the shapes do not fit together or the implementation is unknown.
      UserError: if chunk_size is not a power of two.
    """
    _check(q, k, v, log_decay, bonus, initial_state, segment_ids)
    if sequence.is_split(q.shape[1]):
        options = {"scale": scale, "implementation": implementation, "chunk_size": chunk_size}
        return _over_shards(q, k, v, log_decay, bonus, initial_state, segment_ids, options)
    batch, length, heads, key_size = q.shape
    value_size = v.shape[-1]
    dtype = jnp.result_type(q, k, v, jnp.float32)
    g = _with_all_axes(log_decay, segment_ids, length, dtype)
    offered = ("reference", "sequential", "chunked") + ("pallas",) * pallas_chunks.supports(q, v, dtype)
    # What decays by channel costs the chunked form exponentials of every pair of tokens, or nearly so.
    largest = 64 * 64 if log_decay is not None and log_decay.ndim == 4 else 16 * 32
    policy = "sequential" if on_cpu() and key_size * value_size <= largest else "chunked"
    if current_platform() == "tpu" and "pallas" in offered and length >= pallas_chunks.CHUNK:
        policy = "pallas"
    implementation = choose("linear_attention", implementation, policy, offered)

    q, k, v = (zero_padding(x, segment_ids) for x in (q, k, v))
    state = jnp.zeros((batch, heads, key_size, value_size), dtype)
    if initial_state is not None:
        state = initial_state.astype(dtype)
    start = None if segment_ids is None else is_start(segment_ids)

    if length == 1 or implementation == "reference":
        y, state = _reference(q, k, v, g, bonus, state, start)
        return (scale * y).astype(v.dtype), state

    read = q
    if bonus is not None:
        # Reading before the write is reading one token later: token t's query reads the state that token t-1 left.
        read = q if start is None else jnp.where(start[:, :, None, None], 0, q)
        read = jnp.pad(read[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    before = state
    if implementation == "sequential":
        if start is not None:
            g = jnp.where(start[:, :, None, None], -jnp.inf, g)
        y, state = _sequential(read, k, v, g, state)
    else:
        kernel = implementation == "pallas"
        if chunk_size is None:
            chunk_size = pallas_chunks.CHUNK if kernel else _chunk_size(key_size, value_size, g.shape[-1] > 1)
        chunk = chunks.fit(chunk_size, length)
        chunk = max(chunk, pallas_chunks.LEAST) if kernel else chunk
        # Filled up in front, so that the last token is the last of its chunk and leaves its write undecayed there.
        fill = -length % chunk
        arrays = (read, k, v, chunks.bounded(g), start)
        arrays = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (fill, 0)) + ((0, 0),) * (x.ndim - 2)), arrays)
        if kernel and bonus is None:  # which writes what is returned
            y, state = pallas_linear_attention.attend(chunk, scale, v.dtype, *arrays, state)
            return y[:, fill:], state
        if kernel:
            y, state = pallas_linear_attention.attend(chunk, 1.0, dtype, *arrays, state)
        else:
            y, state = _chunked(chunk, *arrays, state)
        y = y[:, fill:]
    if bonus is not None:
        first = _read(q[:, 0].astype(dtype), before)
        y = jnp.concatenate([first[:, None], y[:, :-1]], axis=1)
        y += jnp.sum(bonus * q.astype(dtype) * k, -1, keepdims=True) * v
    return (scale * y).astype(v.dtype), state


def _chunk_size(key_size: int, value_size: int, by_channel: bool) -> int:
    """Tokens of a chunk of the portable form.

    The state of each chunk is kept, which of wide heads is larger than its tokens. So off the CPU there are as many tokens
    as K V / (K + V), with which the products among them take half as long as those with the state, from 64 to 256.
    """
    if on_cpu():
        return 32 if by_channel else 64
    tokens = key_size * value_size // (key_size + value_size)
    return min(max(64, 2 ** (tokens.bit_length() - 1)), 256)


def _check(q, k, v, log_decay, bonus, initial_state, segment_ids):
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"need q, k [B, T, H, K] and v [B, T, H, V]; got {q.shape}, {k.shape} and {v.shape}")
    batch, length, heads, key_size = q.shape
    decays = ((heads,), (batch, length, heads), (batch, length, heads, key_size))
    if log_decay is not None and log_decay.shape not in decays:
        raise ValueError(f"log_decay must be None or have one of the shapes {decays}; got {log_decay.shape}")
    for name, x, shape in (
        ("bonus", bonus, (heads, key_size)),
        ("initial_state", initial_state, (batch, heads, key_size, v.shape[-1])),
        ("segment_ids", segment_ids, (batch, length)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must have the shape {shape}; got {x.shape}")


def _with_all_axes(log_decay, segment_ids, length, dtype):
    """The decay as [B or 1, T, H or 1, K or 1], 0 at padding: what does not vary along an axis is not repeated along it."""
    if log_decay is None:
        return jnp.zeros((1, length, 1, 1), dtype)
    g = log_decay.astype(dtype)
    if g.ndim == 1:
        batch = 1 if segment_ids is None else len(segment_ids)
        g = jnp.broadcast_to(g, (batch, length, *g.shape))
    return zero_padding(g if g.ndim == 4 else g[..., None], segment_ids)


def _read(q, state):
    return jnp.einsum("bhk,bhkv->bhv", q, state, precision="highest")


def _time_major(x):
    return jnp.moveaxis(x, 1, 0)


def _sum_to(x, shape):
    """Sums over the axes that are 1 in `shape`: the gradient of broadcasting."""
    axes = tuple(i for i, (have, want) in enumerate(zip(x.shape, shape, strict=True)) if have != want)
    return jnp.sum(x, axes, keepdims=True)


# -------------------------------------------------------------------------------------------------- over devices


def _over_shards(q, k, v, log_decay, bonus, initial_state, segment_ids, options):
    state = jnp.zeros((q.shape[0], *q.shape[2:], v.shape[-1]), jnp.result_type(q, k, v, jnp.float32))
    if initial_state is not None:
        state = initial_state.astype(state.dtype)

    def run(state, segment_ids, q, k, v, log_decay, bonus):
        where = {"initial_state": state, "segment_ids": segment_ids}
        y, state = linear_attention(q, k, v, log_decay, bonus=bonus, **where, **options)
        return (y,), state

    def total(segment_ids, q, k, v, log_decay, bonus):
        return _total(k, v, log_decay, segment_ids)

    arguments = {"q": q, "k": k, "v": v, "log_decay": log_decay, "bonus": bonus}
    tokens = ("batch", "length", "heads", None)
    decay = None if log_decay is None else ("heads",) if log_decay.ndim == 1 else tokens[: log_decay.ndim]
    axes = {"q": tokens, "k": tokens, "v": tokens, "log_decay": decay, "bonus": ("heads", None)}
    (y,), state = sequence.recurrence(
        run, total, arguments, axes, [(tokens, v.shape)], state, ("batch", "heads", None, None), segment_ids
    )
    return y, state


@functools.partial(jax.checkpoint, prevent_cse=False)
def _total(k, v, log_decay, segment_ids):
    """What a whole piece does to a state: its decay [B, H, K or 1, 1], and the state that it leaves from nothing."""
    (batch, length, heads, _), dtype = k.shape, jnp.result_type(k, v, jnp.float32)
    g = _with_all_axes(log_decay, segment_ids, length, dtype)
    k, v = (zero_padding(x, segment_ids) for x in (k, v))
    start = None if segment_ids is None else is_start(segment_ids)
    chunk = chunks.fit(64, length)
    fill = -length % chunk
    arrays = (k, v, chunks.bounded(g), start)
    k, v, g, start = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (fill, 0)) + ((0, 0),) * (x.ndim - 2)), arrays)
    k, v, G, starts = _chunked_inputs(chunk, (k, v), g, start, dtype)
    _, leave, through = chunks.boundary_decays(G, _masks(starts))
    later = jnp.concatenate([through[1:], jnp.ones_like(through[:1])])
    later = jax.lax.associative_scan(jnp.multiply, later, reverse=True)
    own = product("nbhck,nbhcv->bhkv", k * leave * later[..., None, :], v)
    decay = (through[0] * later[0])[..., None]
    return jnp.broadcast_to(decay, (batch, heads, *decay.shape[2:])), own


# ----------------------------------------------------------------------------------------------------- reference


def _reference(q, k, v, g, bonus, state, start):
    def step(S, token):
        q, k, v, g, start = token
        q, k, v = (x.astype(S.dtype) for x in (q, k, v))
        if start is not None:
            S = jnp.where(start[:, None, None, None], 0, S)
        write = k[..., None] * v[..., None, :]
        after = jnp.exp(g)[..., None] * S + write
        read = after if bonus is None else S + bonus[..., None] * write
        return after, _read(q, read)

    tokens = jax.tree.map(_time_major, (q, k, v, g, start))
    if q.shape[1] == 1:
        state, y = step(state, jax.tree.map(lambda x: x[0], tokens))
        return y[:, None], state
    state, y = jax.lax.scan(step, state, tokens)
    return _time_major(y), state


# ---------------------------------------------------------------------------------------------------- sequential
# The gradient is made of recurrences as well: one forward for dq, one backward for dk and dv. No state is stored.


@jax.custom_vjp
def _sequential(q, k, v, g, state):
    def step(S, token):
        q, k, v, decay = token
        S = decay[..., None] * S + k[..., None] * v[..., None, :]
        return S, jnp.einsum("bhk,bhkv->bhv", q, S, precision="highest")

    tokens = [_time_major(x).astype(state.dtype) for x in (q, k, v, jnp.exp(g))]
    state, y = jax.lax.scan(step, state, tokens)
    return _time_major(y), state


def _sequential_forward(q, k, v, g, state):
    return _sequential(q, k, v, g, state), (q, k, v, g, state)


def _sequential_backward(residuals, cotangents):
    q, k, v, g, state = residuals
    dy, dfinal = cotangents
    qs, ks, vs, decays, dys = (_time_major(x).astype(state.dtype) for x in (q, k, v, jnp.exp(g), dy))

    # Sums over a state's minor axis do not vectorise on a CPU: where V is summed, the state is kept as [V, K].
    def over_v(S, x):
        return jnp.einsum("bhvk,bhv->bhk", S, x, precision="highest")

    def query_gradient(carry, token):
        S, k_before, v_before = carry
        k, v, decay, dy = token
        S = decay[..., None, :] * (S + v_before[..., None] * k_before[..., None, :])
        return (S, k, v), over_v(S, dy)

    carry = jnp.swapaxes(state, -1, -2), jnp.zeros_like(ks[0]), jnp.zeros_like(vs[0])
    (S, _, _), dq = jax.lax.scan(query_gradient, carry, (ks, vs, decays, dys))

    def key_value_gradient(carry, token):
        D, D_transposed = carry
        q, k, v, decay, dy = token
        dk = over_v(D_transposed, v)
        dv = jnp.einsum("bhkv,bhk->bhv", D, k, precision="highest")
        D = decay[..., None] * (D + q[..., None] * dy[..., None, :])
        D_transposed = decay[..., None, :] * (D_transposed + dy[..., None] * q[..., None, :])
        return (D, D_transposed), (dk, dv)

    carry = dfinal, jnp.swapaxes(dfinal, -1, -2)
    (dstate, _), (dk, dv) = jax.lax.scan(key_value_gradient, carry, (qs, ks, vs, decays, dys), reverse=True)

    # dq, dk and dv still lack each token's read of its own write, S its last write: as the sum for dg wants them.
    terms = qs * dq - ks * dk.at[-1].set(0)
    terms = terms.at[-1].add(jnp.sum(jnp.swapaxes(dfinal, -1, -2) * S, -2))
    if g.shape[-1] == 1:
        terms = jnp.sum(terms, -1, keepdims=True)

    def decay_gradient(following, token):
        term, decay = token
        dg = jnp.where(decay == 0, 0, following + term)
        return dg, dg

    _, dg = jax.lax.scan(decay_gradient, jnp.zeros_like(terms[0]), (terms, decays), reverse=True)

    own = jnp.sum(dys * vs, -1, keepdims=True)
    dq, dk, dv = dq + ks * own, dk + qs * own, dv + jnp.sum(qs * ks, -1, keepdims=True) * dys
    dq, dk, dv, dg = (_time_major(x) for x in (dq, dk, dv, dg))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), _sum_to(dg, g.shape), dstate


_sequential.defvjp(_sequential_forward, _sequential_backward)


# ------------------------------------------------------------------------------------------------------- chunked
# The states between chunks by a short scan; everything inside the chunks by matmuls, from the states that enter them.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(chunk, q, k, v, g, start, state):
    return _chunked_forward(chunk, q, k, v, g, start, state)[0]


def _run(read, write, state, xs, reverse=False):
    """From chunk to chunk: out = read(x, S), then S <- decay S + addition with (decay, addition) = write(x).

    On a CPU that is one loop, which keeps the temporaries of a single chunk. Elsewhere only the state passes through a
    loop and all chunks are read and written at once.

    Returns:
      the last state, the state that each chunk read, and the outputs.
    """

    def advance(S, written):
        decay, addition = written
        return decay[..., None] * S + addition, S

    def step(S, x):
        after, before = advance(S, write(x))
        return after, (before, read(x, S))

    if on_cpu():
        state, (states, out) = jax.lax.scan(step, state, xs, reverse=reverse)
    else:
        state, states = jax.lax.scan(advance, state, write(xs), reverse=reverse)
        out = read(xs, states)
    return state, states, out


def _chunked_inputs(chunk, arrays, g, start, dtype):
    """In chunks: the arrays, the cumulative log-decays and the starts of segments."""
    G = chunks.cumulative(chunks.split(g, chunk))
    starts = None if start is None else chunks.split(start[..., None], chunk)
    return *(chunks.split(x, chunk).astype(dtype) for x in arrays), G, starts


def _masks(start):
    return None if start is None else chunks.segment_masks(start)


def _chunked_forward(chunk, q, k, v, g, start, state):
    factors = factor_dtype(q, k, v)
    dot = functools.partial(chunks.dot, dtype=factors)

    def read(x, S):
        q, k, v, G, start = x
        masks = _masks(start)
        enter, _, _ = chunks.boundary_decays(G, masks)
        scores = chunks.decayed_scores(q, k, G, dtype=factors)
        if masks is not None:
            scores = jnp.where(masks.same, scores, 0)
        return dot("ck,kv->cv", q * enter, S) + dot("ij,jv->iv", scores, v)

    def write(x):
        _, k, v, G, start = x
        _, leave, through = chunks.boundary_decays(G, _masks(start))
        return through, dot("ck,cv->kv", k * leave, v)

    xs = _chunked_inputs(chunk, (q, k, v), g, start, state.dtype)
    final, states, y = _run(read, write, state, xs)
    return (chunks.join(y, q.shape[1]), final), (q, k, v, g, start, keep(states))


def _chunked_backward(chunk, residuals, cotangents):
    q, k, v, g, start, states = residuals
    dy, dfinal = cotangents
    factors = factor_dtype(q, k, v)
    dot = functools.partial(chunks.dot, dtype=factors)

    def gradients(x, D):
        q, k, v, dy, G, start, S = x
        masks = _masks(start)
        enter, leave, through = chunks.boundary_decays(G, masks)
        same = chunks.lower(chunk) if masks is None else chunks.lower(chunk) & masks.same

        # Inside the chunk, without the diagonal: a token's read of its own write is added at the end.
        scores, pull = jax.vjp(lambda q, k: chunks.decayed_scores(q, k, G, strict=True, dtype=factors), q, k)
        dq, dk = pull(jnp.where(same, dot("iv,jv->ij", dy, v), 0))
        dv = dot("ij,iv->jv", jnp.where(same, scores, 0), dy) + dot("ck,kv->cv", k * leave, D)
        dq += enter * dot("cv,kv->ck", dy, S)
        dk_leaving = leave * dot("cv,kv->ck", v, D)

        # dL/dG, of which dg is the sum over what follows in the segment. The last token's write leaves undecayed.
        leaving = (k * dk_leaving).at[..., -1, :].set(0)
        dG = q * dq - k * dk - leaving
        dG = dG.at[..., -1, :].add(jnp.sum(leaving, -2) + through * jnp.sum(S * D, -1))
        if G.shape[-1] == 1:
            dG = jnp.sum(dG, -1, keepdims=True)
        dg = chunks.dot("ij,ik->jk", same.astype(dG.dtype), dG)
        if start is not None:
            dg = jnp.where(start[..., None], 0, dg)

        own = jnp.sum(dy * v, -1, keepdims=True)
        return dq + k * own, dk + dk_leaving + q * own, dv + jnp.sum(q * k, -1, keepdims=True) * dy, dg

    def write(x):
        q, _, _, dy, G, start, _ = x
        enter, _, through = chunks.boundary_decays(G, _masks(start))
        return through, dot("ck,cv->kv", q * enter, dy)

    xs = *_chunked_inputs(chunk, (q, k, v, dy), g, start, states.dtype), states
    dstate, _, grads = _run(gradients, write, dfinal, xs, reverse=True)
    dq, dk, dv, dg = (chunks.join(x, q.shape[1]) for x in grads)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), _sum_to(dg, g.shape), None, dstate


_chunked.defvjp(_chunked_forward, _chunked_backward)

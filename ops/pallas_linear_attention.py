"""A TPU kernel of linear attention, chunk by chunk, and one of its gradient; a decay for each head or for each channel.

The state stays in a core's own memory from the first chunk to the last, and so does what the tokens of a chunk are to each other;
q, k, v and y pass through once. Kept for the backward pass are the states that enter the chunks. It runs backwards with
the gradient of the state; the equations are those of `ops.linear_attention`, the grid and the decays are in `ops.pallas_chunks`.
Elsewhere than on a TPU the kernels are interpreted.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ops import dispatch
from ops.kept import keep
from ops.pallas_chunks import (
    ROWS,
    RUNS,
    STATE,
    STATES,
    TOKENS,
    blocks,
    call,
    decays,
    dot,
    flat,
    from_rows,
    give,
    of_head,
    part,
    restarts,
    set_gradient,
    take,
    total,
)
from ops.products import factor_dtype


def attend(
    chunk: int,
    scale: float,
    dtype: DTypeLike,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "_ T _ #K"],
    start: Bool[Array, "B T"] | None,
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Linear attention without bonus, in chunks that divide the length.

    Args:
      chunk: tokens of a chunk, a power of two from `pallas_chunks.LEAST` on.
      scale, dtype: of y.
      q, k, v: of which one token's read sees its write.
      g: log-decays, bounded; the axes of rows and heads are repeated where they are 1.
      start: where the state restarts before a token.
      state: before the first token.

    Returns:
      y and, in float32, the last state.
    """
    B, T, H, _ = q.shape
    g = jnp.broadcast_to(g, (B, T, H, g.shape[-1]))
    if start is None:
        start = jnp.zeros((B, T), bool)
    return _attend(chunk, scale, jnp.dtype(dtype), q, k, v, g, start, state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(chunk, scale, dtype, q, k, v, g, start, state):
    return _forward(chunk, scale, dtype, q, k, v, g, start, state)[0]


def _local(function, chunk, scale, q, k, v):
    interpret = dispatch.current_platform() != "tpu"
    return functools.partial(function, chunk=chunk, scale=scale, factors=factor_dtype(q, k, v), interpret=interpret)


def _forward(chunk, scale, dtype, q, k, v, g, start, state):
    of_decays, axes = decays(g, chunk)
    inputs, outputs = [TOKENS, TOKENS, TOKENS, axes, RUNS, STATE], (TOKENS, STATE, STATES)
    forward = functools.partial(_forward_local, dtype=dtype)
    run = dispatch.local(_local(forward, chunk, scale, q, k, v), inputs, outputs, kernel=True)
    y, final, states = run(q, k, v, of_decays, restarts(start, chunk), state)
    return (y, final), (q, k, v, g, start, keep(states))


def _backward(chunk, scale, dtype, residuals, cotangents):
    q, k, v, g, start, states = residuals
    dy, dfinal = cotangents
    of_decays, axes = decays(g, chunk)
    inputs = [TOKENS, TOKENS, TOKENS, TOKENS, axes, RUNS, STATES, STATE]
    outputs = (TOKENS, TOKENS, TOKENS, axes, STATE)
    run = dispatch.local(_local(_backward_local, chunk, scale, q, k, v), inputs, outputs, kernel=True)
    dq, dk, dv, dg, dstate = run(q, k, v, dy, of_decays, restarts(start, chunk), states, dfinal)
    dg = from_rows(dg)[..., None] if axes == ROWS else dg
    return dq, dk, dv, jnp.where(start[..., None, None], 0, dg), None, dstate


_attend.defvjp(_forward, _backward)


def _forward_local(q, k, v, g, runs, state, *, chunk, scale, dtype, factors, interpret):
    (B, T, H, K), V = q.shape, v.shape[-1]
    at, g = blocks(q, v, chunk), flat(g)
    y, final, states = call(
        functools.partial(_forward_kernel, scale=scale, factors=factors),
        "linear_attention_forward",
        at,
        (K, V),
        interpret,
        in_specs=[at.tokens(K), at.tokens(K), at.tokens(V), at.decays(g), at.runs, at.state],
        out_specs=[at.tokens(V), at.state, at.states],
        out_shape=[
            jax.ShapeDtypeStruct((B, T, H * V), dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
            jax.ShapeDtypeStruct((B, H, T // chunk, K, V), jnp.float32),
        ],
    )(flat(q), flat(k), flat(v), g, runs, state)
    return y.reshape(v.shape), final, states


def _backward_local(q, k, v, dy, g, runs, states, dfinal, *, chunk, scale, factors, interpret):
    K, V = q.shape[-1], v.shape[-1]
    at, arrays = blocks(q, v, chunk, reverse=True), tuple(map(flat, (q, k, v, dy, g)))
    dq, dk, dv, dg, dfirst = call(
        functools.partial(_backward_kernel, scale=scale, factors=factors),
        "linear_attention_backward",
        at,
        (K, V),
        interpret,
        in_specs=[*map(at.tokens, (K, K, V, V)), at.decays(arrays[4]), at.runs, at.states, at.state],
        out_specs=[*map(at.tokens, (K, K, V)), at.decays(arrays[4]), at.state],
        out_shape=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*arrays[:3], arrays[4])),
            jax.ShapeDtypeStruct(dfinal.shape, jnp.float32),
        ],
    )(*arrays, runs, states, dfinal)
    return *(dx.reshape(x.shape) for dx, x in zip((dq, dk, dv, dg), (q, k, v, g), strict=True)), dfirst


def _forward_kernel(
    q_ref, k_ref, v_ref, g_ref, runs_ref, first_ref, y_ref, final_ref, states_ref, S_ref, *, scale, factors
):
    take(first_ref, S_ref)
    states_ref[...] = S_ref[...]
    heads, K, V = S_ref.shape
    for h in range(heads):
        of_keys, of_values = part(h, K), part(h, V)
        q, k, v = (ref[at].astype(jnp.float32) for ref, at in ((q_ref, of_keys), (k_ref, of_keys), (v_ref, of_values)))
        S, at = S_ref[h], of_head(h, g_ref, runs_ref[...], K)
        y = dot(at.scores(q, k, factors), v, (1, 0), factors) + total(q * k) * v
        y_ref[of_values] = (scale * (y + dot(q * at.enter, S, (1, 0), factors))).astype(y_ref.dtype)
        S_ref[h] = at.through * S + dot(k * at.leave, v, (0, 0), factors)
    give(S_ref, final_ref)


def _backward_kernel(
    q_ref, k_ref, v_ref, dy_ref, g_ref, runs_ref, states_ref, dfinal_ref, dq_ref, dk_ref, dv_ref, dg_ref, dfirst_ref, D_ref,
    *, scale, factors,
):  # fmt: skip
    take(dfinal_ref, D_ref)
    heads, K, V = D_ref.shape
    for h in range(heads):
        of_keys, of_values = part(h, K), part(h, V)
        q, k = (ref[of_keys].astype(jnp.float32) for ref in (q_ref, k_ref))
        v, dy = v_ref[of_values].astype(jnp.float32), scale * dy_ref[of_values].astype(jnp.float32)
        S, D, at = states_ref[h], D_ref[h], of_head(h, g_ref, runs_ref[...], K)

        # Without the diagonal: a token's read of its own write is added at the end.
        dq, dk = at.pull(dot(dy, v, (1, 1), factors), q, k, factors)
        dq += at.enter * dot(dy, S, (1, 1), factors)
        dk_leaving = at.leave * dot(v, D, (1, 1), factors)
        dv = dot(at.scores(q, k, factors), dy, (0, 0), factors) + dot(k * at.leave, D, (1, 0), factors)
        set_gradient(dg_ref, h, at.gradient(q * dq - k * dk, k * dk_leaving, S, D))

        own = total(dy * v)
        dq_ref[of_keys] = (dq + k * own).astype(dq_ref.dtype)
        dk_ref[of_keys] = (dk + dk_leaving + q * own).astype(dk_ref.dtype)
        dv_ref[of_values] = (dv + total(q * k) * dy).astype(dv_ref.dtype)
        D_ref[h] = at.through * D + dot(q * at.enter, dy, (0, 0), factors)
    give(D_ref, dfirst_ref)

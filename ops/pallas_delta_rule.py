"""A TPU kernel of the delta rule with beta, chunk by chunk, and one of its gradient; a decay for each head or for each channel.

The state stays in a core's own memory from the first chunk to the last, and so do the system of a chunk and its inverse. Kept
for the backward pass are the states that enter the chunks, from which it computes the rest again. With S such a state, e, l and p
the decays from it to a token, from a token to the end of the chunk and from end to end, and (x, y) the decayed products of rows
of x with earlier rows of y (`Decays.scores`),

    U = (I + beta (k, k))^-1 R,    R = beta Z,    Z = v - (e k) S
    y = (e q) S + (q, k) U + (q . k) U                              S' = p S + (l k)^T U

The chunks' gradients, with D that of S':

    dU = (q, k)^T dy + (q . k) dy + (l k) D                         dR = (I + beta (k, k))^-T dU
    d(q, k) = dy U^T,    d(k, k) = -beta dR U^T                     dZ = dv = beta dR
    dS = p D + (e q)^T dy - (e k)^T dZ                              dbeta = sum_v dR Z - sum_j (dR U^T) (k, k)

The system, its inverse and what leads from state to state are float32; all other products are of the type of the inputs. The
grid and the decays are in `ops.pallas_chunks`. Elsewhere than on a TPU the kernels are interpreted.
"""

import functools

import jax
import jax.numpy as jnp
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
    column,
    decays,
    dot,
    flat,
    from_rows,
    give,
    in_rows,
    of_head,
    pairs,
    part,
    places,
    restarts,
    row,
    set_gradient,
    take,
    total,
)
from ops.products import factor_dtype


def apply(
    chunk: int,
    scale: float,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    g: Float[Array, "B T H #K"],
    start: Bool[Array, "B T"] | None,
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The delta rule over any number of tokens.

    Args:
      chunk: tokens of a chunk, a power of two from `pallas_chunks.LEAST` on.
      scale: of y.
      q, k, v: zero on padding, as is beta.
      beta, g: float32; log-decays bounded.
      start: where the state restarts before a token.
      state: before the first token, float32.

    Returns:
      y in the dtype of v, and the last state in float32.
    """
    if start is None:
        start = jnp.zeros(q.shape[:2], bool)
    # Filled up in front, so that the last token is the last of its chunk and leaves its write undecayed there.
    excess = -q.shape[1] % chunk
    fill = lambda x: jnp.pad(x, ((0, 0), (excess, 0)) + ((0, 0),) * (x.ndim - 2)) if excess else x
    y, final = _apply(chunk, scale, *map(fill, (q, k, v, beta, g, start)), state)
    return y[:, excess:], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _apply(chunk, scale, q, k, v, beta, g, start, state):
    return _forward(chunk, scale, q, k, v, beta, g, start, state)[0]


def _local(function, chunk, scale, q, k, v):
    interpret = dispatch.current_platform() != "tpu"
    return functools.partial(function, chunk=chunk, scale=scale, factors=factor_dtype(q, k, v), interpret=interpret)


def _forward(chunk, scale, q, k, v, beta, g, start, state):
    of_decays, axes = decays(g, chunk)
    inputs, outputs = [TOKENS, TOKENS, TOKENS, ROWS, axes, RUNS, STATE], (TOKENS, STATE, STATES)
    run = dispatch.local(_local(_forward_local, chunk, scale, q, k, v), inputs, outputs, kernel=True)
    y, final, states = run(q, k, v, in_rows(beta, chunk), of_decays, restarts(start, chunk), state)
    return (y, final), (q, k, v, beta, g, start, keep(states))


def _backward(chunk, scale, residuals, cotangents):
    q, k, v, beta, g, start, states = residuals
    dy, dfinal = cotangents
    of_decays, axes = decays(g, chunk)
    inputs = [TOKENS, TOKENS, TOKENS, TOKENS, ROWS, axes, RUNS, STATES, STATE]
    outputs = (TOKENS, TOKENS, TOKENS, ROWS, axes, STATE)
    run = dispatch.local(_local(_backward_local, chunk, scale, q, k, v), inputs, outputs, kernel=True)
    arguments = q, k, v, dy, in_rows(beta, chunk), of_decays, restarts(start, chunk), states, dfinal
    dq, dk, dv, dbeta, dg, dstate = run(*arguments)
    dg = from_rows(dg)[..., None] if axes == ROWS else dg
    return dq, dk, dv, from_rows(dbeta), jnp.where(start[..., None, None], 0, dg), None, dstate


_apply.defvjp(_forward, _backward)


def _forward_local(q, k, v, beta, g, runs, state, *, chunk, scale, factors, interpret):
    (B, T, H, K), V = q.shape, v.shape[-1]
    at, g = blocks(q, v, chunk), flat(g)
    y, final, states = call(
        functools.partial(_forward_kernel, scale=scale, factors=factors),
        "delta_rule_forward",
        at,
        (K, V),
        interpret,
        in_specs=[*map(at.tokens, (K, K, V)), at.rows, at.decays(g), at.runs, at.state],
        out_specs=[at.tokens(V), at.state, at.states],
        out_shape=[
            jax.ShapeDtypeStruct((B, T, H * V), v.dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
            jax.ShapeDtypeStruct((B, H, T // chunk, K, V), jnp.float32),
        ],
    )(flat(q), flat(k), flat(v), beta, g, runs, state)
    return y.reshape(v.shape), final, states


def _backward_local(q, k, v, dy, beta, g, runs, states, dfinal, *, chunk, scale, factors, interpret):
    K, V = q.shape[-1], v.shape[-1]
    at, arrays = blocks(q, v, chunk, reverse=True), tuple(map(flat, (q, k, v, dy, beta, g)))
    found = call(
        functools.partial(_backward_kernel, scale=scale, factors=factors),
        "delta_rule_backward",
        at,
        (K, V),
        interpret,
        in_specs=[*map(at.tokens, (K, K, V, V)), at.rows, at.decays(arrays[5]), at.runs, at.states, at.state],
        out_specs=[*map(at.tokens, (K, K, V)), at.rows, at.decays(arrays[5]), at.state],
        out_shape=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*arrays[:3], *arrays[4:])),
            jax.ShapeDtypeStruct(dfinal.shape, jnp.float32),
        ],
    )(*arrays, runs, states, dfinal)
    return *(dx.reshape(x.shape) for dx, x in zip(found[:5], (q, k, v, beta, g), strict=True)), found[5]


# ------------------------------------------------------------------------------------------------------ in a kernel


def _inverse(A: Float[Array, "C C"]) -> Float[Array, "C C"]:
    """(I + A)^-1 of a strictly lower triangular A, by the inverses of ever larger blocks on the diagonal.

    Those of two neighbours, X and Y, and B below the one and beside the other make (X, 0; -Y B X, Y) of both. It is as accurate
    as substitution; a power series of A is not, see `ops.triangular`.
    """
    i, j = places(len(A))
    inverse = jnp.where(i == j, 1.0, 0.0) - jnp.where(pairs(len(A), 1), A, 0.0)
    block = 2
    while block < len(A):
        below = jnp.where(pairs(len(A), block), A, 0.0)
        inverse -= dot(dot(inverse, below, (1, 0)), inverse, (1, 0))
        block *= 2
    return inverse


def _solved(k, v, beta, at, S, factors):
    """(k, k), the inverse of the system, Z and U, as at the top of this file."""
    # One decay for all channels comes after the product, which is then exact of keys that are rounded already.
    keys = at.scores(k, k, factors if at.shared else jnp.float32)
    inverse = _inverse(beta * keys)
    Z = v - dot(at.enter * k, S, (1, 0))
    return keys, inverse, Z, dot(inverse, beta * Z, (1, 0))


def _forward_kernel(
    q_ref, k_ref, v_ref, beta_ref, g_ref, runs_ref, first_ref, y_ref, final_ref, states_ref, S_ref, *, scale, factors
):
    take(first_ref, S_ref)
    states_ref[...] = S_ref[...]
    heads, K, V = S_ref.shape
    for h in range(heads):
        of_keys, of_values = part(h, K), part(h, V)
        q, k, v = (ref[at].astype(jnp.float32) for ref, at in ((q_ref, of_keys), (k_ref, of_keys), (v_ref, of_values)))
        beta, S, at = column(beta_ref[h]), S_ref[h], of_head(h, g_ref, runs_ref[...], K)
        _, _, _, U = _solved(k, v, beta, at, S, factors)
        y = dot(at.enter * q, S, (1, 0), factors) + dot(at.scores(q, k, factors), U, (1, 0), factors)
        y_ref[of_values] = (scale * (y + total(q * k) * U)).astype(y_ref.dtype)
        S_ref[h] = at.through * S + dot(at.leave * k, U, (0, 0))
    give(S_ref, final_ref)


def _backward_kernel(
    q_ref, k_ref, v_ref, dy_ref, beta_ref, g_ref, runs_ref, states_ref, dfinal_ref,
    dq_ref, dk_ref, dv_ref, dbeta_ref, dg_ref, dfirst_ref, D_ref, *, scale, factors,
):  # fmt: skip
    take(dfinal_ref, D_ref)
    heads, K, V = D_ref.shape
    for h in range(heads):
        of_keys, of_values = part(h, K), part(h, V)
        q, k = (ref[of_keys].astype(jnp.float32) for ref in (q_ref, k_ref))
        v, dy = v_ref[of_values].astype(jnp.float32), scale * dy_ref[of_values].astype(jnp.float32)
        beta, at, S, D = column(beta_ref[h]), of_head(h, g_ref, runs_ref[...], K), states_ref[h], D_ref[h]
        keys, inverse, Z, U = _solved(k, v, beta, at, S, factors)

        dU = dot(at.scores(q, k, factors), dy, (0, 0), factors) + total(q * k) * dy + dot(at.leave * k, D, (1, 0))
        dR = dot(inverse, dU, (0, 0))
        dZ = beta * dR
        dsystem = -dot(dR, U, (1, 1))
        dbeta_ref[h] = row(total(dR * Z) + total(dsystem * keys))
        dv_ref[of_values] = dZ.astype(dv_ref.dtype)

        # A token reads by q and, what the state holds, by k; it writes by k, inside the chunk and into the state behind it.
        dq, dk = at.pull(dot(dy, U, (1, 1), factors), q, k, factors)
        dk_held, dk_system = at.pull(beta * dsystem, k, k, factors if at.shared else jnp.float32)
        dq += at.enter * dot(dy, S, (1, 1), factors)
        dk_held -= at.enter * dot(dZ, S, (1, 1))
        dk += dk_system
        dk_leaving = at.leave * dot(U, D, (1, 1))
        set_gradient(dg_ref, h, at.gradient(q * dq + k * (dk_held - dk), k * dk_leaving, S, D))

        own = total(dy * U)  # each token's read of its own write
        dq_ref[of_keys] = (dq + own * k).astype(dq_ref.dtype)
        dk_ref[of_keys] = (dk + dk_held + dk_leaving + own * q).astype(dk_ref.dtype)
        D_ref[h] = at.through * D + dot(at.enter * q, dy, (0, 0), factors) - dot(at.enter * k, dZ, (0, 0))
    give(D_ref, dfirst_ref)

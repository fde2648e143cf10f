"""Selective scan of Mamba (arXiv 2312.00752): h_t = exp(dt_t A) * h_{t-1} + dt_t B_t x_t, y_t = C_t . h_t + D * x_t.

Fused with its read-out, so that the states of all tokens, [B, T, D, N], never exist at once. The state is [B, N, D]:
the long axis last, where vector units want it.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ops import dispatch, kept, pallas_selective_scan, segments, sequence
from ops.linear_recurrence import time_major_recurrence
from ops.token_loop import chunking, join, split, token_loop

_CHUNK = {"sequential": 32, "chunked": 64, "blocked": 64}


@dispatch.primitive("reference", "sequential", "chunked", "blocked", matmul="chunked", tpu=("pallas",))
def selective_scan(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    D: Float[Array, "D"] | None = None,
    *,
    initial_state: Float[Array, "B N D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    axis: str | None = None,
    implementation: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B N D"]]:
    """Runs the selective state space over `x`.

    Args:
      x: inputs, float32, bfloat16 or float64.
      dt: step sizes, > 0.
      A: continuous-time transition, < 0.
      B, C: input and output coefficients of each token, shared by the channels.
      D: skip coefficients; none by default.
      initial_state: h before the first token. Zero by default.
      segment_ids: 0 is padding, a change restarts the state; see `ops.segments`.
      axis: the logical name of the channels D, by which a mesh may split them (`models.partitioning`).
      implementation: "reference" (token by token, plain autodiff), "sequential" (token by token, own derivative),
        "chunked" (parallel prefix inside chunks), "blocked" (inside chunks as that form of `linear_recurrence`) or "pallas" (a
        TPU kernel, for float32 and bfloat16; interpreted elsewhere); all but the first keep one state per chunk for the backward
        pass. "auto" is sequential on a CPU, blocked on a GPU, the kernel on a TPU where it applies, and else chunked.
      chunk_size: tokens per chunk (None: 32 for sequential, 64 for chunked and blocked); the kernel has its own.

    Returns:
      y [B, T, D] in the dtype of `x`, zero on padding, and the final state [B, N, D] in float32 (float64 for float64
      inputs).

    Raises:
      ValueError: if shapes disagree or the implementation is unknown.
    """
    _check(x, dt, A, B, C, D, initial_state, segment_ids)
    offered = ("reference", "sequential", "chunked", "blocked")
    offered += ("pallas",) * pallas_selective_scan.supports(x, dt, A, B, C)
    policies = {"cpu": "sequential", "gpu": "blocked", "tpu": "pallas" if "pallas" in offered else "chunked"}
    policy = policies.get(dispatch.current_platform(), "chunked")
    form = dispatch.choose("selective_scan", implementation, policy, offered)
    batch, length, width = x.shape
    dtype = jnp.promote_types(jnp.result_type(x, dt, A, B, C), jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((batch, A.shape[1], width), dtype)
    if sequence.is_split(length):
        options = {"implementation": implementation, "chunk_size": chunk_size}
        return _over_shards(x, dt, A, B, C, D, initial_state.astype(dtype), segment_ids, options)
    # With dt = 0 a padding token leaves the state as it is.
    tokens = tuple(segments.zero_padding(z, segment_ids) for z in (x, dt, B, C))
    start = None if segment_ids is None else segments.is_start(segment_ids)
    state, A = initial_state.astype(dtype), A.astype(dtype).T
    if form == "pallas" and length > 1:
        skip = jnp.zeros(width, dtype) if D is None else D.astype(dtype)
        y, state = pallas_selective_scan.scan(*tokens[:2], A, *tokens[2:], skip, state, start, axis)
        return segments.zero_padding(y, segment_ids), state
    x32, dt, B, C = (z.astype(dtype) for z in tokens)
    inputs = tuple(jnp.moveaxis(z, 1, 0) for z in (x32, dt, B, C))
    inputs += (None if start is None else start.T,)

    if form == "reference" or length == 1:
        state, y = lax.scan(functools.partial(_step, A), state, inputs)
    else:
        of_channels, shared, states = (None, "batch", axis), (None, "batch", None), ("batch", None, axis)
        axes = [(None, axis), states, of_channels, of_channels, shared, shared, (None, "batch")]
        arrays = (A, state, *(z for z in inputs if z is not None))
        run = functools.partial(_chunks, form, chunk_size or _CHUNK[form])
        state, y = dispatch.local(run, axes[: len(arrays)], (states, of_channels))(*arrays)
    y = jnp.moveaxis(y, 0, 1)
    if D is not None:
        y = y + D.astype(dtype) * x32
    return segments.zero_padding(y, segment_ids).astype(x.dtype), state


def _over_shards(x, dt, A, B, C, D, state, segment_ids, options):
    def run(state, segment_ids, x, dt, A, B, C, D):
        where = {"initial_state": state, "segment_ids": segment_ids}
        y, state = selective_scan(x, dt, A, B, C, D, **where, **options)
        return (y,), state

    def total(segment_ids, x, dt, A, B, C, D):
        _, own = selective_scan(x, dt, A, B, C, segment_ids=segment_ids, **options)
        steps = segments.zero_padding(dt, segment_ids).astype(own.dtype)
        decay = jnp.exp(jnp.sum(steps, 1)[:, None] * A.astype(own.dtype).T)
        if segment_ids is not None:
            restarts = jnp.any(segments.is_start(segment_ids), axis=1)
            decay = _restart(decay, restarts)
        return decay, own

    tokens, coefficients = ("batch", "length", "mlp"), ("batch", "length", None)
    axes = {"x": tokens, "dt": tokens, "A": ("mlp", None), "B": coefficients, "C": coefficients, "D": ("mlp",)}
    arguments = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D}
    (y,), state = sequence.recurrence(
        run, total, arguments, axes, [(tokens, x.shape)], state, ("batch", None, "mlp"), segment_ids
    )
    return y, state


def _check(x, dt, A, B, C, D, initial_state, segment_ids):
    if x.ndim != 3 or A.ndim != 2:
        raise ValueError(f"x must be [B, T, D] and A [D, N]; got {x.shape} and {A.shape}")
    batch, length, width = x.shape
    expected = {
        "dt": (dt, x.shape),
        "A": (A, (width, A.shape[1])),
        "B": (B, (batch, length, A.shape[1])),
        "C": (C, (batch, length, A.shape[1])),
        "D": (D, (width,)),
        "initial_state": (initial_state, (batch, A.shape[1], width)),
        "segment_ids": (segment_ids, (batch, length)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must be {shape}, to agree with x {x.shape} and A {A.shape}; got {array.shape}")


# One token's sums over states (N) and channels (D) are written as dot products: XLA on CPU makes vector code of those,
# and scalar code of a sum over an axis that is not the last.


def _over_states(h, weights):
    return jnp.einsum("bnd,bn->bd", h, weights, precision=dispatch.matmul_precision(h.dtype))


def _over_channels(h, weights):
    return jnp.einsum("bnd,bd->bn", h, weights, precision=dispatch.matmul_precision(h.dtype))


def _restart(h, start):
    return h if start is None else jnp.where(start[:, None, None], 0.0, h)


def _step(A, h, token):
    x, dt, B, C, start = token
    h = jnp.exp(dt[:, None] * A) * _restart(h, start) + (dt * x)[:, None] * B[..., None]
    return h, _over_states(h, C)


def _step_backward(A, before, token, dh, dy):
    x, dt, B, C, start = token
    decay = jnp.exp(dt[:, None] * A)
    decayed = decay * _restart(before, start)
    h = decayed + (dt * x)[:, None] * B[..., None]
    dh = dh + dy[:, None] * C[..., None]
    dC = _over_channels(h, dy)
    dB = _over_channels(dh, dt * x)
    dxdt = _over_states(dh, B)
    dlog = dh * decayed  # cotangent of dt A
    ddt = _over_states(dlog * A, jnp.ones_like(B)) + dxdt * x
    dA = jnp.sum(dlog * dt[:, None], axis=0)
    return dA, _restart(decay * dh, start), (dxdt * dt, ddt, dB, dC, None)


def _chunks(form, chunk_size, A, state, x, dt, B, C, start=None):
    """All chunks, one after the other; of a mesh, on the channels and rows of a device alone: the gradient of A is then summed
    over the devices once, and not in the loop."""
    if form == "blocked":
        # A for each row, so that its gradient is a sum over tokens and then one over rows. For a sum over both at once XLA turns
        # everything that has the size of all states into another order of axes, which doubles the traffic.
        A = lax.optimization_barrier(jnp.broadcast_to(A, state.shape))
    inputs = split((x, dt, B, C, start), *chunking(len(x), chunk_size))
    if form == "sequential":
        state, y = token_loop(_step, _step_backward, A, state, inputs)
    else:
        state, y = kept.scan(functools.partial(_chunk, form, A), state, inputs)
    return state, join(y, len(x))


def _chunk(form, A, h, tokens):
    x, dt, B, C, start = tokens
    decay = jnp.exp(dt[:, :, None] * A)
    if start is not None:
        decay = jnp.where(start[..., None, None], 0.0, decay)
    inflow = (dt * x)[:, :, None] * B[..., None]
    if form == "blocked":
        (h,), (final,) = time_major_recurrence("blocked", (decay,), (inflow,), (h,), None, kept=False)
        return final, jnp.sum(h * C[..., None], 2)
    (h,), (final,) = time_major_recurrence("associative", (decay,), (inflow,), (h,), None, kept=False)
    return final, jnp.einsum("cbnd,cbn->cbd", h, C, precision=dispatch.matmul_precision(h.dtype))

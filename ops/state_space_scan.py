"""Scan of a time-invariant diagonal state space: h_t = a * h_{t-1} + b x_t, y_t = 2 Re(sum_n c_n h_{t,n}).

The recurrent form of S4D (arXiv 2206.11893) and DSS (2203.14343), one single-input single-output system per channel.
It computes what `long_convolution` with the kernel 2 Re(sum_n c_n b_n a_n^l) computes, but from a state that can be
carried and restarted, which streaming and packing need. The state is [B, N, D]: the long axis last, where vector units
want it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ops import dispatch, kept, segments
from ops.linear_recurrence import time_major_recurrence
from ops.token_loop import join, segment_masks, split_masked, token_loop

Matrix = tuple[Float[Array, "D N"], Float[Array, "D N"]]
State = tuple[Float[Array, "B N D"], Float[Array, "B N D"]]

_CHUNK = {"sequential": 32, "chunked": 64}


@dispatch.primitive("reference", "sequential", "chunked", matmul="chunked")
def state_space_scan(
    x: Float[Array, "B T D"],
    a: Matrix,
    b: Matrix,
    c: Matrix,
    *,
    initial_state: State | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T D"], State]:
    """Runs the state space over `x`; complex numbers are (real, imaginary) pairs.

    Args:
      x: inputs, float32, bfloat16 or float64.
      a, b, c: discrete transition, input and output coefficients; N counts one of each conjugate pair.
      initial_state: h before the first token. Zero by default.
      segment_ids: 0 is padding, a change restarts the state; see `ops.segments`.
      implementation: "reference" (token by token, plain autodiff), "sequential" (token by token, own derivative) or
        "chunked" (parallel prefix inside chunks); the last two keep one state per chunk for the backward pass. "auto"
        is sequential on CPU and chunked elsewhere.
      chunk_size: tokens per chunk (None: 32 for sequential, 64 for chunked).

    Returns:
      y [B, T, D] in the dtype of `x`, zero on padding, and the final state, a pair of [B, N, D] in float32 (float64 for
      float64 inputs).

    Raises:
      ValueError: if shapes disagree or the implementation is unknown.
    """
    policy = "sequential" if dispatch.on_cpu() else "chunked"
    form = dispatch.choose("state_space_scan", implementation, policy)
    _check(x, a, b, c, initial_state, segment_ids)
    batch, length, width = x.shape
    dtype = jnp.promote_types(jnp.result_type(x, *a, *b, *c), jnp.float32)
    if initial_state is None:
        initial_state = (jnp.zeros((batch, a[0].shape[1], width), dtype),) * 2
    coefficients = jax.tree.map(lambda z: z.astype(dtype).T, (a, b, c))
    state = tuple(h.astype(dtype) for h in initial_state)
    masks = segment_masks(segment_ids)
    inputs = jnp.moveaxis(segments.zero_padding(x, segment_ids).astype(dtype), 1, 0)

    if form == "reference" or length == 1:
        state, y = lax.scan(functools.partial(_step, coefficients), state, (inputs, masks))
    else:
        rows, of_tokens = ("batch",), (None, "batch")
        run = functools.partial(_chunks, form, chunk_size or _CHUNK[form])
        state, y = dispatch.local(run, [(), rows, of_tokens], (rows, of_tokens))(coefficients, state, (inputs, masks))
    return segments.zero_padding(jnp.moveaxis(y, 0, 1).astype(x.dtype), segment_ids), state


def _chunks(form, chunk_size, coefficients, state, inputs):
    """All chunks, one after the other; of a mesh, on the rows of a device alone: gradients of the coefficients are then summed
    over the devices once, and not in the loop."""
    tokens = split_masked(*inputs, chunk_size)
    if form == "sequential":
        state, y = token_loop(_step, _step_backward, coefficients, state, tokens)
    else:
        state, y = kept.scan(functools.partial(_chunk, coefficients), state, tokens)
    return state, join(y, len(inputs[0]))


def _check(x, a, b, c, initial_state, segment_ids):
    if x.ndim != 3:
        raise ValueError(f"x must be [B, T, D]; got {x.shape}")
    batch, length, width = x.shape
    parts = [z for pair in (a, b, c) for z in pair]
    states = parts[0].shape[-1]
    if len(parts) != 6 or any(z.shape != (width, states) for z in parts):
        raise ValueError(f"a, b and c must be pairs of [{width}, N] with one N; got {[z.shape for z in parts]}")
    shape = (batch, states, width)
    if initial_state is not None and (len(initial_state) != 2 or any(h.shape != shape for h in initial_state)):
        raise ValueError(f"initial_state must be a pair of {shape}")
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"segment_ids must be {(batch, length)}; got {segment_ids.shape}")


def _over_states(h):
    """Sum over N, as a dot product: XLA on CPU makes scalar code of a sum over an axis that is not the last."""
    return jnp.einsum("bnd,bn->bd", h, jnp.ones_like(h[..., 0]), precision=dispatch.matmul_precision(h.dtype))


def _where(mask, x, y):
    return tuple(jnp.where(mask[:, None, None], p, q) for p, q in zip(x, y, strict=True))


def _advance(coefficients, before, token):
    """The state before the token, restarted where it must be, and the state after it."""
    (ar, ai), (br, bi), _ = coefficients
    x, masks = token
    hr, hi = before if masks is None else _where(masks[0], (0.0, 0.0), before)
    after = ar * hr - ai * hi + br * x[:, None], ar * hi + ai * hr + bi * x[:, None]
    return (hr, hi), after if masks is None else _where(masks[1], after, (hr, hi))


def _step(coefficients, h, token):
    cr, ci = coefficients[2]
    _, (hr, hi) = _advance(coefficients, h, token)
    return (hr, hi), _over_states(2 * (cr * hr - ci * hi))


def _step_backward(coefficients, before, token, dh, dy):
    (ar, ai), (br, bi), (cr, ci) = coefficients
    x, masks = token
    before, (hr, hi) = _advance(coefficients, before, token)
    read = 2 * dy[:, None]
    dr, di = dh[0] + cr * read, dh[1] - ci * read
    dx = _over_states(br * dr + bi * di)
    db = jnp.sum(dr * x[:, None], 0), jnp.sum(di * x[:, None], 0)
    dc = jnp.sum(hr * read, 0), -jnp.sum(hi * read, 0)
    da = dr * before[0] + di * before[1], di * before[0] - dr * before[1]
    earlier = ar * dr + ai * di, ar * di - ai * dr
    if masks is not None:
        restart, valid = masks
        da = _where(valid, da, (0.0, 0.0))
        earlier = _where(restart, (0.0, 0.0), _where(valid, earlier, (dr, di)))
    return (tuple(jnp.sum(z, 0) for z in da), db, dc), earlier, (dx, None)


def _chunk(coefficients, h, tokens):
    a, b, (cr, ci) = coefficients
    x, masks = tokens
    inflow = tuple(z * x[:, :, None] for z in b)
    (hr, hi), final = time_major_recurrence("associative", a, inflow, h, masks, kept=False)
    return final, 2 * jnp.sum(cr * hr - ci * hi, axis=2)

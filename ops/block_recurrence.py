"""Linear recurrence of pairs of numbers: h_t = M h_{t-1} + f_t with a constant 2 x 2 matrix M for each channel.

Two coupled states per channel, such as the velocity and the place of an oscillator (LinOSS, arXiv 2410.03943). M need not be
diagonalisable, so that this is not a complex diagonal recurrence.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ops import dispatch, kept, segments
from ops.token_loop import join, segment_masks, split_masked

_CHUNK = {"sequential": 32, "associative": 64}


@dispatch.primitive("reference", "sequential", "associative")
def block_recurrence(
    m: Float[Array, "2 2 N"],
    f: Float[Array, "B T 2 N"],
    *,
    initial_state: Float[Array, "B 2 N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T 2 N"], Float[Array, "B 2 N"]]:
    """Runs the recurrence along axis 1.

    Args:
      m: the matrices. That their powers do not grow is the caller's business.
      f: inputs.
      initial_state: h before the first token. Zero by default.
      segment_ids: 0 is padding, a change restarts the state; see `ops.segments`.
      implementation: "reference" (token by token, plain autodiff), "sequential" (token by token) or "associative" (parallel
        prefix); the last two keep one state per chunk of tokens for the backward pass. "auto" is sequential on CPU and
        associative elsewhere.

    Returns:
      h in the dtype of `f`, zero on padding, and the final state in float32 (float64 for float64 inputs).

    Raises:
      ValueError: if shapes disagree or the implementation is unknown.
    """
    policy = "sequential" if dispatch.on_cpu() else "associative"
    form = dispatch.choose("block_recurrence", implementation, policy)
    batch, length, *shape = f.shape
    if len(shape) != 2 or shape[0] != 2 or m.shape != (2, *shape):
        raise ValueError(f"f must be [B, T, 2, N] and m [2, 2, N]; got {f.shape} and {m.shape}")
    if initial_state is not None and initial_state.shape != (batch, *shape):
        raise ValueError(f"initial_state must be {(batch, *shape)}; got {initial_state.shape}")
    dtype = jnp.promote_types(jnp.result_type(f, m), jnp.float32)
    h = jnp.zeros((batch, *shape), dtype) if initial_state is None else initial_state.astype(dtype)
    m = m.astype(dtype)
    inputs, masks = jnp.swapaxes(segments.zero_padding(f, segment_ids), 0, 1).astype(dtype), segment_masks(segment_ids)
    if form == "reference" or length == 1:
        h, all_h = _sequential_chunk(m, h, (inputs, masks))
    else:
        rows, of_tokens = ("batch",), (None, "batch")
        run = functools.partial(_chunks, form)
        h, all_h = dispatch.local(run, [(), rows, of_tokens], (rows, of_tokens))(m, h, (inputs, masks))
    return segments.zero_padding(jnp.swapaxes(all_h, 0, 1).astype(f.dtype), segment_ids), h


def _chunks(form, m, h, inputs):
    """All chunks, one after the other; of a mesh, on the rows of a device alone: the gradient of m is then summed over the
    devices once, and not in the loop."""
    chunk = _sequential_chunk if form == "sequential" else _associative_chunk
    h, all_h = kept.scan(functools.partial(chunk, m), h, split_masked(*inputs, _CHUNK[form]))
    return h, join(all_h, len(inputs[0]))


def _step(m, h, token):
    f, masks = token
    if masks is not None:
        h = jnp.where(masks[0][:, None, None], 0, h)
    new = _apply(m, h) + f
    if masks is not None:
        new = jnp.where(masks[1][:, None, None], new, h)
    return new, new


def _sequential_chunk(m, h, tokens):
    return lax.scan(functools.partial(_step, m), h, tokens)


def _associative_chunk(m, h, tokens):
    f, masks = tokens
    if masks is None:
        m = jnp.broadcast_to(m, (f.shape[0], 1, *m.shape))
    else:
        restart, valid = (mask[..., None, None, None] for mask in masks)
        m = jnp.where(restart, 0, jnp.where(valid, m, jnp.eye(2, dtype=m.dtype)[..., None]))

    def combine(left, right):
        (m1, f1), (m2, f2) = left, right
        product = jnp.sum(m2[..., :, :, None, :] * m1[..., None, :, :, :], axis=-3)
        return product, _apply(m2, f1) + f2

    m, f = lax.associative_scan(combine, (m, f))
    h = _apply(m, h) + f
    return h[-1], h


def _apply(m, h):
    """M h for m [..., 2, 2, N] and h [..., 2, N]."""
    return jnp.sum(m * h[..., None, :, :], axis=-2)

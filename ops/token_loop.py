"""A loop over tokens whose backward pass keeps one state per chunk and recomputes the others.

Differentiating `lax.scan` keeps whatever every step computed, which fills memory and makes training a recurrence with a
large state slow. Here the derivative of one token's step is given by hand and the states are recomputed chunk by chunk,
so that they never leave the cache.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from ops import segments
from ops.kept import keep

Masks = tuple[Bool[Array, "T B"], Bool[Array, "T B"]] | None  # `segment_masks`


def chunking(length: int, chunk_size: int) -> tuple[int, int]:
    """Number and size (at most `chunk_size`) of equal chunks that cover `length` tokens with the least excess."""
    count = -(-length // chunk_size)
    return count, -(-length // count)


def split(tree, count: int, size: int):
    """Cuts arrays [T, ...] into [count, size, ...], with zeros (False) after the last token."""

    def one(x):
        x = jnp.pad(x, [(0, count * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(count, size, *x.shape[1:])

    return jax.tree.map(one, tree)


def segment_masks(segment_ids: Int[Array, "B T"] | None) -> Masks:
    """For a recurrence over tokens: `restart` and `valid`, time first.

    The state restarts before a token with `restart`; a token that is not `valid` leaves it as it is.
    """
    if segment_ids is None:
        return None
    return segments.is_start(segment_ids).T, (segment_ids != 0).T


def split_masked(inputs, masks: Masks, chunk_size: int):
    """Cuts (inputs, masks) into chunks of at most `chunk_size` tokens.

    Where the last chunk is not full there are masks even if there were none: they tell its tail from tokens, which the tail's
    zeros are not, because they would let the state decay.

    Args:
      inputs: tree of arrays [T, B, ...].
      masks: from `segment_masks`.
      chunk_size: as of `chunking`.
    """
    length, batch = jax.tree.leaves(inputs)[0].shape[:2]
    count, size = chunking(length, chunk_size)
    if count * size > length and masks is None:
        masks = jnp.zeros((length, batch), bool), jnp.ones((length, batch), bool)
    return split((inputs, masks), count, size)


def join(tree, length: int):
    """The inverse of `split`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:length], tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def token_loop(step: Callable, step_backward: Callable, parameters, state, inputs):
    """Scans `step` over chunks of tokens.

    Args:
      step: (parameters, state, x) -> (state, y), for one token.
      step_backward: (parameters, state before the token, x, dstate, dy) -> (dparameters, dstate before the token, dx).
      parameters: what is the same for all tokens.
      state: the state before the first token.
      inputs: tree of arrays [count, size, ...], as `split` makes them.

    Returns:
      The final state and the outputs [count, size, ...].
    """
    return _forward(step, step_backward, parameters, state, inputs)[0]


def _forward(step, step_backward, parameters, state, inputs):
    def chunk(h, xs):
        end, y = lax.scan(functools.partial(step, parameters), h, xs)
        return end, (y, h)

    final, (y, entries) = lax.scan(chunk, state, inputs)
    return (final, y), (parameters, keep(entries), inputs)


def _backward(step, step_backward, residuals, cotangents):
    parameters, entries, inputs = residuals
    dfinal, dy = cotangents

    def recompute(h, x):
        return step(parameters, h, x)[0], h

    def backward(carry, token):
        dstate, total = carry
        before, x, dyt = token
        dparameters, dstate, dx = step_backward(parameters, before, x, dstate, dyt)
        return (dstate, jax.tree.map(jnp.add, total, dparameters)), dx

    def chunk(carry, xs):
        entry, x, dyc = xs
        before = lax.scan(recompute, entry, x)[1]
        return lax.scan(backward, carry, (before, x, dyc), reverse=True)

    zeros = jax.tree.map(jnp.zeros_like, parameters)
    (dstate, dparameters), dinputs = lax.scan(chunk, (dfinal, zeros), (entries, inputs, dy), reverse=True)
    return dparameters, dstate, dinputs


token_loop.defvjp(_forward, _backward)

"""State spaces whose matrix is diagonal plus low rank, A = Diag(lambda) - p p*: S4 (arXiv 2111.00396).

h' = A h + b x, y = 2 Re(c . h) for each channel, with one of each pair of conjugate states kept, discretised by the bilinear
rule: (2/dt - A) h_t = (2/dt + A) h_{t-1} + 2 b x_t. Applying the inverse on the left costs O(N) by Woodbury's identity, both in
the recurrence (`dplr_scan`) and in the generating function of its kernel (`dplr_kernel`).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from ops import dispatch, kept, segments
from ops.token_loop import chunking, join, segment_masks, split_masked

Pair = tuple[Float[Array, "D N"], Float[Array, "D N"]]
State = tuple[Float[Array, "B D N"], Float[Array, "B D N"]]

_ALIAS = 1e-6  # r^M, of what wraps around in the inverse transform
_FREQUENCIES = 512  # per block: bounds the Cauchy matrix
_CHUNK = 32


def dplr_kernel(
    a: Pair,
    p: Pair,
    b: Pair,
    c: tuple[Float[Array, "R D N"], Float[Array, "R D N"]],
    dt: Float[Array, "D"],
    length: int,
) -> Float[Array, "R D length"]:
    """K_l = 2 Re(c . Abar^l Bbar) for l = 0 .. length - 1.

    The generating function sum_l K_l w^l is (theorem 3 of the paper), with z = 2 (1 - w) / (1 + w) and
    k(u, v) = sum_n u_n v_n / (z / dt - lambda_n) over all states,

        2 / (1 + w) (k(c, b) - k(c, p) k(p*, b) / (1 + k(p*, p))).

    The paper evaluates it at the roots of unity of order `length`, where it is that of the infinite kernel folded onto
    `length` entries; a factor 1 - Abar^length in c undoes that, so that its parameter belongs to one length. Here w runs over
    M >= 4 length points of a circle of radius r < 1, r^M = 1e-6: what is folded is damped to rounding errors, c is c, and
    no point meets the pole of z.

    Args:
      a: (real, imaginary) parts of lambda; real parts are negative.
      p, b: of the low-rank term and of the input map.
      c: of R read-outs.
      dt: sizes of the steps.
      length: number of lags.
    """
    dtype = jnp.promote_types(a[0].dtype, jnp.float32)
    a, p, b, c = (lax.complex(re.astype(dtype), im.astype(dtype)) for re, im in (a, p, b, c))
    reads = c.shape[0]
    size = 1 << (4 * length - 1).bit_length()
    damping = -math.log(_ALIAS) / size
    half = np.tanh((damping + 2j * np.pi * np.arange(size // 2 + 1) / size) / 2)  # z / 2; and 2 / (1 + w) = 1 + z / 2
    count, block = chunking(len(half), _FREQUENCIES)
    half = np.pad(half, (0, count * block - len(half)), constant_values=1).reshape(count, block)
    numerators = jnp.concatenate([c * b, c * p, (jnp.conj(p) * b)[None], (jnp.conj(p) * p)[None]])
    numerators = jnp.concatenate([numerators, jnp.conj(numerators)], -1)
    poles = jnp.concatenate([a, jnp.conj(a)], -1)
    real, imag = (jnp.asarray(part, dtype) for part in (half.real, half.imag))

    @jax.checkpoint
    def evaluate(half):
        half = lax.complex(*half)
        cauchy = 1 / ((2 * half / dt[:, None])[:, None] - poles[..., None])  # [D, 2N, frequencies]
        k = jnp.einsum("kdn,dnf->kdf", numerators, cauchy, precision=dispatch.matmul_precision(dtype))
        cb, cp, pb, pp = k[:reads], k[reads:-2], k[-2], k[-1]
        return (1 + half) * (cb - cp * pb / (1 + pp))

    spectrum = jnp.moveaxis(lax.map(evaluate, (real, imag)), 0, 2)
    spectrum = spectrum.reshape(*c.shape[:2], count * block)[..., : size // 2 + 1]
    grow = jnp.asarray(np.exp(damping * np.arange(length)), dtype)
    return jnp.fft.irfft(spectrum, size)[..., :length] * grow


def dplr_scan(
    x: Float[Array, "B T D"],
    a: Pair,
    p: Pair,
    b: Pair,
    c: Pair,
    dt: Float[Array, "D"],
    *,
    initial_state: State | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], State]:
    """The same system as a recurrence, token by token; keeps one state per chunk of tokens for the backward pass.

    Args:
      x: inputs.
      a, p, b, c, dt: as in `dplr_kernel`, with one read-out.
      initial_state: h before the first token. Zero by default.
      segment_ids: 0 is padding, a change restarts the state; see `ops.segments`.

    Returns:
      y in the dtype of `x`, zero on padding, and the final state, (real, imaginary).
    """
    dtype = jnp.promote_types(jnp.result_type(x, a[0]), jnp.float32)
    a, p, b, c = (lax.complex(re.astype(dtype), im.astype(dtype)) for re, im in (a, p, b, c))
    twice = (2 / dt)[:, None]
    inverse = 1 / (twice - a)
    keep, spread, enter = (twice + a) * inverse, p * inverse, 2 * b * inverse
    bar = jnp.conj(p)
    coefficients = keep, spread, enter, bar, c, 1 / (1 + _read(bar, spread))
    inputs = jnp.swapaxes(segments.zero_padding(x, segment_ids), 0, 1).astype(dtype)
    h = jnp.zeros((len(x), *a.shape), a.dtype) if initial_state is None else lax.complex(*initial_state).astype(a.dtype)
    rows, of_tokens = ("batch",), (None, "batch")
    run = dispatch.local(_by_tokens, [(), rows, of_tokens], (rows, of_tokens))
    h, y = run(coefficients, h, (inputs, segment_masks(segment_ids)))
    y = jnp.swapaxes(y, 0, 1).astype(x.dtype)
    return segments.zero_padding(y, segment_ids), (jnp.real(h), jnp.imag(h))


def _read(u, h):
    return 2 * jnp.real(jnp.sum(u * h, -1))


def _by_tokens(coefficients, h, inputs):
    """One token after the other; of a mesh, on the rows of a device alone: gradients of the coefficients are then summed over the
    devices once, and not in the loop."""
    keep, spread, enter, bar, c, correction = coefficients

    def step(h, token):
        x, masks = token
        if masks is not None:
            h = jnp.where(masks[0][:, None, None], 0, h)
        new = keep * h - spread * _read(bar, h)[..., None] + enter * x[..., None]
        new = new - spread * (correction * _read(bar, new))[..., None]
        if masks is not None:
            new = jnp.where(masks[1][:, None, None], new, h)
        return new, _read(c, new)

    h, y = kept.scan(functools.partial(lax.scan, step), h, split_masked(*inputs, _CHUNK))
    return h, join(y, len(inputs[0]))

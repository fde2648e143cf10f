"""FNet: mixing by Fourier transforms."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.mixer import Ids, Mixer, Tokens
from ops import dispatch, segments
from ops.dispatch import matmul_precision


class FNet(Mixer):
    """y = Re(F_T (F_D x)): discrete Fourier transforms of each token's channels, then of each channel's tokens
    (arXiv 2105.03824, section 3). There are no parameters.

    The paper has no factor, which its layer can afford because it normalises after the residual sum. In a layer that
    normalises before the mixer, outputs sqrt(T D) times as large as their inputs would drown all else that the residual
    stream holds; `orthonormal` divides by that number.

    The transform of a document among padding or other documents is that of its own length: a masked matrix of cosines
    and sines, quadratic in T, in place of the fast transform.

    Args:
      orthonormal: divide by sqrt(T D), T being the document's length. The paper: False.
    """

    causal = False
    bidirectional = True
    streaming = False
    paper = "FNet, arXiv 2105.03824"
    primitive = "fft"
    sequence_parallel = ()  # a Fourier transform is of the whole length
    complexity = "T log T"

    def __init__(self, width: int, *, rngs: nnx.Rngs, orthonormal: bool = True):
        self.orthonormal = orthonormal

    def mix(self, x: Tokens, state: None, *, segment_ids: Ids | None, positions: Ids) -> tuple[Tokens, None]:
        rows = ("batch", None, None)
        transform = lambda axis: dispatch.local(lambda x: jnp.fft.fft(x, axis=axis), [rows], rows)
        z = transform(2)(x.astype(jnp.float32))
        if segment_ids is None:
            length = x.shape[1]
            y = transform(1)(z).real
        else:
            index = segments.positions(segment_ids)
            length = segments.lengths(segment_ids)
            # The product is reduced before it becomes a float: cos and sin of large angles are inexact.
            turns = index[:, :, None] * index[:, None, :] % length[:, :, None]
            angle = 2 * np.pi * turns / length[:, :, None]
            same = segment_ids[:, :, None] == segment_ids[:, None, :]
            dot = lambda a, b: jnp.einsum("bts,bsd->btd", jnp.where(same, a, 0), b, precision=matmul_precision(b.dtype))
            y = dot(jnp.cos(angle), z.real) + dot(jnp.sin(angle), z.imag)
            length = length[:, :, None]
        if self.orthonormal:
            y = y / jnp.sqrt(jnp.float32(x.shape[2]) * length)
        return y.astype(x.dtype), state

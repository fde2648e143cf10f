"""Fourier transforms of long real sequences as products with small dense matrices.

A transform of n1 * n2 points is n1-point transforms of the columns of an [n1, n2] matrix, a multiplication by twiddle factors,
and n2-point transforms of its rows (Cooley and Tukey 1965; on matrix units: FlashFFTConv, arXiv 2311.05908, and Monarch matrices,
2204.00595). A few dozens of points are one matrix product, which is what accelerators are made for. Frequencies stay in the order
in which they come out, since a convolution needs no other; of a real sequence half of the rows are kept, and the other half are
their conjugates. Complex numbers are pairs of reals on an axis of their own, and channels stay last: nothing is transposed.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ops import dispatch

_LARGEST = 256  # of a dense transform's points, but for the first


class Plan(NamedTuple):
    """How the points of a transform are arranged.

    Attributes:
      rows: n1, even.
      factors: of n2, the number of columns; each is a dense transform.
    """

    rows: int
    factors: tuple[int, ...]

    @property
    def columns(self) -> int:
        return math.prod(self.factors)

    @property
    def size(self) -> int:
        return self.rows * self.columns


def plan(minimum: int) -> Plan:
    """A plan for `minimum` points or a few more, of matrices that are about equally large."""
    levels = 2
    while minimum ** (1 / levels) > _LARGEST:
        levels += 1
    factor = 2 ** round(math.log2(minimum) / levels)
    columns = factor ** (levels - 1)
    rows = -(-minimum // columns)
    return Plan(max(2, rows + rows % 2), (factor,) * (levels - 1))


def spectrum(x: Float[Array, "B T D"], plan: Plan) -> Float[Array, "B K 2 N D"]:
    """The transform of sequences that are continued with zeros, as (real, imaginary) pairs; N is the last of the plan's factors.

    Args:
      x: float32 or float64, of at most `plan.size` tokens.
    """
    batch, length, width = x.shape
    used = -(-length // plan.columns)
    x = jnp.pad(x, ((0, 0), (0, used * plan.columns - length), (0, 0))).reshape(batch, used, plan.columns, width)
    frequencies = np.arange(plan.rows // 2 + 1)
    cos, sin = _waves(frequencies, np.arange(used), plan.rows)
    z = _product("kcn,bnmd->bkcmd", np.stack([cos, -sin], 1), x)
    z = _turn(z, *_waves(frequencies, np.arange(plan.columns), plan.size), -1)
    z = _columns(z.reshape(-1, 2, plan.columns, width), plan.factors)
    return z.reshape(batch, -1, *z.shape[1:])


def inverse(z: Float[Array, "B K 2 N D"], plan: Plan, length: int) -> Float[Array, "B length D"]:
    """The first `length` tokens of the sequences that have this spectrum."""
    batch, width = z.shape[0], z.shape[-1]
    frequencies = np.arange(plan.rows // 2 + 1)
    z = _inverse_columns(z.reshape(-1, *z.shape[2:]), plan.factors)
    z = z.reshape(batch, len(frequencies), 2, plan.columns, width)
    z = _turn(z, *_waves(frequencies, np.arange(plan.columns), plan.size), 1)
    used = -(-length // plan.columns)
    cos, sin = _waves(np.arange(used), frequencies, plan.rows)
    times = np.full(len(frequencies), 2 / plan.size)  # twice, for the rows that are not kept
    times[[0, -1]] /= 2
    x = _product("nkc,bkcmd->bnmd", np.stack([cos, -sin], 2) * times[:, None], z)
    return x.reshape(batch, used * plan.columns, width)[:, :length]


def multiply(
    a: Float[Array, "#B K 2 N D"], b: Float[Array, "#B K 2 N #D"], conjugate: bool = False
) -> Float[Array, "B K 2 N D"]:
    """a b, or a times the conjugate of b."""
    (a_re, a_im), (b_re, b_im) = (a[:, :, 0], a[:, :, 1]), (b[:, :, 0], b[:, :, 1])
    if conjugate:
        b_im = -b_im
    return jnp.stack([a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re], 2)


def _columns(z: Float[Array, "L 2 N D"], factors: tuple[int, ...]) -> Float[Array, "M 2 n D"]:
    """Complex transforms of the N points; their frequencies are on M and on n, the last factor."""
    first, *rest = factors
    if not rest:
        return _product("ekcn,lcnd->lekd", _complex_transform(first, -1), z)
    lead, _, points, width = z.shape
    others = points // first
    z = _product("ekcm,lcmrd->lkerd", _complex_transform(first, -1), z.reshape(lead, 2, first, others, width))
    z = _turn(z, *_waves(np.arange(first), np.arange(others), points), -1)
    return _columns(z.reshape(lead * first, 2, others, width), tuple(rest))


def _inverse_columns(z: Float[Array, "M 2 n D"], factors: tuple[int, ...]) -> Float[Array, "L 2 N D"]:
    """The inverse of `_columns` times the number of points."""
    first, *rest = factors
    if not rest:
        return _product("encm,lcmd->lend", _complex_transform(first, 1), z)
    z = _inverse_columns(z, tuple(rest))
    _, _, others, width = z.shape
    z = z.reshape(-1, first, 2, others, width)
    z = _turn(z, *_waves(np.arange(first), np.arange(others), first * others), 1)
    z = _product("emck,lkcrd->lemrd", _complex_transform(first, 1), z)
    return z.reshape(-1, 2, first * others, width)


def _waves(a: np.ndarray, b: np.ndarray, period: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of 2 pi a b / period, [a, b], float64; the product is reduced while it is whole."""
    angle = 2 * np.pi / period * (np.multiply.outer(a, b) % period)
    return np.cos(angle), np.sin(angle)


def _complex_transform(points: int, sign: int) -> np.ndarray:
    """exp(sign 2 pi i k n / points) as the matrix of a map between pairs, [e, k, c, n]."""
    cos, sin = _waves(np.arange(points), np.arange(points), points)
    return np.stack([np.stack([cos, -sign * sin], 1), np.stack([sign * sin, cos], 1)])


def _turn(z: Float[Array, "L K 2 N D"], cos: np.ndarray, sin: np.ndarray, sign: int) -> Float[Array, "L K 2 N D"]:
    """z times cos + sign i sin, [K, N]."""
    factor = np.stack([cos, sign * sin], 1)[None, ..., None]
    return multiply(z, jnp.asarray(factor, z.dtype))


def _product(equation: str, matrix: np.ndarray, x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.einsum(equation, jnp.asarray(matrix, x.dtype), x, precision=dispatch.matmul_precision(x.dtype))

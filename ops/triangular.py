"""Triangular systems in a chunk, by matrix products."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ops import chunks
from ops.chunks import matmul, transpose


@jax.custom_vjp
def solve_unit_lower(A: Float[Array, "... C C"], R: Float[Array, "... C D"]) -> Float[Array, "... C D"]:
    """Solves (I + A) X = R for strictly lower triangular A; C is a power of two.

    Rows are substituted inside blocks of 8, and halves merged above. That is as accurate as substitution, and nothing but
    matrix products: LAPACK's solver, called from a loop that XLA compiles for the CPU, can block forever.
    """
    return _forward(A, R)[0]


def _forward(A, R):
    inverse = _inverse(A[..., None, :, :])[..., 0, :, :]
    X = matmul(inverse, R)
    return X, (inverse, X)


def _backward(saved, dX):
    inverse, X = saved
    dR = matmul(transpose(inverse), dX)
    dA = -matmul(dR, transpose(X))
    return jnp.where(chunks.lower(dA.shape[-1], strict=True), dA, 0), dR


solve_unit_lower.defvjp(_forward, _backward)


def _inverse(A: Float[Array, "... n C C"]) -> Float[Array, "... n C C"]:
    """(I + A)^-1 of n blocks.

    The Neumann series would need fewer products, but its terms grow without bound and cancel when keys repeat.
    """
    *lead, n, size, _ = A.shape
    if size <= 8:
        eye = jnp.eye(size, dtype=A.dtype)
        rows = jnp.broadcast_to(eye[:1], (*lead, n, 1, size))
        for i in range(1, size):
            row = eye[i : i + 1] - jnp.sum(A[..., i, :i, None] * rows, -2, keepdims=True)
            rows = jnp.concatenate([rows, row], -2)
        return rows
    half = size // 2
    blocks = jnp.stack([A[..., :half, :half], A[..., half:, half:]], -3).reshape(*lead, 2 * n, half, half)
    inverses = _inverse(blocks).reshape(*lead, n, 2, half, half)
    first, second = inverses[..., 0, :, :], inverses[..., 1, :, :]
    corner = -matmul(matmul(second, A[..., half:, :half]), first)
    upper = jnp.concatenate([first, jnp.zeros_like(corner)], -1)
    return jnp.concatenate([upper, jnp.concatenate([corner, second], -1)], -2)

"""Rows, the last axis: their largest number, and rows made one long.

XLA's CPU compiler takes the maximum of a row, and the sum of what it computes on the way to it, one number after another. Halves
of rows, compared or added until a row is as long as the processor's vectors, it takes by whole vectors.
`python -m benchmarks.steps --implementation=unit_rows=reference` is without it in norms.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ops.dispatch import choose, on_cpu, primitive

_VECTOR = 16  # float32 numbers of a vector, at most


def row_max(x: Float[Array, "... N"]) -> Float[Array, "..."]:
    """max_n x_n, a constant to derivatives."""
    x = jax.lax.stop_gradient(x)
    return jnp.max(_halved(jnp.maximum, x) if on_cpu() else x, axis=-1)


@primitive("reference", "halves", kept=False, tokens=False)
def unit_rows(
    x: Float[Array, "... N"], *, eps: float, mean: bool = True, implementation: str = "auto"
) -> Float[Array, "... N"]:
    """x / sqrt(mean_n x_n^2 + eps), the core of RMSNorm (arXiv 1910.07467).

    Args:
      x: the rows, in float32.
      eps: a static number.
      mean: whether squares are averaged; else they are summed.
      implementation: "reference" (the formula, differentiable in every mode), "halves" (for reverse-mode differentiation only),
        or "auto": halves on a CPU.

    Raises:
      ValueError: if the implementation is unknown.
    """
    if choose("unit_rows", implementation, "halves" if on_cpu() else "reference") == "halves":
        return _unit_rows(eps, mean, x)
    return x * jax.lax.rsqrt((jnp.mean if mean else jnp.sum)(jnp.square(x), -1, keepdims=True) + eps)


def _halved(combine: Callable, x: Array) -> Array:
    """What the halves of each row combine to, as long as there are halves that fill vectors."""
    while x.shape[-1] > _VECTOR and x.shape[-1] % 2 == 0:
        half = x.shape[-1] // 2
        x = combine(x[..., :half], x[..., half:])
    return x


def _sum(mean, x):
    total = jnp.sum(_halved(jnp.add, x), axis=-1, keepdims=True)
    return total / x.shape[-1] if mean else total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _unit_rows(eps, mean, x):
    return _unit_rows_forward(eps, mean, x)[0]


def _unit_rows_forward(eps, mean, x):
    r = jax.lax.rsqrt(_sum(mean, jnp.square(x)) + eps)
    return x * r, (x, r)


def _unit_rows_backward(eps, mean, kept, dy):
    """dx = r (dy - x r^2 mean_n dy_n x_n), with y = r x."""
    x, r = kept
    return (r * (dy - x * (jnp.square(r) * _sum(mean, dy * x))),)


_unit_rows.defvjp(_unit_rows_forward, _unit_rows_backward)

"""Products of what a primitive makes of its inputs, in the types that all primitives agree on.

Factors stay bfloat16 where the inputs of a primitive are bfloat16, and sums are float32: so tensor cores and matrix units run at
their full speed. What the primitive makes of its inputs in float32 (a decayed key, a score, a cotangent) is rounded before it is
multiplied. Float32 in any case, and multiplied in full precision on every platform, are states that lead to states, decays, the
statistics of a softmax, triangular systems and Fourier transforms. Products with parameters are made by `ops.projection`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ops.dispatch import matmul_precision, on_cpu


def factor_dtype(*inputs: Array | DTypeLike) -> jnp.dtype:
    """The type of the factors: bfloat16 where all inputs are, else float32 or wider.

    A CPU has no fast products of bfloat16, and multiplies in float32 instead.
    """
    dtype = jnp.result_type(*inputs)
    return dtype if dtype == jnp.bfloat16 and not on_cpu() else jnp.promote_types(dtype, jnp.float32)


def product(
    equation: str, a: Float[Array, "..."], b: Float[Array, "..."], dtype: DTypeLike | None = None
) -> Float[Array, "..."]:
    """`jnp.einsum` of two factors.

    Args:
      equation: with "->"; every axis is in two of the three arrays, or in all. The axes of an ellipsis have one shape in both
        factors, or `dtype` is not bfloat16.
      a, b: the factors.
      dtype: of the factors (`factor_dtype`), to which they are rounded; by default their own. The derivative of bfloat16's, which
        is for reverse mode, rounds the cotangent, too. Wider factors are multiplied in full precision.

    Returns:
      the product, float32 of bfloat16, else of the factors' type.
    """
    dtype = jnp.result_type(a, b) if dtype is None else jnp.dtype(dtype)
    if dtype == jnp.bfloat16:
        return _rounded(equation, (a.dtype, b.dtype), a, b)
    return _product(equation, a.astype(dtype), b.astype(dtype))


def _product(equation, a, b):
    dtype = jnp.result_type(a, b)
    wide = jnp.promote_types(dtype, jnp.float32)
    return jnp.einsum(equation, a, b, precision=matmul_precision(dtype), preferred_element_type=wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded(equation, dtypes, a, b):
    return _rounded_forward(equation, dtypes, a, b)[0]


def _rounded_forward(equation, dtypes, a, b):
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return _product(equation, a, b), (a, b)


def _rounded_backward(equation, dtypes, factors, dy):
    a, b = factors
    left, right, out = equation.replace("->", ",").split(",")
    dy = dy.astype(jnp.bfloat16)
    da, db = _product(f"{out},{right}->{left}", dy, b), _product(f"{left},{out}->{right}", a, dy)
    return da.astype(dtypes[0]), db.astype(dtypes[1])


_rounded.defvjp(_rounded_forward, _rounded_backward)

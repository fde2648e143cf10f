"""Linear maps of activations: every product with a parameter matrix is made here.

    y_o = sum_i x_i w_io          for any number of input axes i and output axes o

The gradients are dx_i = sum_o dy_o w_io and dw_io = sum_n x_ni dy_no, summed over all places n. XLA's CPU compiler fuses what
made dy (an activation's derivative, say) into these products, or into a transposed copy for them. The form "separated" computes
dy and x first, and then multiplies matrices; `python -m benchmarks.steps --implementation=project=reference` is without it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ops import sequence
from ops.dispatch import choose, matmul_precision, on_cpu, primitive

_TURNED = 2**19  # numbers of a matrix that is turned, at most


@primitive("reference", "separated", tokens=False)
def project(
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    *,
    inputs: int = 1,
    dtype: DTypeLike | None = None,
    implementation: str = "auto",
) -> Float[Array, "..."]:
    """Contracts the last `inputs` axes of x with the first axes of w.

    Args:
      x: [*places, *in].
      w: [*in, *out]; in float32 both are multiplied in float32 on every platform, in bfloat16 with sums in float32.
      inputs: the number of axes "in".
      dtype: of y; by default that of x and w together.
      implementation: "reference" (the plain product, differentiable in every mode), "separated" (gradients by products that
        nothing is fused into, in the precision of x; for reverse-mode differentiation only), or "auto":
        separated on a CPU, and where y is wider than x and w, whose gradients would else be products in y's precision.

    Returns:
      y [*places, *out].

    Raises:
      ValueError: if the axes do not fit together or the implementation is unknown.
    """
    if inputs < 1 or x.shape[-inputs:] != w.shape[:inputs]:
        raise ValueError(f"the last {inputs} axes of x {x.shape} are not the first of w {w.shape}")
    dtype = jnp.result_type(x, w) if dtype is None else jnp.dtype(dtype)
    policy = "separated" if on_cpu() or dtype != jnp.result_type(x, w) else "reference"
    implementation = choose("project", implementation, policy)
    x, w = (a.astype(jnp.result_type(x, w)) for a in (x, w))
    return (_plain if implementation == "reference" else _separated)(inputs, dtype, x, w)


def project_each(x: Float[Array, "..."], w: Float[Array, "..."], **options) -> list[Float[Array, "..."]]:
    """Several maps that are stacked along w's second axis, such as a gate and a value.

    Args:
      x: [*places, C].
      w: [C, G, *out].
      **options: as of `project`.

    Returns:
      a list of G arrays [*places, *out].
    """
    return [project(x, w[:, i], **options) for i in range(w.shape[1])]


def project_blocks(x: Float[Array, "... H I"], w: Float[Array, "H I *J"]) -> Float[Array, "..."]:
    """A map of each head by itself: a block-diagonal matrix.

    Returns:
      [*places, H, *J].
    """
    dtype = jnp.result_type(x, w)
    y = jnp.einsum("...hi,hij->...hj", x, w.reshape(*w.shape[:2], -1), precision=matmul_precision(dtype))
    return y.reshape(*y.shape[:-1], *w.shape[2:])


def _plain(inputs, dtype, x, w):
    axes = (tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs)))
    precision = matmul_precision(x.dtype)
    return jax.lax.dot_general(x, w, (axes, ((), ())), precision=precision, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _separated(inputs, dtype, x, w):
    return _plain(inputs, dtype, x, w)


def _separated_forward(inputs, dtype, x, w):
    return _plain(inputs, dtype, x, w), (x, w)


def _separated_backward(inputs, dtype, kept, dy):
    x, w = kept
    x, dy = jax.lax.optimization_barrier((x, dy.astype(x.dtype)))
    dot = lambda a, b, i, j: jax.lax.dot_general(a, b, ((i, j), ((), ())), precision=matmul_precision(a.dtype))
    places, outputs = x.ndim - inputs, w.ndim - inputs
    if sequence.ways() > 1:  # of rows in shards, places in one axis would be gathered whole
        dx = dot(dy, w, range(places, dy.ndim), range(inputs, w.ndim))
        return dx, dot(x, dy, range(places), range(places))
    matrix = lambda a, columns: a.reshape(-1, math.prod(a.shape[a.ndim - columns :]))
    dy = matrix(dy, outputs)
    dx = dot(dy, matrix(w, outputs), (1,), (1,))
    return dx.reshape(x.shape), _over_places(dot, matrix(x, inputs), dy).reshape(w.shape)


def _over_places(dot, x, dy):
    """x^T dy, whose narrower factor is turned first on a CPU: XLA multiplies [i, n] by [n, o] faster than columns by columns. Of
    a factor that does not fit into a core's cache the turning takes longer than what is won."""
    if not on_cpu() or min(x.size, dy.size) > _TURNED:
        return dot(x, dy, (0,), (0,))
    turned = lambda matrix: jax.lax.optimization_barrier(matrix.T)
    if x.shape[1] <= dy.shape[1]:
        return dot(turned(x), dy, (1,), (0,))
    return turned(dot(turned(dy), x, (1,), (0,)))


_separated.defvjp(_separated_forward, _separated_backward)

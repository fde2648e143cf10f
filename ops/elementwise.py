"""Activations and gates whose backward pass keeps as few arrays as there are arguments.

Differentiated as it is written, x / (1 + exp(-x)) keeps three arrays of the size of x, and a gate silu(g) v keeps five. What is
kept, the scan over the layers copies into a stack and out of it again. Here the derivative is computed together with the value:
silu keeps silu'(x), the gate keeps silu'(g) v and silu(g). Forward-mode differentiation works, and so do higher derivatives.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Activation = Callable[[Float[Array, "..."]], Float[Array, "..."]]


def _with_derivative(f: Activation, x: Array) -> tuple[Array, Array]:
    """f(x) and f'(x), of a function that acts on each number by itself."""
    return jax.jvp(f, (x,), (jnp.ones_like(x),))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def activate(f: Activation, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """f(x), of a function that acts on each number by itself."""
    return f(x)


@activate.defjvp
def _(f, primals, tangents):
    y, derivative = _with_derivative(f, *primals)
    return y, derivative * tangents[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def gate(f: Activation, g: Float[Array, "..."], v: Float[Array, "..."]) -> Float[Array, "..."]:
    """f(g) * v, of a function that acts on each number by itself."""
    return f(g) * v


@gate.defjvp
def _(f, primals, tangents):
    g, v = primals
    y, derivative = _with_derivative(f, g)
    return y * v, (derivative * v) * tangents[0] + y * tangents[1]


silu = functools.partial(activate, jax.nn.silu)
gelu = functools.partial(activate, jax.nn.gelu)
silu_gate = functools.partial(gate, jax.nn.silu)

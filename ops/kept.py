"""What the backward pass of a primitive keeps, marked: the policy "elementwise" of `models.stack.REMAT` computes all else again.

Outputs of primitives, and what their loops and kernels leave for their derivatives, are dear to compute; what is between them,
maps of single numbers, is not.
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import PyTree

NAME = "kept"


def keep(arrays: PyTree) -> PyTree:
    """The same arrays, marked. Without that policy this does nothing."""
    return jax.tree.map(lambda x: checkpoint_name(x, NAME), arrays)


def scan(body: Callable, state: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan` whose backward pass has the states between the steps, and computes the inside of each step again.

    States that are much larger than the tokens of a step (those of test-time training are) would be most of what a model keeps:
    they are not marked, and with the policy the whole loop is computed again, a layer at a time.
    """
    numbers = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    marked = keep if numbers(state) * len(jax.tree.leaves(xs)[0]) <= 2 * numbers(xs) else lambda state: state
    step = jax.checkpoint(body, prevent_cse=False)
    return keep(jax.lax.scan(lambda state, x: step(marked(state), x), state, xs))

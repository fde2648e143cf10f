"""What is in a traced program, and what it multiplies."""

import collections
from collections.abc import Iterator

import jax

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot")


def equations(jaxpr) -> Iterator:
    """All equations, those of functions, loops and branches inside, too."""
    for equation in jaxpr.eqns:
        yield equation
        inside = jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        for one in inside:
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield from equations(one)


def products(closed) -> dict[str, int]:
    """Products of matrices of a closed jaxpr, by "LEFT RIGHT RESULT PRECISION": how many places there are."""
    found: collections.Counter[str] = collections.Counter()
    for equation in equations(closed.jaxpr):
        if equation.primitive.name in PRODUCTS:
            types = [v.aval.dtype.name for v in (*equation.invars[:2], equation.outvars[0])]
            precision = "HIGHEST" if "HIGHEST" in str(equation.params.get("precision")) else "default"
            found[" ".join((*types, precision))] += 1
    return dict(found)

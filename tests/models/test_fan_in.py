"""Which dimensions of a parameter are inputs of a map, against the products that the parameter enters in the traced mixer.

Each parameter is followed through what only moves its entries, to the `dot_general`s that it is an operand of, at two widths.
What these sum over must grow by the factor by which the product of its `inputs` grows. Nothing is computed. Not followed into its
scan is the memory of ttt_linear.

A new mixer's parameter that fails here says its `inputs` where it is made, see `models.params.param`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import Literal, jaxprs_in_params

from models import mixer as mixers
from models.params import input_dimensions
from ops import dispatch

pytestmark = pytest.mark.rest

NARROW, WIDE, LENGTH = 128, 256, 32
# What hands entries on. In a product of two arrays entry by entry, or a sum, it is the parameter that has the result's size.
MOVES = {
    *("reshape", "transpose", "convert_element_type", "slice", "dynamic_slice", "split", "squeeze", "broadcast_in_dim"),
    *("expand_dims", "unstack", "copy", "rev", "neg", "optimization_barrier", "stop_gradient", "reduce_precision"),
    *("mul", "div", "concatenate", "pad"),
}
# A learned sequence that is put in place of the stream: what it is multiplied by is a map, and what that sums over its channels.
STREAMS = {"luna": {"shared/p"}}


def contracted(jaxpr, names, found):
    """By parameter, the sizes that products sum over it; returns the names of the results that are parameters, moved."""
    known = {var: name for var, name in zip(jaxpr.invars, names) if name is not None}
    for eqn in jaxpr.eqns:
        operands = [None if isinstance(var, Literal) else known.get(var) for var in eqn.invars]
        inner = list(jaxprs_in_params(eqn.params))
        if eqn.primitive.name == "dot_general":
            (left, right), _ = eqn.params["dimension_numbers"]
            for var, name, dimensions in zip(eqn.invars, operands, (left, right)):
                if name is not None:
                    found.setdefault(name, set()).add(math.prod(var.aval.shape[i] for i in dimensions))
        elif inner and len(inner[0].invars) == len(eqn.invars):
            results = contracted(inner[0], operands, found)
            known |= {var: name for var, name in zip(eqn.outvars, results) if name is not None}
        elif eqn.primitive.name in MOVES:
            carried = {name for name in operands if name is not None}
            size = max(var.aval.size for var, name in zip(eqn.invars, operands) if name) if carried else 0
            whole = eqn.primitive.name not in ("mul", "div", "concatenate", "pad") or size == eqn.outvars[0].aval.size
            if len(carried) == 1 and whole:
                known |= dict.fromkeys(eqn.outvars, carried.pop())
    return [None if isinstance(var, Literal) else known.get(var) for var in jaxpr.outvars]


@functools.cache
def traced(name, width):
    """By parameter its variable, and what products sum over it."""
    cls = mixers.find(name)
    mixer = mixers.sketch(name, width, causal=cls.causal, length=LENGTH)
    graph, state = nnx.split(mixer)
    leaves, tree = jax.tree.flatten(state)
    variables = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}

    def run(leaves, x):
        with dispatch.matmul_form():
            return nnx.merge(graph, jax.tree.unflatten(tree, leaves))(x)[0]

    jaxpr = jax.make_jaxpr(run)(leaves, jax.ShapeDtypeStruct((2, LENGTH, width), jnp.float32)).jaxpr
    found = {}
    contracted(jaxpr, [*variables, None], found)
    return variables, found


def growth(variables, name):
    """By how much the number of a parameter's inputs grows."""
    fan_in = [math.prod(v[name].shape[i] for i in v[name].get_metadata()["inputs"]) for v in variables]
    return fan_in[1] / fan_in[0]


@pytest.mark.parametrize("name", mixers.names())
def test_products_sum_over_the_inputs(name):
    (narrow, before), (wide, after) = traced(name, NARROW), traced(name, WIDE)
    checked = set()
    for parameter in sorted(set(after) - STREAMS.get(name, set())):
        facts = wide[parameter].get_metadata()
        if facts["group"] == "fixed":
            continue
        sizes = [sorted(found[parameter]) for found in (before, after)]
        grown = {b / a for a, b in zip(*sizes, strict=True)}
        assert grown == {growth((narrow, wide), parameter)}, (
            f"products sum over {sizes[0]} and {sizes[1]} of {name}'s {parameter} {wide[parameter].shape} at widths {NARROW} and "
            f"{WIDE}, and its inputs are the dimensions {facts['inputs']}: say inputs=(...) where it is made"
        )
        checked.add(parameter)
    assert checked or not any(len(v.shape) > 1 for v in wide.values()), "no parameter was found in a product"


@pytest.mark.parametrize("name,parameter", [("mlstm", "w_gates"), ("hedgehog", "map")])
def test_parameters_that_their_other_facts_would_not_tell_of(name, parameter):
    """The trace finds out that what is read from axes and decay is wrong, which is why these say their inputs."""
    (narrow, before), (wide, after) = traced(name, NARROW), traced(name, WIDE)
    facts = wide[parameter].get_metadata()
    read = input_dimensions(facts["axes"], facts["decay"])
    assert all(narrow[parameter].shape[i] == wide[parameter].shape[i] for i in read)  # nothing would grow
    assert max(after[parameter]) == 2 * max(before[parameter])

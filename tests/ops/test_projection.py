"""Linear maps: values and gradients of both forms, and that nothing in `models/` multiplies by a parameter in another way."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from common.errors import UserError
from models import mixer as mixers
from models.config import ModelConfig
from models.sequence_model import SequenceModel
from ops import dispatch
from ops.projection import project, project_blocks, project_each

CASES = {  # shape of x, of w, input axes, the sum in NumPy's words
    "plain": ((2, 5, 6), (6, 4), 1, "btd,de->bte"),
    "heads": ((2, 5, 6), (6, 3, 2), 1, "btd,dhk->bthk"),
    "from heads": ((2, 5, 3, 2), (3, 2, 6), 2, "bthk,hkd->btd"),
    "one vector": ((6,), (6, 4), 1, "d,de->e"),
    "to a number": ((2, 5, 6), (6,), 1, "btd,d->bt"),
}


@pytest.mark.parametrize("form", ["reference", "separated"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, form):
    """Against sums in float64."""
    shape, weight, inputs, equation = CASES[case]
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=shape), rng.normal(size=weight)
    expected = np.einsum(equation, x, w)
    dy = rng.normal(size=expected.shape)
    left, right, out = equation.replace("->", ",").split(",")
    float32 = lambda *arrays: [jnp.asarray(a, jnp.float32) for a in arrays]
    y, pull = jax.vjp(lambda x, w: project(x, w, inputs=inputs, implementation=form), *float32(x, w))
    dx, dw = pull(jnp.asarray(dy, jnp.float32))
    for value, oracle in (
        (y, expected),
        (dx, np.einsum(f"{out},{right}->{left}", dy, w)),
        (dw, np.einsum(f"{left},{out}->{right}", x, dy)),
    ):
        np.testing.assert_allclose(value, oracle, rtol=1e-5, atol=1e-5)


def test_stacked_and_block_diagonal():
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(2, 3, 6)).astype(np.float32), rng.normal(size=(6, 2, 4)).astype(np.float32)
    for i, y in enumerate(project_each(x, w)):
        np.testing.assert_allclose(y, x @ w[:, i], rtol=1e-5, atol=1e-5)
    blocks = rng.normal(size=(3, 2, 4, 5)).astype(np.float32)
    y = project_blocks(x.reshape(2, 3, 3, 2), blocks)
    np.testing.assert_allclose(y, np.einsum("bthi,hijk->bthjk", x.reshape(2, 3, 3, 2), blocks), rtol=1e-5, atol=1e-5)


def test_dtypes():
    """Sums are float32 whatever is multiplied; gradients have the dtypes of what they belong to."""
    x, w = jnp.full((4, 512), 1.0, jnp.bfloat16), jnp.full((512, 3), 1.0 + 2**-7, jnp.bfloat16)
    assert project(x, w).dtype == jnp.bfloat16
    assert float(project(x, w, dtype=jnp.float32)[0, 0]) == 512 * (1 + 2**-7)
    assert project(x, w.astype(jnp.float32)).dtype == jnp.float32
    gradients = jax.grad(lambda x, w: project(x, w, dtype=jnp.float32).sum(), argnums=(0, 1))(x, w.astype(jnp.float32))
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_gradients_of_wider_outputs_are_products_of_the_precision_of_the_inputs(platform):
    """Logits in float32 of bfloat16 activations: their derivatives are rounded before they are multiplied."""
    x, w = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 3), jnp.bfloat16)
    with dispatch.platform(platform):
        program = jax.make_jaxpr(jax.grad(lambda x, w: jnp.sum(project(x, w, dtype=jnp.float32) ** 2), (0, 1)))(x, w)
    products = [e for e in program.eqns if e.primitive.name == "dot_general"]
    assert len(products) == 3 and all(v.aval.dtype == jnp.bfloat16 for e in products for v in e.invars), program


def test_forward_mode_where_the_plain_form_is_chosen():
    x, w = jnp.ones((2, 3)), jnp.ones((3, 4))
    with dispatch.implementation("project=reference"):
        np.testing.assert_array_equal(jax.jvp(lambda x: project(x, w), (x,), (x,))[1], jnp.full((2, 4), 3.0))
    with pytest.raises(UserError, match="project has no form"):
        dispatch.check("project=chunked")


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"last 2 axes of x \(2, 3, 4\) are not the first of w \(4, 3\)"):
        project(jnp.zeros((2, 3, 4)), jnp.zeros((4, 3)), inputs=2)


MOVES = ("convert_element_type", "reshape", "transpose", "slice", "squeeze", "dynamic_slice", "broadcast_in_dim")


@pytest.mark.parametrize("name", mixers.names())
def test_no_product_with_a_parameter_elsewhere(name):
    """In a whole model, a product with a parameter, or with a part of one, is written in `ops/`."""
    mixer = mixers.find(name)
    config = ModelConfig(
        11, 11, width=16, depth=1, pattern=(name,), causal=mixer.causal, mixer={name: mixer.tiny}, length=8
    )
    model = nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, lambda path, leaf: leaf.get_metadata().get("group") != "fixed", ...)
    ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    traced = jax.make_jaxpr(lambda p, r, ids: nnx.merge(graph, p, r)(ids)[0])(params, rest, ids)
    weights = [True] * len(jax.tree.leaves(params)) + [False] * (len(jax.tree.leaves(rest)) + 1)
    found = []
    walk(traced.jaxpr, weights, found)
    assert not found


def walk(jaxpr, weights, found):
    """Collects the files of products with what is a parameter, or a part of it, outside `ops/`."""
    known = {v for v, weight in zip(jaxpr.invars, weights, strict=True) if weight}
    for equation in jaxpr.eqns:
        is_weight = [not hasattr(v, "val") and v in known for v in equation.invars]
        name = equation.primitive.name
        if name in MOVES and is_weight[0]:
            known.update(equation.outvars)
        elif name == "dot_general" and any(is_weight):
            where = innermost(equation)
            if f"{os.sep}ops{os.sep}" not in where:
                found.append(where)
        for inner in jaxprs_in_params(equation.params):
            if len(inner.invars) == len(is_weight):
                walk(inner, is_weight, found)


def innermost(equation) -> str:
    """The file and line of this project that wrote an operation."""
    here = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    frames = equation.source_info.traceback.frames
    own = [f for f in frames if f.file_name.startswith(here) and "site-packages" not in f.file_name]
    return f"{own[0].file_name}:{own[0].line_num}"

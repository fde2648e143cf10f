"""One policy for the types of products: read from what is traced for a TPU, and held against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.cases import CASES, case_arrays
from benchmarks.ops import differentiated
from ops import dispatch
from ops.products import factor_dtype, product
from tests.traced import products

LENGTH = 32
HALF = "bfloat16 bfloat16 float32 default"
FULL = "float32 float32 float32 HIGHEST"

# Products in float32 of the forms for accelerators whose inputs are bfloat16: in linear attention the sum of the derivatives of
# the decays. The delta rule solves triangular systems and leads from state to state.
BY_LAW = {"linear_attention": 1, "attention": 0}


def case(primitive: str, variant: str = ""):
    return next(case for case in CASES if case.primitive == primitive and case.variant.startswith(variant))


def traced(chosen, form: str, dtype) -> dict[str, int]:
    inputs, cotangents = case_arrays(chosen, LENGTH)
    half = [[jax.ShapeDtypeStruct(x.shape, dtype) for x in arrays] for arrays in (cotangents, inputs)]
    with dispatch.platform("tpu"):
        program = differentiated(functools.partial(chosen.function, form), LENGTH, "fwdbwd")
        return products(jax.make_jaxpr(program)(half[0], *half[1]))


@pytest.mark.parametrize(
    "primitive, variant, form",
    [
        ("linear_attention", "decay per head", "chunked"),
        ("linear_attention", "decay per channel", "chunked"),
        ("delta_rule", "decay per head", "chunked"),
        pytest.param("delta_rule", "diagonal", "chunked", marks=pytest.mark.thorough),
        ("attention", "causal", "blockwise"),
    ],
)
def test_types_of_products(primitive, variant, form):
    """Of bfloat16 inputs the factors are bfloat16, but for what is float32 by law, which is HIGHEST; of float32 all is."""
    chosen = case(primitive, variant)
    found = traced(chosen, form, jnp.bfloat16)
    assert set(found) <= {HALF, FULL} and found[HALF] > 0, found
    if primitive in BY_LAW:
        assert found.get(FULL, 0) == BY_LAW[primitive], found
    assert set(traced(chosen, form, jnp.float32)) == {FULL}


def test_factors_by_platform():
    x, y = jnp.zeros(1, jnp.bfloat16), jnp.zeros(1)
    for platform, expected in (("cpu", jnp.float32), ("tpu", jnp.bfloat16), ("gpu", jnp.bfloat16)):
        with dispatch.platform(platform):
            assert factor_dtype(x, x) == expected and factor_dtype(x, y) == jnp.float32


def test_a_product_and_its_derivatives():
    """Rounded factors, sums in float32; and of float32 the numbers of the plain product, bit for bit."""
    rng = np.random.default_rng(0)
    a, b, dy = (np.float32(rng.standard_normal(shape)) for shape in ((3, 40, 50), (3, 50, 60), (3, 40, 60)))
    run = lambda dtype: jax.vjp(lambda a, b: product("nij,njk->nik", a, b, dtype), a, b)
    (y, pull_back), (full, pull_full) = run(jnp.bfloat16), run(None)
    rounded = [np.float64(np.asarray(x, jnp.bfloat16)) for x in (a, b, dy)]
    exact = (
        rounded[0] @ rounded[1],
        rounded[2] @ rounded[1].swapaxes(1, 2),
        rounded[0].swapaxes(1, 2) @ rounded[2],
    )
    for found, expected in zip((y, *pull_back(dy)), exact, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    plain, pull_plain = jax.vjp(lambda a, b: jnp.einsum("nij,njk->nik", a, b, precision="highest"), a, b)
    for found, expected in zip((full, *pull_full(dy)), (plain, *pull_plain(dy)), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "primitive, variant",
    [
        ("linear_attention", "decay per channel"),
        pytest.param("delta_rule", "decay per head", marks=pytest.mark.thorough),
    ],
)
def test_accuracy_of_rounded_factors(primitive, variant):
    """Outputs and all gradients as an accelerator multiplies, beside the token-by-token form in float64 of the same inputs."""
    chosen = case(primitive, variant)
    half = [[jnp.asarray(x, jnp.bfloat16) for x in arrays] for arrays in case_arrays(chosen, LENGTH)]
    program = lambda form: jax.jit(differentiated(functools.partial(chosen.function, form), LENGTH, "fwdbwd"))
    with dispatch.platform("tpu"):
        found = program("chunked")(half[1], *half[0])
    with jax.enable_x64(True):
        inputs, cotangents = ([jnp.asarray(np.asarray(x, np.float64)) for x in arrays] for arrays in half)
        exact = jax.device_get(program("reference")(cotangents, *inputs))
    for x, y in zip(found, exact, strict=True):
        assert x.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(x, np.float64) - y) <= 1e-2 * np.linalg.norm(y)

"""What the parity tests share: independent implementations, and the comparison of outputs and gradients with them.

Nothing here is imported from PyTorch or its friends before a test asks, so that collecting these tests needs none of them.
"""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers
from ops import dispatch
from tests.tolerance import assert_close, error

figures: list[float] = []  # errors that the current test found, relative to the scale of what is compared

BATCH, LENGTH, WIDTH = 2, 70, 32  # the length is more than one chunk of 64 and not a multiple


def load(module: str):
    """Imports a module that only `requirements-parity.txt` installs."""
    return pytest.importorskip(module, reason=f"{module} is not installed: run `make parity`")


def load_fla(operation: str):
    """The plain PyTorch form of an operation of flash-linear-attention, read without its package, which needs Triton."""
    load("torch")
    package = importlib.util.find_spec("fla")
    if package is None:
        pytest.skip("fla-core is not installed: run `make parity`")
    path = pathlib.Path(package.submodule_search_locations[0], "ops", operation, "naive.py")
    spec = importlib.util.spec_from_file_location(f"fla_naive_{operation}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def mixer(name: str, *, causal: bool = True, zeroed: tuple[str, ...] = (), **hyperparameters):
    """Builds a mixer whose parameters are all off their initial values, but for those in `zeroed`, which are 0.

    Returns:
      the mixer as a function of (arguments, **call) that gives its outputs (or, by its number, another `result` of the call), and
      the arguments: the input "x" and every parameter by name.
    """
    module = mixers.create(name, WIDTH, rngs=nnx.Rngs(0), causal=causal, **hyperparameters)
    graph, params = nnx.split(module)
    flat = nnx.to_flat_state(params)
    arguments = {"x": normal(BATCH, LENGTH, WIDTH)}
    for seed, (path, value) in enumerate(flat, 1):
        moved = np.asarray(value[...]) + 0.1 * normal(*value.shape, seed=seed)
        arguments[".".join(path)] = np.zeros_like(moved) if ".".join(path) in zeroed else moved

    def function(arguments, result=0, **call):
        state = nnx.from_flat_state([(path, value.replace(arguments[".".join(path)])) for path, value in flat])
        return nnx.merge(graph, state)(arguments["x"], **call)[result]

    return function, arguments


def assert_parity(ours, theirs, arguments: dict, *, forms=("auto",), dtype="float32", constant=(), optimised=False):
    """Asserts that two functions of the same arrays agree, in their outputs and in the gradients of random projections.

    Args:
      ours: JAX function of a dictionary of arrays; its result is an array or a tuple of arrays.
      theirs: PyTorch function of a dictionary of tensors with the same result.
      arguments: the arrays.
      forms: implementations that are compared, each used by all primitives that offer it, see `ops.dispatch`.
      dtype: of PyTorch's tensors. Equations written out in a test run in float64, libraries in float32.
      constant: names of arguments to which no gradients are compared.
      optimised: whether ours is compiled as a user's program is, and not as tests are: code that is not optimised rounds more
        where gradients are small differences.
    """
    torch = load("torch")
    varied = [name for name in arguments if name not in constant]
    tensors = {name: torch.tensor(a, dtype=getattr(torch, dtype)) for name, a in arguments.items()}
    for name in varied:
        tensors[name].requires_grad_()
    expected = as_tuple(theirs(tensors))
    weights = [normal(*y.shape, seed=100 + i) for i, y in enumerate(expected)]
    total = sum((y * torch.tensor(w)).sum() for y, w in zip(expected, weights, strict=True))
    expected_gradients = torch.autograd.grad(total, [tensors[name] for name in varied])

    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False} if optimised else None

    @functools.partial(jax.jit, static_argnums=0, compiler_options=options)
    def run(form, arguments):
        split = lambda given: as_tuple(ours({**arguments, **given}))
        with dispatch.implementation(form if form == "auto" else where_offered(form, ours, arguments)):
            y, pull_back = jax.vjp(split, {name: arguments[name] for name in varied})
            return y, pull_back(tuple(map(jnp.asarray, weights)))[0]

    for form in forms:
        found, gradients = run(form, arguments)
        for i, (y, reference) in enumerate(zip(found, expected, strict=True)):
            assert_figure(y, reference.detach(), f"{form}: output {i}")
        for name, reference in zip(varied, expected_gradients, strict=True):
            assert_figure(gradients[name], reference, f"{form}: gradient to {name}")


def where_offered(form: str, function, arguments: dict) -> str:
    """The choice of a form for those primitives in `function` that offer it."""
    with dispatch.implementation("auto") as choice:
        jax.eval_shape(lambda given: function(given), arguments)  # a new function: what was traced is not traced again
    able = [primitive for primitive, forms in choice.asked.items() if form in forms]
    assert able, f"no primitive here offers {form!r}: {choice.asked}"
    return ",".join(f"{primitive}={form}" for primitive in able)


def assert_figure(found, expected, what: str) -> None:
    """`assert_close` that leaves the error in `figures`."""
    figures.append(error(found, expected))
    assert_close(found, expected, what=what)


def as_tuple(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)

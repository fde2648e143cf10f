"""A choice of forms is obeyed or refused, never passed over."""

import functools
import importlib
import inspect
import pathlib
import pkgutil
import re

import jax
import jax.numpy as jnp
import pytest

import ops
from common.errors import UserError
from ops import dispatch
from ops.attention import attention
from ops.linear_attention import linear_attention
from ops.linear_recurrence import linear_recurrence
from ops.running_max import running_max


def program(**options) -> str:
    """The text of a recurrence, traced anew."""
    x = jax.ShapeDtypeStruct((2, 8, 3), jnp.float32)
    return str(jax.make_jaxpr(lambda a, b: linear_recurrence(a, b, **options))(x, x))


def test_every_primitive_declares_its_forms():
    """All forms are declared, "reference" among them, and the function that declares them takes the choice."""
    modules = [importlib.import_module(f"ops.{module.name}") for module in pkgutil.iter_modules(ops.__path__)]
    for name, forms in dispatch.offered().items():
        assert "reference" in forms and len(forms) > 1, name
        function = next(getattr(module, name) for module in modules if hasattr(module, name))
        assert inspect.signature(function).parameters["implementation"].default == "auto"


@pytest.mark.parametrize("shape", [(0, 8, 2, 4), (2, 0, 2, 4)])
@pytest.mark.parametrize("form", ["auto", "reference"])
def test_sequences_of_nothing_are_refused(shape, form):
    """One error for a batch of no rows and for rows of no tokens, whatever the form."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    for primitive, arrays in (
        (attention, (x, x, x)),
        (linear_attention, (x, x, x)),
        (linear_recurrence, ((x, x),) * 2),
    ):
        with pytest.raises(ValueError, match=r"length >= 1, .*: drop what is empty"):
            jax.eval_shape(functools.partial(primitive, implementation=form), *arrays)


def test_policies_go_by_the_platform_that_is_traced_for():
    assert program() == program(implementation="sequential")  # JAX's default is a CPU here
    for name, known, form in (("tpu", "tpu", "pallas"), ("cuda", "gpu", "blocked"), ("cpu", "cpu", "sequential")):
        with dispatch.platform(name):
            assert dispatch.current_platform() == known
            assert program() == program(implementation=form)
    assert dispatch.current_platform() == "cpu"


def test_one_place_asks_for_the_platform_of_this_process():
    """A program that is traced here for devices elsewhere must not take the forms of this machine."""
    root = pathlib.Path(ops.__file__).parents[1]
    asking = [path for room in ("ops", "models") for path in (root / room).rglob("*.py")]
    asking = [
        path.name for path in asking if re.search(r"default_backend|jax\.devices|local_devices", path.read_text())
    ]
    assert asking == ["dispatch.py"]


def test_choices_are_obeyed():
    alone = {form: program(implementation=form) for form in dispatch.offered()["linear_recurrence"]}
    assert len(set(alone.values())) == 5
    for form, expected in alone.items():
        for text in (form, f"linear_recurrence={form}", f" attention = reference , linear_recurrence = {form} "):
            with dispatch.implementation(text):
                assert program() == expected
                assert program(implementation="reference") == alone["reference"]  # one call's own choice goes first
    with dispatch.implementation("reference"), dispatch.implementation("auto"):
        assert program() == alone["sequential"]
    assert program() == alone["sequential"]


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "chunkd",
            "'chunkd' is unknown; did you mean 'chunked'.*linear_recurrence offers reference, sequential, associative",
        ),
        ("attention", "is a primitive: say attention=FORM; it offers reference, blockwise, library"),
        ("linear_recurence=reference", "there is no primitive 'linear_recurence'; did you mean 'linear_recurrence'"),
        (
            "linear_recurrence=chunked",
            "linear_recurrence has no form 'chunked'; it offers reference, sequential, associative",
        ),
        ("attention=", "attention has no form ''"),
        ("attention=reference,", "'' should be PRIMITIVE=FORM"),
        ("reference,attention=blockwise", "'reference' should be PRIMITIVE=FORM"),
        ("attention=reference,attention=blockwise", "twice for attention"),
        ("", "is unknown"),
    ],
)
def test_what_does_not_exist_is_refused_at_the_door(text, message):
    for door in (dispatch.check, lambda text: dispatch.implementation(text).__enter__()):
        with pytest.raises(UserError, match=re.compile(message, re.DOTALL)):
            door(text)


def test_a_form_that_a_primitive_of_the_model_lacks_is_refused():
    dispatch.check("chunked")
    with dispatch.implementation("chunked"):
        with pytest.raises(
            UserError, match=r"linear_recurrence has no form 'chunked'.*delta_rule=chunked, linear_attention="
        ):
            jax.jit(lambda: program())()
        with pytest.raises(ValueError, match="not offered here") as caught:  # an author's mistake
            program(implementation="blockwise")
        assert not isinstance(caught.value, UserError)


def test_a_choice_without_effect_is_refused():
    for text, message in (
        (
            "attention=reference,linear_recurrence=reference",
            "does not use attention; it uses linear_recurrence, running_max",
        ),
        ("auto", None),
        ("reference", None),
        ("running_max=associative", None),
    ):
        with dispatch.implementation(text) as choice:
            program()
            running_max(jnp.zeros(3), jnp.zeros((2, 8, 3)))
        assert choice.asked == {name: dispatch.offered()[name] for name in ("linear_recurrence", "running_max")}
        if message is None:
            choice.check_used()
        else:
            with pytest.raises(UserError, match=message):
                choice.check_used()
    with dispatch.implementation("reference") as choice:
        pass
    with pytest.raises(UserError, match="no effect"):
        choice.check_used()

"""Why a program has failed, in one line."""

import traceback

import jax
import jax.numpy as jnp
import pytest

from common.errors import UserError
from models import mixer
from sweeps.failures import reason


def test_an_exception_is_told_with_its_place():
    """The innermost of this project's own files, whatever of JAX stands around it."""
    try:
        jax.eval_shape(lambda x: mixer.find("nobody"), jnp.ones(3))
    except UserError:
        printed = traceback.format_exc()
    found = reason(f"step 1\n{printed}\nand a farewell")
    assert "there is no mixer 'nobody'" in found and "(common/plugins.py, line " in found, printed


@pytest.mark.parametrize(
    "printed, found",
    [
        ("step 1\nerror: no such file\n", "no such file"),
        ("Traceback (most recent call last):\n  ...\nKeyError: 'a'\nerror: and then this", "and then this"),
        ("Traceback (most recent call last):\n  ...\nKeyError: 'a'\n", "KeyError: 'a'"),
        ('Traceback (most recent call last):\n  File "a.py", line 3, in f\n', "but not its end (a.py, line 3, in f)"),
    ],
)
def test_reasons(printed, found):
    assert reason(printed).endswith(found)


def test_no_reason():
    assert reason("all is well\n") is None

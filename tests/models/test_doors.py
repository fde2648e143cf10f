"""Errors at the door: for any width and hyperparameters a mixer works, or says in a `UserError` what to change.

Everything else that is raised is a fault of the program. Mixers, their forms and their hyperparameters are collected. Nothing
is computed: building a mixer and running it are traced, which takes a few hundredths of a second.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from common.errors import UserError
from models import mixer as mixers

pytestmark = pytest.mark.rest

WIDTH, LENGTH = 32, 12
# Widths that the usual numbers of heads divide and ones that they do not, and multiples of 4 whose heads are odd.
WIDTHS = {"default": (1, 7), "tiny": (12,)}
BAD = {int: (0, -1, 7), float: (-1.0, 0.0, math.nan, math.inf), str: ("?",), bool: (), tuple: ()}


def run(name: str, width: int, causal: bool, **hyperparameters) -> str | None:
    """Traces the making of a mixer, and of what it shares with its like, and a sequence through it.

    Returns:
      the message of the UserError, if one is raised.
    """
    options = {"causal": causal, "layers": 2, "length": LENGTH, **hyperparameters}

    def forward(x):
        mixers.create_shared(name, width, rngs=nnx.Rngs(0), **options)
        return mixers.create(name, width, rngs=nnx.Rngs(0), depth=2, **options)(x)[0]

    x = jax.ShapeDtypeStruct((1, LENGTH, width), jnp.float32)
    try:
        assert jax.eval_shape(forward, x).shape == x.shape
    except UserError as error:
        return str(error)
    return None


def forms(name: str) -> list[bool]:
    """Whether causal, of each form that is the mixer's own."""
    cls = mixers.find(name)
    return [causal for causal, offered in ((True, cls.causal), (False, cls.bidirectional)) if offered]


@pytest.mark.parametrize("name", mixers.names())
def test_widths(name):
    tiny = mixers.find(name).tiny
    for causal in forms(name):
        for given, widths in WIDTHS.items():
            for width in widths:
                message = run(name, width, causal, **(tiny if given == "tiny" else {}))
                assert message is None or (message.startswith(f"mixer {name!r}: ") and "`" in message)


@pytest.mark.parametrize("name", mixers.names())
def test_hyperparameters(name):
    """Each bad number and unknown choice is refused in a message that names its hyperparameter, or works; so do all choices."""
    config, causal = mixers.defaults(name), forms(name)[0]
    for key in config:
        kind = config.get_type(key)
        for value in BAD[kind]:
            message = run(name, WIDTH, causal, **{**mixers.find(name).tiny, key: value})
            if message is None:
                assert kind is int or (kind is float and math.isfinite(value)), f"{key}={value!r} is accepted"
            else:
                assert message.startswith(f"mixer {name!r}: ") and key in message, f"{key}={value!r}: {message}"
            if kind is str and (known := re.search("choose one of (.*)", message)):
                for choice in known[1].split(", "):
                    run(name, WIDTH, causal, **{**mixers.find(name).tiny, key: choice})

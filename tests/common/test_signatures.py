"""Options read from signatures and docstrings."""

import dataclasses

import numpy as np
import pytest

from common import signatures
from common.errors import UserError


@dataclasses.dataclass
class Options:
    """Some options.

    Attributes:
      size: how large it is; a line that
        goes on.
      low, high: the ends.
      table: by name.

    Raises:
      ValueError: never.
    """

    size: int = 3
    low: float | None = None
    high: float = 1.0
    table: dict = dataclasses.field(default_factory=lambda: {"a": 1})


def test_defaults():
    found = signatures.defaults(Options, omit=("high",))
    assert found.to_dict() == {"size": 3, "low": None, "table": {"a": 1}}
    found.low = 2.0
    with pytest.raises(TypeError):
        found.low = "two"


def test_an_option_without_a_default_or_a_type():
    with pytest.raises(TypeError, match=r"option 'x' of .* needs a default"):
        signatures.defaults(lambda x: x)

    def untyped(x=None):
        return x

    with pytest.raises(TypeError, match=r"option 'x', whose default is None, is annotated `type \| None`"):
        signatures.defaults(untyped)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("size", 3.0, "--size takes int, got 3.0"),
        ("size", True, "--size takes int, got True"),
        ("size", None, "--size takes int, got None"),
        ("low", "1", "--low takes float or None, got '1'"),
        ("low", float("nan"), "--low must be a finite number, got nan"),
        ("high", float("inf"), "--high must be a finite number, got inf"),
        ("high", None, "--high takes float, got None"),
        ("pair", (1.0, "2"), r"--pair takes tuple\[float, ...\], got \(1.0, '2'\)"),
        ("pair", 1.0, r"--pair takes tuple\[float, ...\], got 1.0"),
    ],
)
def test_types(key, value, message):
    def function(size: int = 3, low: float | None = None, high: float = 1.0, pair: tuple[float, ...] = (), free=None):
        pass

    fine = {"size": np.int64(4), "low": None, "high": 2, "pair": [1, 2.5], "free": object(), "not_there": "x"}
    signatures.check(function, fine)
    with pytest.raises(UserError, match=message):
        signatures.check(function, {**fine, key: value}, lambda key: f"--{key}")


def test_descriptions():
    ends = "the ends."
    assert signatures.descriptions(Options, "Attributes") == {
        "size": "how large it is; a line that goes on.",
        "low": ends,
        "high": ends,
        "table": "by name.",
    }
    assert signatures.descriptions(Options, "Args") == {}
